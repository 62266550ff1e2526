# SPDX-License-Identifier: Apache-2.0
"""The buffer pool: alignment, order of reuse, and its bound."""

from __future__ import annotations

import pytest

from blockemu.loop.buffers import (
    CLASS_BYTES_MAX,
    HUGE_BYTES,
    RETAINED_BYTES_MAX,
    Buffer,
    BufferPool,
    address_of,
)


@pytest.mark.parametrize(
    ("length", "capacity"),
    [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (65536, 65536), (65537, 131072)],
)
def test_take_rounds_up_to_a_power_of_two(length: int, capacity: int) -> None:
    buffer = BufferPool().take(length)
    assert buffer.capacity == capacity == len(buffer.view)


def test_buffer_is_aligned_and_writable() -> None:
    buffer = BufferPool().take(4096)
    assert buffer.address % 4096 == 0
    assert not buffer.view.readonly


def test_address_of_slice_counts_from_the_buffer() -> None:
    buffer = BufferPool().take(8192)
    assert address_of(buffer.view[100:200]) == buffer.address + 100


def test_give_then_take_returns_the_last_one_first() -> None:
    pool = BufferPool()
    first, second = pool.take(4096), pool.take(4096)
    pool.give(first)
    pool.give(second)
    assert pool.take(4096) is second
    assert pool.take(4096) is first


def test_classes_are_kept_apart() -> None:
    pool = BufferPool()
    small = pool.take(4096)
    pool.give(small)
    assert pool.take(8192) is not small
    assert pool.take(100) is small


def test_retention_is_bounded() -> None:
    pool = BufferPool(retained_bytes_max=8192)
    taken = [pool.take(4096) for _ in range(3)]
    for buffer in taken:
        pool.give(buffer)
    assert pool.retained_bytes == 8192
    assert pool.take(4096) is taken[1]


def test_retention_by_default_is_64_mib() -> None:
    pool = BufferPool()
    taken = [pool.take(CLASS_BYTES_MAX) for _ in range(3)]
    for buffer in taken:
        pool.give(buffer)
    assert pool.retained_bytes == RETAINED_BYTES_MAX


def test_take_over_the_largest_class_is_never_kept() -> None:
    pool = BufferPool()
    buffer = pool.take(CLASS_BYTES_MAX + 1)
    assert buffer.capacity == CLASS_BYTES_MAX + 4096
    pool.give(buffer)
    assert pool.retained_bytes == 0


def test_clear_drops_everything() -> None:
    pool = BufferPool()
    buffer = pool.take(1)
    pool.give(buffer)
    pool.clear()
    assert pool.retained_bytes == 0
    assert isinstance(pool.take(1), Buffer)


def test_large_buffers_begin_on_huge_pages() -> None:
    pool = BufferPool()
    for length in (HUGE_BYTES, 2 * HUGE_BYTES, 20 * HUGE_BYTES):
        buffer = pool.take(length)
        assert buffer.address % HUGE_BYTES == 0
        buffer.view[0] = buffer.view[length - 1] = 7


def test_buffers_of_half_a_huge_page_are_made_in_twos() -> None:
    pool = BufferPool()
    half = HUGE_BYTES // 2
    one, two, three = (pool.take(half) for _ in range(3))
    assert one.address % HUGE_BYTES == 0
    assert two.address == one.address + half
    assert three.address // HUGE_BYTES != one.address // HUGE_BYTES
    one.view[:] = bytes([1]) * half
    two.view[:] = bytes([2]) * half
    assert bytes(one.view[-1:]) + bytes(two.view[:1]) == bytes([1, 2])


def test_twin_over_the_bound_is_not_kept() -> None:
    pool = BufferPool(retained_bytes_max=HUGE_BYTES // 4)
    assert pool.take(HUGE_BYTES // 2).capacity == HUGE_BYTES // 2
    assert pool.retained_bytes == 0
