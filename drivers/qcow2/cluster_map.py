# SPDX-License-Identifier: Apache-2.0
"""Where guest clusters lie: the walk from the L1 table to L2 entries, and what an entry means.

`resolve` answers for a range: what its first bytes are, and for how many bytes the answer is the
same kind at the next place in the file, so that a run of clusters becomes one host read.

An L2 table may be changed only if it is ours alone (COPIED in the L1 entry). `make_writable`
creates a missing one and copies one that a snapshot shares; the copy is complete in the file before
the L1 entry names it (metadata_writer.py).

Context: home thread of the AioContext. Entries of a guest cluster are stable for whoever holds it
in cluster_lock.py. `make_writable`: under the metadata mutex.
"""

from __future__ import annotations

import enum
from array import array
from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
    Layout,
)
from blockemu.drivers.qcow2.metadata_places import Structure
from blockemu.drivers.qcow2.metadata_writer import MetadataWriter, Reference
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES, RootTable
from blockemu.drivers.qcow2.table_cache import Slice, TableCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockemu.drivers.qcow2.damage import DamageLog
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.overlap_check import OverlapCheck
    from blockemu.drivers.qcow2.refcount import Refcounts

COPY_BYTES = 1024 * 1024
"""Bytes of a shared L2 table copied at once."""


class Kind(enum.Enum):
    """What an L2 entry says of its guest cluster."""

    UNALLOCATED = enum.auto()
    ZERO = enum.auto()
    ZERO_ALLOCATED = enum.auto()
    DATA = enum.auto()
    COMPRESSED = enum.auto()


class Extent(NamedTuple):
    """`length` guest bytes of one kind.

    `host`: where the first byte lies (DATA, ZERO_ALLOCATED), or would lie (UNALLOCATED in a cluster
    whose other subclusters do, else 0); the descriptor (COMPRESSED).
    `writable`: our image alone uses these host clusters.
    """

    kind: Kind
    length: int
    host: int = 0
    writable: bool = False


def kind_of(word: int) -> Kind:
    """The kind of an L2 entry."""
    if word & COMPRESSED:
        return Kind.COMPRESSED
    if word & ZERO:
        return Kind.ZERO_ALLOCATED if word & OFFSET_MASK else Kind.ZERO
    return Kind.DATA if word & OFFSET_MASK else Kind.UNALLOCATED


class ClusterMap:
    """The L1 table and the L2 cache as one mapping."""

    def __init__(
        self,
        layout: Layout,
        *,
        file: ImageFile,
        l1: RootTable,
        l2: TableCache,
        refcounts: Refcounts,
        writer: MetadataWriter,
        overlaps: OverlapCheck,
        damage: DamageLog,
    ) -> None:
        self.l1 = l1
        self._overlaps = overlaps
        self._layout = layout
        self._file = file
        self._l2 = l2
        self._refcounts = refcounts
        self._writer = writer
        self._damage = damage
        self._bits = layout.cluster_bits
        self._mask = layout.cluster_size - 1
        self._l2_bits = layout.l2_bits
        self._table_mask = (1 << layout.l2_bits) - 1
        self.slice_entries = l2.slice_bytes // layout.l2_entry_bytes

    # --- looking ---

    async def resolve(self, offset: int, length: int) -> Extent:
        """What the guest bytes from `offset` are: at least one, at most `length`.

        Suspends: for L2 slices that aren't in memory. Raises: OSError (EIO for a damaged entry).
        """
        cluster = offset >> self._bits
        l1_index = cluster >> self._l2_bits
        if not self.l1.words[l1_index]:
            return Extent(Kind.UNALLOCATED, self._absent_length(l1_index, offset, length))
        start = self.slice_offset(cluster)
        found = self._l2.slices.get(start)
        if found is None:
            found = await self._l2.load(start)
        else:
            self._l2.touch(start)
        return self._extent(found, offset, length)

    def peek(self, offset: int, length: int) -> Extent | None:
        """As `resolve` where that needs no waiting, else None. Suspends: never."""
        cluster = offset >> self._bits
        l1_index = cluster >> self._l2_bits
        if not self.l1.words[l1_index]:
            return Extent(Kind.UNALLOCATED, self._absent_length(l1_index, offset, length))
        start = self.slice_offset(cluster)
        found = self._l2.slices.get(start)
        if found is None:
            found = self._l2.load_at_once(start)
            if found is None:
                return None
        else:
            self._l2.touch(start)
        return self._extent(found, offset, length)

    async def load(self, cluster: int) -> Slice:
        """The slice with the entry of a guest cluster whose L2 table exists."""
        return await self._l2.load(self.slice_offset(cluster))

    def cached(self, cluster: int) -> Slice | None:
        """As `load` where that needs no I/O, else None. Suspends: never."""
        return self._l2.cached(self.slice_offset(cluster))

    def has_table(self, cluster: int) -> bool:
        return bool(self.l1.words[cluster >> self._l2_bits])

    def table_end(self, cluster: int) -> int:
        """The first guest cluster that the next L2 table maps."""
        return (cluster | self._table_mask) + 1

    def _absent_length(self, l1_index: int, offset: int, length: int) -> int:
        words, shift = self.l1.words, self._bits + self._l2_bits
        end = offset + length
        l1_index += 1
        while l1_index << shift < end and not words[l1_index]:
            l1_index += 1
        return min(end, l1_index << shift) - offset

    def slice_offset(self, cluster: int) -> int:
        """The host offset of the slice with the entry of a guest cluster whose L2 table exists.

        Raises: OSError (EIO for a damaged L1 entry).
        """
        entry = self.l1.words[cluster >> self._l2_bits]
        table = entry & OFFSET_MASK
        if (
            entry & L1_RESERVED
            or not table
            or table & self._mask
            or (table + self._mask >= self._file.length)
        ):
            index = cluster >> self._l2_bits
            raise self._damage.report(
                f"L1 entry {index} at offset {self.l1.offset + index * ENTRY_BYTES} is {entry:#x},"
                " which names no L2 table inside the file"
            )
        within = cluster & self._table_mask
        return table + within // self.slice_entries * self._l2.slice_bytes

    def _extent(self, found: Slice, offset: int, length: int) -> Extent:
        """Suspends: never."""
        words = found.words
        index = (offset >> self._bits) % self.slice_entries
        word = words[index]
        inside = offset & self._mask
        covered = self._mask + 1 - inside
        if word & COMPRESSED:
            return Extent(Kind.COMPRESSED, min(covered, length), word)
        self._check_standard(found, index, word)
        host = word & OFFSET_MASK
        step = self._mask + 1 if host else 0
        expected = word + step
        size, entries = self._mask + 1, self.slice_entries
        index += 1
        while covered < length and index < entries and words[index] == expected:
            covered += size
            expected += step
            index += 1
        length = min(covered, length)
        if host:
            kind = Kind.ZERO_ALLOCATED if word & ZERO else Kind.DATA
            return Extent(kind, length, host + inside, bool(word & COPIED))
        return Extent(Kind.ZERO if word & ZERO else Kind.UNALLOCATED, length)

    def check_entry(self, found: Slice, index: int) -> int:
        """An entry that may be followed. Raises: OSError(EIO), if it can't be right."""
        word = found.words[index]
        if not word & COMPRESSED:
            self._check_standard(found, index, word)
        return word

    def _check_standard(self, found: Slice, index: int, word: int) -> None:
        host = word & OFFSET_MASK
        if not word & L2_RESERVED and not host & self._mask:
            if word & ZERO:
                if self._layout.version >= 3:
                    return
            elif host < self._file.length:
                return
        raise self._damage.report(
            f"L2 entry at offset {found.offset + index * ENTRY_BYTES} is {word:#x},"
            " which is no valid cluster of this file"
        )

    def entries(self, found: Slice, index: int, count: int) -> Sequence[int]:
        """Entries of a slice as numbers, for `set_entry` to take. Suspends: never."""
        return found.words[index : index + count]

    # --- changing ---

    def writable_slice(self, cluster: int) -> Slice | None:
        """What `make_writable` and `load` lead to, if the L2 table is our own and the slice in
        memory already; else None. Suspends: never. Raises: OSError (EIO for a damaged entry)."""
        entry = self.l1.words[cluster >> self._l2_bits]
        if not entry & COPIED or self._writer.is_stopped:
            return None
        table = (entry & OFFSET_MASK) >> self._bits
        if not self._overlaps.places.is_only(Structure.ACTIVE_L2, table):
            return None
        return self.cached(cluster)

    async def make_writable(self, cluster: int) -> None:
        """Have an L2 table of our own for this guest cluster.

        Suspends: while tables are read, created or copied. Raises: OSError; nothing has changed.
        """
        l1_index = cluster >> self._l2_bits
        entry = self.l1.words[l1_index]
        self._writer.check_running()
        if entry & COPIED:
            table = (entry & OFFSET_MASK) >> self._bits
            await self._overlaps.refuse_table(Structure.ACTIVE_L2, table)
            return
        if entry:
            self.slice_offset(cluster)  # raises for a damaged entry
        place = (self.l1.offset + l1_index * ENTRY_BYTES) >> self._bits
        await self._overlaps.refuse_table(Structure.ACTIVE_L1, place)
        taken = await self._refcounts.allocate(1)
        host = taken.first << self._bits
        try:
            if not taken.is_fresh:
                await self._overlaps.take_place(taken.first)
            if entry:
                await self._copy_table(entry & OFFSET_MASK, host)
            elif not taken.reads_zero:
                await self._file.zero(host, self._mask + 1)
        except BaseException:
            await self._refcounts.release(Reference(taken.first, 1))
            raise
        self.l1.put(l1_index, host | COPIED)
        self._overlaps.places.add(Structure.ACTIVE_L2, taken.first)
        if entry:
            old = (entry & OFFSET_MASK) >> self._bits
            self._writer.let_go(Reference(old, 1, is_table=True))

    async def _copy_table(self, source: int, target: int) -> None:
        if self._l2.is_dirty:
            await self._writer.write_back()  # what is in the file is now all there is
        size = self._mask + 1
        buffer = bytearray(min(size, COPY_BYTES))
        for start in range(0, size, len(buffer)):
            await self._file.read(source + start, memoryview(buffer))
            await self._file.write(target + start, memoryview(buffer))

    def set_entry(self, found: Slice, index: int, word: int, *, discard: bool = False) -> None:
        """Change an L2 entry, and let go of what it named. Suspends: never."""
        old = found.words[index]
        found.words[index] = word
        self._l2.mark_dirty(found, index)
        if (old ^ word) & ~(COPIED | ZERO):
            reference = self.reference(old)
            if reference is not None:
                self._writer.let_go(reference._replace(discard=discard))

    def set_entries(self, found: Slice, index: int, entries: Sequence[int]) -> None:
        """`set_entry` for a run of entries, from `index` on. Suspends: never."""
        end = index + len(entries)
        if any(found.words[index:end]):
            for step, entry in enumerate(entries):
                self.set_entry(found, index + step, entry)
        else:  # nothing to let go of
            found.words[index:end] = array("Q", entries)
            self._l2.mark_dirty(found, index, len(entries))

    def reference(self, word: int) -> Reference | None:
        """The host clusters that an L2 entry counts as one reference each."""
        if word & COMPRESSED:
            host, length = self._layout.compressed_extent(word)
            first = host >> self._bits
            return Reference(first, ((host + length - 1) >> self._bits) - first + 1)
        host = word & OFFSET_MASK
        return Reference(host >> self._bits, 1) if host else None
