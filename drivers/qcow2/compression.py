# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: a descriptor's bytes back into a cluster, and a cluster into bytes.

Each cluster is compressed by itself. Type 0 is raw deflate, without zlib's header; type 1 is zstd,
for which a library has to be installed (`zstandard`, or Python's own from 3.14 on). The data may be
followed by what belongs to somebody else: decompression stops when it has a cluster.

Deflate is written with a window of 12 bits, which is all that other readers have to keep.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

from blockemu.drivers.errors import ImageError

DEFLATE, ZSTD = 0, 1
DEFLATE_WINDOW_BITS = 12
TYPE_NAMES = {DEFLATE: "zlib", ZSTD: "zstd"}

Decompressor = Callable[[bytes, int], bytes]
"""(data, cluster size) -> one cluster. Raises: ValueError when the data isn't one."""

Compressor = Callable[[memoryview], bytes]
"""One cluster -> its compressed bytes, however many. Context: any thread."""


def compressor(name: str, compression_type: int) -> Compressor:
    """How to write the compressed clusters of an image. Raises: ImageError."""
    if compression_type == DEFLATE:
        return _deflate
    library = _zstd_library(name, compression_type)

    def compress(cluster: memoryview) -> bytes:
        packed: bytes = library.compress(cluster)
        return packed

    return compress


def decompressor(name: str, compression_type: int) -> Decompressor:
    """How to read the compressed clusters of an image. Raises: ImageError."""
    if compression_type == DEFLATE:
        return _inflate
    return _zstd_reader(_zstd_library(name, compression_type))


def _zstd_library(name: str, compression_type: int) -> Any:
    if compression_type != ZSTD:
        raise ImageError(name, f"compression type {compression_type} is not supported")
    for module in ("compression.zstd", "zstandard"):
        try:
            return import_module(module)
        except ImportError:
            continue
    raise ImageError(
        name, "its clusters are compressed with zstd: install the Python package 'zstandard'"
    )


def _deflate(cluster: memoryview) -> bytes:
    encoder = zlib.compressobj(wbits=-DEFLATE_WINDOW_BITS)
    return encoder.compress(cluster) + encoder.flush()


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
