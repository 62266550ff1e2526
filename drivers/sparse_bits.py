# SPDX-License-Identifier: Apache-2.0
"""A long row of bits, of which most are alike: what a dirty bitmap is made of.

Bits stand in bytes, the lowest bit first, as qcow2 stores them (specification: Bitmap data). They
are cut into chunks of 4 KiB, and a chunk of nothing but zeroes, or ones, takes no memory but its
entry in a table: the map of a 16 TiB disk with a bit for each 64 KiB takes 32 MiB only when its
dirty places are scattered all over it.

No loop goes bit by bit. Runs are found by stripping bytes that are alike from a chunk, single bits
within a byte by arithmetic, and chunks are counted and merged as one large integer each.

Context: whoever owns it, one thread at a time. Suspends: never.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK_BYTES: Final = 4096
CHUNK_SHIFT: Final = 15
CHUNK_BITS: Final = 1 << CHUNK_SHIFT
_CHUNK_MASK: Final = CHUNK_BITS - 1

_ZEROES: Final = bytes(CHUNK_BYTES)
_ONES: Final = b"\xff" * CHUNK_BYTES


class SparseBits:
    """`length` bits, all 0 at first."""

    __slots__ = ("_chunks", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self._chunks: dict[int, bytes | bytearray] = {}
        """Those that aren't all zeroes. `_ONES` itself, or a bytearray of the chunk's own."""

    @property
    def bytes_bound(self) -> int:
        """What the chunks take of memory, or less: those of ones count as the others."""
        return len(self._chunks) * CHUNK_BYTES

    @property
    def length_bytes(self) -> int:
        """How many bytes `read` has."""
        return (self.length + 7) // 8

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseBits):
            return NotImplemented
        return self.length == other.length and list(self.runs()) == list(other.runs())

    __hash__ = None  # type: ignore[assignment]

    # --- changing ---

    def set(self, start: int, end: int) -> None:
        """Make the bits in [start, end) ones."""
        assert 0 <= start <= end <= self.length, (start, end, self.length)
        while start < end:
            index = start >> CHUNK_SHIFT
            stop = min(end, (index + 1) << CHUNK_SHIFT)
            if stop - start == CHUNK_BITS:
                self._chunks[index] = _ONES
            else:
                chunk = self._chunks.get(index)
                if chunk is not _ONES:
                    if chunk is None:
                        chunk = self._chunks[index] = bytearray(CHUNK_BYTES)
                    assert isinstance(chunk, bytearray)
                    _fill(chunk, start & _CHUNK_MASK, (stop - 1 & _CHUNK_MASK) + 1)
            start = stop

    def clear(self, start: int, end: int) -> None:
        """Make the bits in [start, end) zeroes."""
        assert 0 <= start <= end <= self.length, (start, end, self.length)
        if end - start == self.length:
            self._chunks.clear()
            return
        while start < end:
            index = start >> CHUNK_SHIFT
            stop = min(end, (index + 1) << CHUNK_SHIFT)
            chunk = self._chunks.get(index)
            if chunk is not None and stop - start == CHUNK_BITS:
                del self._chunks[index]
            elif chunk is not None:
                if not isinstance(chunk, bytearray):
                    chunk = self._chunks[index] = bytearray(chunk)
                _wipe(chunk, start & _CHUNK_MASK, (stop - 1 & _CHUNK_MASK) + 1)
            start = stop

    def merge(self, other: SparseBits) -> None:
        """Make all bits ones that are ones in `other`, which has as many."""
        assert self.length == other.length, (self.length, other.length)
        for index, theirs in other._chunks.items():
            mine = self._chunks.get(index)
            if mine is None:
                self._chunks[index] = theirs if theirs is _ONES else bytearray(theirs)
            elif theirs is _ONES:
                self._chunks[index] = _ONES
            elif mine is not _ONES:
                both = int.from_bytes(mine, "little") | int.from_bytes(theirs, "little")
                self._chunks[index] = bytearray(both.to_bytes(CHUNK_BYTES, "little"))

    def resize(self, length: int) -> None:
        """Cut bits off at the end, or append zeroes."""
        if length < self.length:
            self.clear(length, self.length)
        self.length = length

    # --- looking ---

    def count(self) -> int:
        """How many ones there are."""
        total = 0
        for chunk in self._chunks.values():
            total += CHUNK_BITS if chunk is _ONES else int.from_bytes(chunk, "little").bit_count()
        return total

    def any(self) -> bool:
        """Whether there are any ones."""
        return self.next_set(0) < self.length

    def next_set(self, start: int) -> int:
        """The first one at or behind `start`; `length`, if there is none."""
        index, within = start >> CHUNK_SHIFT, start & _CHUNK_MASK
        chunk = self._chunks.get(index)
        if chunk is not None:
            found = _next(chunk, within, b"\0", 0)
            if found < CHUNK_BITS:
                return min((index << CHUNK_SHIFT) + found, self.length)
        for later in self._later(index):
            found = _next(self._chunks[later], 0, b"\0", 0)
            if found < CHUNK_BITS:
                return min((later << CHUNK_SHIFT) + found, self.length)
        return self.length

    def next_clear(self, start: int) -> int:
        """The first zero at or behind `start`; `length`, if there is none."""
        while start < self.length:
            index, within = start >> CHUNK_SHIFT, start & _CHUNK_MASK
            chunk = self._chunks.get(index)
            if chunk is None:
                return start
            found = CHUNK_BITS if chunk is _ONES else _next(chunk, within, b"\xff", 0xFF)
            if found < CHUNK_BITS:
                return min((index << CHUNK_SHIFT) + found, self.length)
            start = (index + 1) << CHUNK_SHIFT
        return self.length

    def runs(self) -> Iterator[tuple[int, int]]:
        """The ones as (start, end) of each run, ascending. Nothing is changed meanwhile."""
        begun = 0
        end = -1
        for index in sorted(self._chunks):
            chunk, base = self._chunks[index], index << CHUNK_SHIFT
            for low, high in _runs_in(chunk):
                if base + low == end:
                    end = base + high
                    continue
                if end > begun:
                    yield begun, end
                begun, end = base + low, base + high
        if end > begun:
            yield begun, end

    def _later(self, index: int) -> Iterable[int]:
        """The chunks behind `index` that hold anything, ascending."""
        if len(self._chunks) < 64:
            return sorted(later for later in self._chunks if later > index)
        last = (self.length - 1) >> CHUNK_SHIFT
        return (later for later in range(index + 1, last + 1) if later in self._chunks)

    # --- as bytes ---

    def read(self, offset: int, length: int) -> bytes:
        """Bytes `[offset, offset + length)` of the row; behind its end, zeroes."""
        pieces = []
        end = offset + length
        while offset < end:
            index, within = divmod(offset, CHUNK_BYTES)
            count = min(CHUNK_BYTES - within, end - offset)
            chunk = self._chunks.get(index, _ZEROES)
            pieces.append(bytes(chunk[within : within + count]))
            offset += count
        data = b"".join(pieces)
        inside = self.length - (end - length) * 8
        if inside >= len(data) * 8:
            return data
        mask = (1 << max(inside, 0)) - 1  # a chunk of ones may reach past the end
        return (int.from_bytes(data, "little") & mask).to_bytes(len(data), "little")

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether those bytes hold no ones."""
        first, last = offset // CHUNK_BYTES, (offset + length - 1) // CHUNK_BYTES
        if last - first > len(self._chunks):
            held = [index for index in self._chunks if first <= index <= last]
        else:
            held = [index for index in range(first, last + 1) if index in self._chunks]
        start = offset * 8
        return not held or self.next_set(start) >= min(start + length * 8, self.length)

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Put bytes of the row where they belong. Bits behind its end are left out."""
        position, total = 0, min(len(data), self.length_bytes - offset)
        while position < total:
            index, within = divmod(offset + position, CHUNK_BYTES)
            count = min(CHUNK_BYTES - within, total - position)
            piece = bytes(data[position : position + count])
            chunk = self._chunks.get(index)
            if count == CHUNK_BYTES and piece == _ONES:
                self._chunks[index] = _ONES
            elif chunk is not None or piece.strip(b"\0"):
                if not isinstance(chunk, bytearray):
                    chunk = self._chunks[index] = bytearray(chunk or CHUNK_BYTES)
                chunk[within : within + count] = piece
            position += count
        if total > 0 and (offset + total) * 8 > self.length:
            self._cut_tail()

    def _cut_tail(self) -> None:
        index, within = self.length >> CHUNK_SHIFT, self.length & _CHUNK_MASK
        chunk = self._chunks.get(index)
        if isinstance(chunk, bytearray):
            _wipe(chunk, within, CHUNK_BITS)


def _fill(chunk: bytearray, start: int, end: int) -> None:
    first, last = start >> 3, (end - 1) >> 3
    head, tail = 0xFF << (start & 7) & 0xFF, 0xFF >> (7 - (end - 1 & 7))
    if first == last:
        chunk[first] |= head & tail
        return
    chunk[first] |= head
    chunk[first + 1 : last] = _ONES[: last - first - 1]
    chunk[last] |= tail


def _wipe(chunk: bytearray, start: int, end: int) -> None:
    first, last = start >> 3, (end - 1) >> 3
    head, tail = 0xFF << (start & 7) & 0xFF, 0xFF >> (7 - (end - 1 & 7))
    if first == last:
        chunk[first] &= ~(head & tail)
        return
    chunk[first] &= ~head
    chunk[first + 1 : last] = _ZEROES[: last - first - 1]
    chunk[last] &= ~tail


def _next(chunk: bytes | bytearray, start: int, alike: bytes, flip: int) -> int:
    """The first bit at or behind `start` that isn't as in the byte `alike`; `flip` makes such bits
    ones. CHUNK_BITS, if there is none."""
    first = start >> 3
    rest = (chunk[first] ^ flip) >> (start & 7) << (start & 7)
    if not rest:
        tail = chunk[first + 1 :]
        left = len(tail.lstrip(alike))
        if not left:
            return CHUNK_BITS
        first += 1 + len(tail) - left
        rest = chunk[first] ^ flip
    return (first << 3) + (rest & -rest).bit_length() - 1


def _runs_in(chunk: bytes | bytearray) -> Iterator[tuple[int, int]]:
    if chunk is _ONES:
        yield 0, CHUNK_BITS
        return
    start = _next(chunk, 0, b"\0", 0)
    while start < CHUNK_BITS:
        end = _next(chunk, start, b"\xff", 0xFF)
        yield start, end
        start = _next(chunk, end, b"\0", 0) if end < CHUNK_BITS else end
