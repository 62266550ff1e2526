# SPDX-License-Identifier: Apache-2.0
"""The C scans of memory agree with what Python finds a byte at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.loop.memory_scan import Run, equal_length, is_zero, zero_and_data_runs


def runs(data: bytes, *, offset: int, granule: int) -> list[Run]:
    return list(zero_and_data_runs(memoryview(data), offset=offset, granule=granule))


def runs_in_python(data: bytes, *, offset: int, granule: int) -> list[Run]:
    found: list[Run] = []
    start = 0
    while start < len(data):
        length = min(granule - (offset + start) % granule, len(data) - start)
        zero = not any(data[start : start + length])
        if found and found[-1].is_zero == zero:
            found[-1] = found[-1]._replace(length=found[-1].length + length)
        else:
            found.append(Run(start, length, zero))
        start += length
    return found


@given(
    pieces=st.lists(st.tuples(st.booleans(), st.integers(1, 1200)), max_size=6),
    offset=st.integers(0, 2000),
    granule=st.sampled_from([1, 3, 128, 512, 4096]),
)
def test_runs_are_those_that_python_finds(
    pieces: list[tuple[bool, int]], offset: int, granule: int
) -> None:
    data = b"".join(bytes(n) if zero else bytes(n - 1) + b"\x01" for zero, n in pieces)
    assert runs(data, offset=offset, granule=granule) == runs_in_python(
        data, offset=offset, granule=granule
    )


def test_blocks_are_counted_from_the_offset() -> None:
    data = bytes(512) + b"x" * 512 + bytes(1024)
    assert runs(data, offset=0, granule=1024) == [Run(0, 1024, False), Run(1024, 1024, True)]
    assert runs(data, offset=512, granule=1024) == [
        Run(0, 512, True), Run(512, 1024, False), Run(1536, 512, True)
    ]  # fmt: skip


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 4096, 9999])
def test_last_byte_of_any_length_is_seen(length: int) -> None:
    assert is_zero(memoryview(bytes(length)))
    data = bytearray(length)
    assert equal_length(memoryview(data), memoryview(bytes(length))) == length
    if length:
        data[-1] = 1
        assert not is_zero(memoryview(data))
        assert equal_length(memoryview(data), memoryview(bytes(length))) == length - 1


def test_equal_length_is_to_the_first_byte_that_differs() -> None:
    for position in (0, 1, 4095, 4096, 9000):
        other = bytearray(10_000)
        other[position] = 1
        assert equal_length(memoryview(bytes(10_000)), memoryview(other)) == position
