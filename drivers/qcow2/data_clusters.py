# SPDX-License-Identifier: Apache-2.0
"""Mapping, writing and erasing where the guest's clusters lie in an external data file.

There each guest cluster has its place, so there is nothing to allocate, to count or to let go of;
an L2 entry only says whether what lies there is what the guest sees. Its offset must be the guest's
own (specification: Incompatible features, bit 2). Guest cluster 0 has offset 0, so COPIED alone
tells that it is mapped (specification: Standard Cluster Descriptor).

Since a cluster is written where it may have been before, its old contents are never needed again:
- to map it, it is written whole (but for zeroes that are there already, as a hole), and is durable
  before its entry (metadata_writer.py);
- discarded space is given back at once, after the entry has changed in memory: if the power fails
  before the entry is durable, the guest finds zeroes, which is what it was to see.

Context: as guest_write.py and guest_erase.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockemu.drivers.qcow2.cluster_map import ClusterMap, Extent, Kind
from blockemu.drivers.qcow2.data_file import DataFile
from blockemu.drivers.qcow2.guest_erase import GuestEraser
from blockemu.drivers.qcow2.guest_write import GuestWriter, Target
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.metadata_writer import Reference
    from blockemu.drivers.qcow2.table_cache import Slice


def data_kind(word: int) -> Kind:
    """The kind of an L2 entry of an image with a data file, one that isn't compressed."""
    if word & ZERO:
        return Kind.ZERO_ALLOCATED if word & OFFSET_MASK else Kind.ZERO
    return Kind.DATA if word & (OFFSET_MASK | COPIED) else Kind.UNALLOCATED


class DataFileMap(ClusterMap):
    """The mapping: each entry maps its cluster to its own place, or doesn't."""

    def _extent(self, found: Slice, offset: int, length: int) -> Extent:
        words, size = found.words, self._mask + 1
        index = (offset >> self._bits) % self.slice_entries
        word = self.check_entry(found, index)
        inside = offset & self._mask
        kind = data_kind(word)
        placed = kind in (Kind.DATA, Kind.ZERO_ALLOCATED)
        if placed and word & OFFSET_MASK != offset - inside:
            raise self._damage.report(
                f"L2 entry at offset {found.offset + index * 8} is {word:#x}, but in an external "
                f"data file the guest's cluster is at {offset - inside:#x}"
            )
        step = size if placed else 0
        expected = word + step
        covered = size - inside
        index += 1
        while covered < length and index < self.slice_entries and words[index] == expected:
            covered += size
            expected += step
            index += 1
        length = min(covered, length)
        if not placed:
            return Extent(kind, length)
        return Extent(kind, length, offset, bool(word & COPIED))

    def check_entry(self, found: Slice, index: int) -> int:
        word = found.words[index]
        if word & (COMPRESSED | L2_RESERVED) or word & OFFSET_MASK & self._mask:
            raise self._damage.report(
                f"L2 entry at offset {found.offset + index * 8} is {word:#x},"
                " which is no cluster of an external data file"
            )
        return word

    def reference(self, word: int) -> Reference | None:
        return None  # the data file's clusters aren't counted


class DataFileWriter(GuestWriter):
    """Writes; what isn't mapped yet is written whole, and then mapped."""

    def _take_at_once(self, cluster: int, count: int) -> Target | None:
        return None  # the file may have to grow

    async def _take(self, cluster: int, count: int) -> Target:
        await self._clusters.make_writable(cluster)
        found = await self._clusters.load(cluster)
        index = cluster % self._clusters.slice_entries
        run = 0
        for position in range(index, min(index + count, self._clusters.slice_entries)):
            word = self._clusters.check_entry(found, position)
            if data_kind(word) is Kind.DATA and word & COPIED:
                break
            run += 1
        await self._data.cover((cluster + run) << self._bits)
        return Target(cluster, run, reads_zero=False, taken=False, replaces_data=False)

    async def _fill(self, target: Target, offset: int, view: memoryview) -> None:
        """Where the data file has a hole, what lies around the request is zeroes already."""
        start, length = target.first << self._bits, target.clusters << self._bits
        if len(view) < min(length, self.disk_bytes - start):
            assert isinstance(self._data.file, DataFile)
            target = target._replace(reads_zero=await self._data.file.reads_zero(start, length))
        await super()._fill(target, offset, view)

    async def map_all(self, first: int, last: int) -> None:
        """Map guest clusters `[first, last)`, whatever lies there. The caller holds them.

        Suspends: for I/O, and while the writer flushes. Raises: OSError.
        """
        while first < last:
            async with self._mutex:
                await self._clusters.make_writable(first)
            entries = self._clusters.slice_entries
            run = min(last - first, entries - first % entries)
            await self._link(
                first, Target(first, run, reads_zero=False, taken=False, replaces_data=False)
            )
            first += run


class DataFileEraser(GuestEraser):
    """Zeroes and discards: in a raw data file as bytes, else as in any image."""

    def __init__(self, *args: Any, file: DataFile, pass_discard: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = file
        self._pass_discard = pass_discard

    async def is_fast(self, offset: int, length: int) -> bool:
        # A raw data file's bytes are made zeroes, by whatever way its host has: nobody can tell.
        return not self._file.is_raw and await super().is_fast(offset, length)

    async def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        if self._file.is_raw:
            await self._file.write_zeroes(offset, length, may_unmap=may_unmap)
            if not self._has_backing:
                return
        await super().zero(offset, length, may_unmap=may_unmap)
        if may_unmap:
            await self._give_back(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        if not self._file.is_raw:
            await super().discard(offset, length)
            await self._give_back(offset, length)
        elif self._pass_discard:
            first, end = self._whole(offset, length)
            await self._file.write_zeroes(first, end - first, may_unmap=True)

    async def _give_back(self, offset: int, length: int) -> None:
        """The space of the whole clusters in the range: nothing in them is seen any more."""
        first, end = self._whole(offset, length)
        if first < end and self._pass_discard and not self._file.is_raw:
            await self._file.discard(first, end - first)

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        end = offset + length
        if end < self._guest_writer.disk_bytes:
            end &= ~(self._size - 1)
        return -(-offset // self._size) * self._size, end

    def _discarded(self, word: int) -> int:
        if not word & (OFFSET_MASK | COPIED):
            return word
        return ZERO if self._has_backing else 0
