# SPDX-License-Identifier: Apache-2.0
"""SparseBits against a plain set of integers."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from blockemu.drivers.sparse_bits import CHUNK_BITS, CHUNK_BYTES, SparseBits

LENGTHS = st.sampled_from([0, 1, 7, 8, 9, 4096, CHUNK_BITS - 1, CHUNK_BITS, CHUNK_BITS + 1,
                           3 * CHUNK_BITS, 5 * CHUNK_BITS + 13])  # fmt: skip


def points(length: int) -> st.SearchStrategy[int]:
    near = [*range(0, length + 1, CHUNK_BITS), length]
    return st.one_of(
        st.integers(0, length),
        st.sampled_from(near).flatmap(lambda at: st.integers(max(at - 9, 0), min(at + 9, length))),
    )


def runs_of(ones: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for bit in sorted(ones):
        if found and found[-1][1] == bit:
            found[-1] = (found[-1][0], bit + 1)
        else:
            found.append((bit, bit + 1))
    return found


def agree(bits: SparseBits, ones: set[int]) -> None:
    assert list(bits.runs()) == runs_of(ones)
    assert bits.count() == len(ones)
    assert bits.any() == bool(ones)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sparse_bits_after_any_changes_hold_what_a_set_does(data: Any) -> None:
    length = data.draw(LENGTHS)
    bits, ones = SparseBits(length), set[int]()
    for _ in range(data.draw(st.integers(0, 8))):
        what = data.draw(st.sampled_from(["set", "clear", "resize", "merge", "copy"]))
        start, end = sorted((data.draw(points(length)), data.draw(points(length))))
        if what == "set":
            bits.set(start, end)
            ones |= set(range(start, end))
        elif what == "clear":
            bits.clear(start, end)
            ones -= set(range(start, end))
        elif what == "resize":
            length = data.draw(LENGTHS)
            bits.resize(length)
            ones = {bit for bit in ones if bit < length}
        elif what == "merge":
            other = SparseBits(length)
            other.set(start, end)
            bits.merge(other)
            ones |= set(range(start, end))
        else:
            bits = copied(bits, data.draw(st.sampled_from([1, 100, 512, CHUNK_BYTES, 70_000])))
        agree(bits, ones)
    at = data.draw(points(length))
    assert bits.next_set(at) == min((bit for bit in ones if bit >= at), default=length)
    clear = at
    while clear in ones:
        clear += 1
    assert bits.next_clear(at) == clear


def copied(bits: SparseBits, piece: int) -> SparseBits:
    """The same by way of bytes."""
    other = SparseBits(bits.length)
    for offset in range(0, bits.length_bytes, piece):
        data = bits.read(offset, piece)
        assert len(data) == piece
        assert bits.is_zero(offset, piece) == (not data.strip(b"\0"))
        other.write(offset, data)
    assert other == bits
    return other


def test_write_past_the_end_is_left_out() -> None:
    bits = SparseBits(11)
    bits.write(0, b"\xff" * 600)
    assert list(bits.runs()) == [(0, 11)]
    assert bits.read(0, 4) == b"\xff\x07\0\0"
    bits.resize(40)
    assert bits.count() == 11


def test_merge_copies_what_it_takes() -> None:
    one, other = SparseBits(100), SparseBits(100)
    other.set(3, 5)
    one.merge(other)
    one.set(7, 8)
    assert list(other.runs()) == [(3, 5)]


def test_bits_of_a_16_tib_disk_take_little_while_few_are_set() -> None:
    bits = SparseBits((16 << 40) >> 16)
    bits.set(1 << 20, (1 << 20) + 1)
    assert bits.bytes_bound == CHUNK_BYTES
    bits.set(0, bits.length)
    assert bits.bytes_bound == 32 << 20
    assert bits.count() == 1 << 28
    assert bits.next_clear(0) == bits.length
    bits.clear(1 << 20, (1 << 20) + 1)
    assert bits.next_clear(0) == 1 << 20
    bits.clear(0, bits.length)
    assert bits.bytes_bound == 0
    assert bits.next_set(0) == bits.length
