# SPDX-License-Identifier: Apache-2.0
"""One compressed cluster, with what may stand behind it."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import pytest
import zstandard

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2 import compression
from blockemu.drivers.qcow2.compression import DEFLATE, ZSTD, decompressor

CLUSTER = 65536


def deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-12)
    return encoder.compress(data) + encoder.flush()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def zstd_of_unknown_size(data: bytes) -> bytes:
    encoder = zstandard.ZstdCompressor().compressobj()
    return encoder.compress(data) + encoder.flush()


def zstd_in_two_frames(data: bytes) -> bytes:
    return zstd(data[:1000]) + zstd(data[1000:])


every_encoder = pytest.mark.parametrize(
    ("kind", "encode"),
    [
        (DEFLATE, deflate),
        (ZSTD, zstd),
        (ZSTD, zstd_of_unknown_size),
        (ZSTD, zstd_in_two_frames),
    ],
)


def content(seed: int) -> bytes:
    return random.Random(seed).randbytes(CLUSTER // 64) * 64


@every_encoder
@pytest.mark.parametrize("behind", [b"", bytes(511), b"\x28\xb5\x2f\xfdand so on", b"\xff" * 600])
def test_a_cluster_is_read_and_what_follows_is_left_alone(
    kind: int, encode: Callable[[bytes], bytes], behind: bytes, seed: int
) -> None:
    data = content(seed)
    assert decompressor("disk", kind)(encode(data) + behind, CLUSTER) == data


@every_encoder
def test_a_cluster_that_ends_early_is_an_error(
    kind: int, encode: Callable[[bytes], bytes], seed: int
) -> None:
    with pytest.raises(ValueError, match=r"."):
        decompressor("disk", kind)(encode(content(seed))[:-20], CLUSTER)


@every_encoder
def test_a_short_cluster_is_an_error(
    kind: int, encode: Callable[[bytes], bytes], seed: int
) -> None:
    with pytest.raises(ValueError, match="bytes come out"):
        decompressor("disk", kind)(encode(content(seed)[:-1]), CLUSTER)


@pytest.mark.parametrize("kind", [DEFLATE, ZSTD])
def test_rubbish_is_an_error(kind: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        decompressor("disk", kind)(b"\xff" * 512, CLUSTER)


def test_zstd_without_a_library_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(compression, "import_module", fail)
    with pytest.raises(ImageError, match="install the Python package 'zstandard'"):
        decompressor("disk", ZSTD)
