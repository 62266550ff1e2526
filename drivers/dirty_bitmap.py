# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps: which parts of a node's disk were written since some point in time.

A bitmap that is `enabled` records: the node marks in it what a write, write-zeroes or discard has
touched, before the request is acknowledged, also when the request has failed, since some of it may
have been done. The mark comes after the driver's work, as in QEMU: who clears a bit and then reads
the place finds the bit set again if a write was under way. A crash between a write and its mark
does no harm, as a bitmap that records is marked as in use on the disk all the while.

`persistent` ones are kept in the image by the driver, which says so when one is changed that the
disk calls consistent (`BlockDriver.bitmap_changing`). An `inconsistent` one was in use when its
image wasn't closed: what it lacks nobody knows, so it can only be removed. A `busy` one belongs to
somebody (a job, an export), and nobody else may change it.

Context: home thread of the node's AioContext.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blockemu.drivers.sparse_bits import SparseBits
from blockemu.drivers.status_runs import StatusRuns

if TYPE_CHECKING:
    from collections.abc import Iterator

GRANULARITY_MIN: Final = 512
GRANULARITY_MAX: Final = 1 << 31
"""QEMU's bounds, and the format's (granularity_bits 9 to 31)."""
GRANULARITY_DEFAULT_MIN: Final = 4096
GRANULARITY_DEFAULT_MAX: Final = 65536
NAME_BYTES_MAX: Final = 1023


def default_granularity(cluster_size: int) -> int:
    """Of a node whose driver allocates so many bytes at once, as QEMU chooses it."""
    if cluster_size <= 1:
        return GRANULARITY_DEFAULT_MAX
    return min(max(cluster_size, GRANULARITY_DEFAULT_MIN), GRANULARITY_DEFAULT_MAX)


class DirtyBitmap:
    """One bitmap of a node. `length_bytes`: the disk's size; `granularity`: bytes for each bit."""

    __slots__ = (
        "_shift",
        "bits",
        "busy",
        "changed",
        "enabled",
        "inconsistent",
        "length_bytes",
        "name",
        "persistent",
    )

    def __init__(
        self,
        name: str,
        length_bytes: int,
        *,
        granularity: int,
        enabled: bool = True,
        persistent: bool = False,
        inconsistent: bool = False,
        bits: SparseBits | None = None,
    ) -> None:
        assert GRANULARITY_MIN <= granularity <= GRANULARITY_MAX
        assert not granularity & (granularity - 1), granularity
        self.name = name
        self.length_bytes = length_bytes
        self.enabled = enabled
        """It records. Changed by the node (`set_recording`) once it has it."""
        self.persistent = persistent
        self.inconsistent = inconsistent
        self.busy = False
        self.changed = False
        """Something was done to the bits since somebody last took this down."""
        self._shift = granularity.bit_length() - 1
        self.bits = bits if bits is not None else SparseBits(self.bits_of(length_bytes))
        """A bit for each `granularity` bytes from 0."""

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.name}>"

    @property
    def granularity(self) -> int:
        return 1 << self._shift

    @property
    def records(self) -> bool:
        """The node is to mark writes in it."""
        return self.enabled and not self.inconsistent

    def bits_of(self, length_bytes: int) -> int:
        """How many bits a disk of this length takes."""
        return (length_bytes + self.granularity - 1) >> self._shift

    def set(self, offset: int, length: int) -> None:
        """Bytes `[offset, offset + length)` of the disk are dirty. What is past the end isn't."""
        end = min(offset + length, self.length_bytes)
        if offset < end:
            self.changed = True
            self.bits.set(offset >> self._shift, ((end - 1) >> self._shift) + 1)

    def reset(self, offset: int, length: int) -> None:
        """These bytes are clean: whole granules, but for the disk's end."""
        end = min(offset + length, self.length_bytes)
        assert not offset & (self.granularity - 1), offset
        assert not end & (self.granularity - 1) or end == self.length_bytes, end
        if offset < end:
            self.changed = True
            self.bits.clear(offset >> self._shift, ((end - 1) >> self._shift) + 1)

    def clear(self) -> None:
        """All is clean."""
        self.changed = True
        self.bits.clear(0, self.bits.length)

    def merge(self, other: DirtyBitmap) -> None:
        """What is dirty in `other` is dirty here, too. Both are of disks of one length."""
        assert self.length_bytes == other.length_bytes, (self, other)
        self.changed = True
        if self.granularity == other.granularity:
            self.bits.merge(other.bits)
            return
        for offset, length in other.ranges():
            self.set(offset, length)

    def copy(self) -> DirtyBitmap:
        """Another one of the same content, which records nothing and belongs to no node."""
        copied = DirtyBitmap(
            self.name, self.length_bytes, granularity=self.granularity, enabled=False
        )
        copied.bits.merge(self.bits)
        return copied

    def resize(self, length_bytes: int) -> None:
        """The disk's length has changed. What is new is clean."""
        self.changed = True
        self.bits.resize(self.bits_of(length_bytes))
        self.length_bytes = length_bytes

    def count(self) -> int:
        """How many bytes of the disk are dirty, in whole granules: QEMU's `count`."""
        return self.bits.count() << self._shift

    def ranges(self) -> Iterator[tuple[int, int]]:
        """What is dirty, as (offset, length) in bytes, ascending. Unchanged meanwhile."""
        for start, end in self.bits.runs():
            offset = start << self._shift
            yield offset, min(end << self._shift, self.length_bytes) - offset

    def runs(self, offset: int, length: int, *, runs_max: int) -> StatusRuns:
        """What the disk is from `offset` on, in up to `runs_max` runs: state 1 dirty, 0 clean.

        At least one byte of `length`. Bytes that the bitmap doesn't reach are clean.
        """
        found, bits, shift = StatusRuns(), self.bits, self._shift
        position, end = offset, offset + length
        while position < end and len(found) < runs_max:
            bit = position >> shift
            dirty = bits.next_set(bit) if bit < bits.length else bits.length
            if dirty > bit:
                state, stop = 0, dirty << shift if dirty < bits.length else end
            else:
                state, stop = 1, bits.next_clear(bit) << shift
            stop = min(stop, end)
            found.add(stop - position, state)
            position = stop
        return found
