# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: a descriptor's bytes back into a cluster.

Each cluster is compressed by itself. Type 0 is raw deflate, without zlib's header; type 1 is zstd,
for which a library has to be installed (`zstandard`, or Python's own from 3.14 on). The data may be
followed by what belongs to somebody else: decompression stops when it has a cluster.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

from blockemu.drivers.errors import ImageError

DEFLATE, ZSTD = 0, 1
TYPE_NAMES = {DEFLATE: "zlib", ZSTD: "zstd"}

Decompressor = Callable[[bytes, int], bytes]
"""(data, cluster size) -> one cluster. Raises: ValueError when the data isn't one."""


def decompressor(name: str, compression_type: int) -> Decompressor:
    """How to read the compressed clusters of an image. Raises: ImageError."""
    if compression_type == DEFLATE:
        return _inflate
    if compression_type != ZSTD:
        raise ImageError(name, f"compression type {compression_type} is not supported")
    for module in ("compression.zstd", "zstandard"):
        try:
            library = import_module(module)
        except ImportError:
            continue
        return _zstd_reader(library)
    raise ImageError(
        name, "its clusters are compressed with zstd: install the Python package 'zstandard'"
    )


def _inflate(data: bytes, cluster_size: int) -> bytes:
    try:
        cluster = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, cluster_size)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    return _whole(cluster, cluster_size)


def _zstd_reader(library: Any) -> Decompressor:
    def read(data: bytes, cluster_size: int) -> bytes:
        try:
            if hasattr(library, "ZstdCompressionReader"):
                reader = library.ZstdDecompressor().stream_reader(data, read_across_frames=True)
                cluster = reader.read(cluster_size)
            else:
                cluster = library.ZstdDecompressor().decompress(data, cluster_size)
        except Exception as error:  # each library has a class of its own for it
            raise ValueError(str(error)) from None
        return _whole(cluster, cluster_size)

    return read


def _whole(cluster: bytes, cluster_size: int) -> bytes:
    if len(cluster) != cluster_size:
        raise ValueError(f"{len(cluster)} bytes come out, not a cluster of {cluster_size}")
    return cluster
