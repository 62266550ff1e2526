# SPDX-License-Identifier: Apache-2.0
"""Counts what names each host cluster: everything but the refcounts themselves is walked.

What is counted: the header, the encryption header, the active L1 table, each snapshot's L1 table,
the L2 tables that they name, data and compressed clusters, the snapshot table, the bitmap
directory, tables and data; last the refcount table and its blocks.

A table that several L1 tables share (snapshots do) is read once and counted with a weight, so the
walk costs what the file holds, not what the snapshots multiply it to. That also bounds a hostile
image, together with two rules: L1 and bitmap tables that together are longer than the file lie over
each other and are not followed; of L2 tables that aren't aligned, a few are.

What is found on the way is what an entry shows by itself: offsets that aren't aligned or are past
the end of the file, reserved bits, COPIED on a compressed cluster, more names than a refcount can
count. All else shows when the counts are compared (check.py).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from blockemu.drivers.qcow2.bitmap_directory import TABLE_ENTRIES_MAX
from blockemu.drivers.qcow2.bitmap_table import ENTRY_RESERVED
from blockemu.drivers.qcow2.entry_runs import CHUNK_ENTRIES, EntryReader, runs_of
from blockemu.drivers.qcow2.l2_table import L2Table, read_l2
from blockemu.drivers.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_BYTES_MAX,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFTABLE_RESERVED,
    ZERO,
    div_up,
)
from blockemu.drivers.qcow2.reference_counts import Allowance, ReferenceCounts
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.table_lists import (
    read_bitmaps,
    read_snapshots,
)

if TYPE_CHECKING:
    from array import array

    from blockemu.drivers.qcow2.disk_refcounts import DiskRefcounts
    from blockemu.drivers.qcow2.entry_runs import Run
    from blockemu.drivers.qcow2.findings import Findings
    from blockemu.drivers.qcow2.header import Header
    from blockemu.drivers.qcow2.image_file import ImageFile

UNALIGNED_TABLES_MAX: Final = 32
"""Damaged L1 entries whose table is looked at all the same: what it seems to name isn't free."""

_TABLE_PAGE_BITS = 10
"""L2 tables lie far apart: a page of their counts covers 64 MiB at 64 KiB clusters."""
_NO_LIMIT = 1 << 62


class MetadataWalk:
    """One count of one image. Context: home thread of the file's AioContext."""

    def __init__(
        self,
        name: str,
        header: Header,
        file: ImageFile,
        findings: Findings,
        allowance: Allowance,
    ) -> None:
        self.counts = ReferenceCounts(allowance, count_max=header.layout.refcount_max)
        self.active_tables = self._table_counts(allowance)
        """How often the active L1 table names an L2 table, by host cluster."""
        self.tables = self._table_counts(allowance)
        """The same for all L1 tables together."""
        self.unaligned_tables: dict[int, list[int]] = {}
        """Offset -> both, for L2 tables that aren't where one can be."""
        self.file_clusters = div_up(file.length, header.cluster_size)
        self.unreadable = False
        """A table couldn't be read: what it names isn't counted."""
        self.refused = 0
        """Names that a refcount can't count; where there are any, overlaps can't be told."""
        self.rebuild: str | None = None
        """Why refcounts can't be mended where they are."""
        self.names_past_end = False
        """Something is named that the file doesn't have: it must not grow over that."""
        self.unaligned_zeroes = 0
        """Clusters that aren't where one can be, and hold nothing."""
        self.stray_bitmaps = 0
        """Compressed clusters with a bitmap of subclusters, which they haven't."""
        self.allocated = self.fragmented = self.compressed = 0
        self._name = name
        self._header = header
        self._layout = header.layout
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self._file = file
        self._findings = findings
        self._reader = EntryReader(file)
        self._followed_bytes = 0

    @staticmethod
    def _table_counts(allowance: Allowance) -> ReferenceCounts:
        return ReferenceCounts(allowance, count_max=_NO_LIMIT, page_bits=_TABLE_PAGE_BITS)

    @property
    def end(self) -> int:
        """Behind the last cluster that the file has or something names."""
        return max(self.file_clusters, self.counts.end)

    async def run(self) -> None:
        """Count all but the refcount structures. Raises: ImageError; OSError for a list."""
        header = self._header
        self._refer(0, self._size, "the header")
        if header.crypto_area is not None:
            self._refer(*header.crypto_area, "the encryption header")
        await self._l1_table(
            header.l1_table_offset, header.l1_size, "the L1 table", active=1, weight=1
        )
        await self._snapshots()
        for cluster, weight in self.tables.counted():
            active = self.active_tables.get(cluster)
            await self._l2_table(cluster << self._bits, active=active, weight=weight)
        for offset, (active, weight) in self.unaligned_tables.items():
            await self._l2_table(offset, active=active, weight=weight)
        await self._bitmaps()

    def is_only_table(self, cluster: int) -> bool:
        """Whether an L2 table's cluster is nothing else besides, so that it may be written."""
        return not self.refused and self.counts.get(cluster) == self.tables.get(cluster)

    def is_only_l1(self) -> bool:
        """The same of the active L1 table."""
        first = self._header.l1_table_offset >> self._bits
        clipped = self.counts.clipped(first, div_up(self._header.l1_size * ENTRY_BYTES, self._size))
        return not self.refused and clipped.count(1) == len(clipped)

    # --- counting ---

    def _refer(self, offset: int, length: int, what: str, weight: int = 1) -> bool:
        """Count what lies in these bytes; False where they are past the end of the file.

        The last cluster may be cut short: images are made that way.
        """
        if length <= 0:
            return True
        if offset + length - self._file.length >= self._size:
            self.names_past_end = True
            self._findings.corruption(
                f"{what}: bytes {offset:#x}+{length:#x} are past the end of the file", weight
            )
            return False
        first = offset >> self._bits
        clusters = ((offset + length - 1) >> self._bits) - first + 1
        self._count(first, clusters, what, weight)
        return True

    def _count(self, first: int, clusters: int, what: str, weight: int) -> None:
        refused = self.counts.add(first, clusters, weight)
        if refused:
            self.refused += refused
            self._findings.corruption(
                f"{what}: host clusters {first}+{clusters} are named more often than a refcount "
                f"of {self._layout.refcount_bits} bits can count",
                refused,
            )

    def _to_follow(self, offset: int, entries: int, what: str) -> int:
        """How many entries of a table are in the file, and to be looked at."""
        inside = min(entries, max(self._file.length - offset, 0) // ENTRY_BYTES)
        self._followed_bytes += inside * ENTRY_BYTES
        # Tables that don't lie over each other have room in the file together.
        if self._followed_bytes <= self._file.length:
            return inside
        self._findings.corruption(f"{what}: the table at {offset:#x} lies over others")
        return 0

    async def _read(self, offset: int, entries: int, what: str) -> array[int] | None:
        try:
            return await self._reader.read(offset, entries)
        except OSError as error:
            self._unread(what, offset, error)
            return None

    def _unread(self, what: str, offset: int, error: OSError) -> None:
        reason = error.strerror or str(error)
        self._findings.check_error(f"{what} at {offset:#x} can't be read: {reason}")
        self.unreadable = True

    # --- L1 ---

    async def _snapshots(self) -> None:
        found = await read_snapshots(self._header, self._file, self._findings)
        weights: dict[tuple[int, int], int] = {}
        for table in found.tables:
            what = f"{table.label}: its L1 table"
            if table.offset % self._size:
                self._findings.corruption(f"{what} at {table.offset:#x} is not aligned")
            elif table.entries * ENTRY_BYTES > L1_BYTES_MAX:
                self._findings.corruption(f"{what} has {table.entries} entries: more than 32 MiB")
            else:
                place = table.offset, table.entries
                weights[place] = weights.get(place, 0) + 1
        for (offset, entries), weight in weights.items():
            what = f"the L1 table of a snapshot at {offset:#x}"
            await self._l1_table(offset, entries, what, active=0, weight=weight)
        self._refer(found.offset, found.length, "the snapshot table")

    async def _l1_table(
        self, offset: int, entries: int, what: str, *, active: int, weight: int
    ) -> None:
        self._refer(offset, entries * ENTRY_BYTES, what, weight)
        entries = self._to_follow(offset, entries, what)
        for start in range(0, entries, CHUNK_ENTRIES):
            count = min(CHUNK_ENTRIES, entries - start)
            place = offset + start * ENTRY_BYTES
            words = await self._read(place, count, what)
            if words is not None:
                self._l1_entries(words, place, active=active, weight=weight)

    def _l1_entries(self, words: array[int], table: int, *, active: int, weight: int) -> None:
        """Each value that occurs, once: a table that is named a million times is one of them."""
        odd_bits = L1_RESERVED | (OFFSET_MASK & (self._size - 1))
        for entry, times in Counter(words).items():
            if not entry:
                continue
            cluster = (entry & OFFSET_MASK) >> self._bits
            if entry & odd_bits or not 0 < cluster < self.file_clusters:
                where = "an L1 entry"
                if self._findings.wants_lines:  # else it isn't worth looking for
                    where = f"L1 entry at {table + words.index(entry) * ENTRY_BYTES:#x}"
                if not self._odd_l1_entry(entry, where, active * times, weight * times):
                    continue
            else:
                self._count(cluster, 1, "an L2 table", weight * times)
            self.tables.add(cluster, 1, weight * times)
            if active:
                self.active_tables.add(cluster, 1, active * times)

    def _odd_l1_entry(self, entry: int, where: str, active: int, weight: int) -> bool:
        """Whether the table that it names is to be walked, as one that is aligned."""
        host = entry & OFFSET_MASK
        if entry & L1_RESERVED:
            self._findings.corruption(f"{where} has reserved bits set: {entry:#x}", weight)
        if not host:
            if entry & COPIED:
                self._findings.corruption(f"{where} has flags but names no table", weight)
            return False
        inside = self._refer(host, self._size, where, weight)
        if not host % self._size:
            return inside
        self._findings.corruption(f"{where} names an L2 table at {host:#x}: not aligned", weight)
        known = self.unaligned_tables
        if inside and (host in known or len(known) < UNALIGNED_TABLES_MAX):
            weights = known.setdefault(host, [0, 0])
            weights[0] += active
            weights[1] += weight
        return False

    # --- L2 ---

    async def _l2_table(self, offset: int, *, active: int, weight: int) -> None:
        table = await self._read_l2(offset)
        if table is None:
            return
        self._wrong_bitmaps(table, weight)
        next_host = 0
        for run in runs_of(table.words, self._size):
            host = run.value & OFFSET_MASK
            if run.entries:
                self._data_run(table, run, weight)
                entries = run.entries
            elif run.value & COMPRESSED:
                self._compressed(table, run, weight)
                self.allocated += active
                self.compressed += active
                self.fragmented += active
                continue
            else:
                self._odd_entry(table, run, weight)
                entries = 1 if host else 0
            if entries:
                self.allocated += active * entries
                if next_host and host != next_host:
                    self.fragmented += active
                next_host = host + entries * self._size

    async def _read_l2(self, offset: int) -> L2Table | None:
        try:
            return await read_l2(self._reader, self._layout, offset)
        except OSError as error:
            self._unread("the L2 table", offset, error)
            return None

    def _wrong_bitmaps(self, table: L2Table, weight: int, *, places: int = OFFSET_MASK) -> None:
        for index in table.wrong_bitmaps(places=places):
            assert table.bitmaps is not None
            word = table.words[index]
            what = "a compressed cluster" if word & COMPRESSED else "no host cluster"
            if word & places and not word & COMPRESSED:
                what = "subclusters that are allocated and zero at once"
            self.stray_bitmaps += bool(word & COMPRESSED)
            self._findings.corruption(
                f"{_entry(table, index)} has the bitmap {table.bitmaps[index]:#018x} for {what}",
                weight,
            )

    def _data_run(self, table: L2Table, run: Run, weight: int) -> None:
        first = (run.value & OFFSET_MASK) >> self._bits
        inside = min(max(self.file_clusters - first, 0), run.entries)
        if inside:
            self._count(first, inside, _entry(table, run.at), weight)
        self.names_past_end |= inside < run.entries
        for position in range(inside, run.entries):
            host = (first + position) << self._bits
            self._findings.corruption(
                f"{_entry(table, run.at + position)} names host offset {host:#x}, "
                "past the end of the file",
                weight,
            )

    def _compressed(self, table: L2Table, run: Run, weight: int) -> None:
        where = _entry(table, run.at)
        if run.value & COPIED:
            self._findings.corruption(f"{where} is compressed and has COPIED set", weight)
        _, length = self._layout.compressed_extent(run.value)
        # Offsets of more than 56 bits fit where clusters are small; no file is that long.
        host = run.value & ((1 << (70 - self._bits)) - 1)
        self._refer(host, length, where, weight)

    def _odd_entry(self, table: L2Table, run: Run, weight: int) -> None:
        where = _entry(table, run.at)
        host = run.value & OFFSET_MASK
        if run.value & L2_RESERVED:
            self._findings.corruption(f"{where} has reserved bits set: {run.value:#x}", weight)
        if not host:
            return
        if host % self._size:
            self._findings.corruption(
                f"{where} names host offset {host:#x}: not aligned to a cluster", weight
            )
            self.unaligned_zeroes += self._holds_nothing(table, run)
        self._refer(host, self._size, where, weight)

    def _holds_nothing(self, table: L2Table, run: Run) -> bool:
        """Whether the first cluster of a run reads the same without its place."""
        if self._layout.extended_l2:
            return not table.holds_data(run.at)
        return bool(run.value & ZERO)

    # --- bitmaps ---

    async def _bitmaps(self) -> None:
        found = await read_bitmaps(self._name, self._header, self._file, self._findings)
        if found is None:
            return
        self._refer(found.offset, found.length, "the bitmap directory")
        for table in found.tables:
            await self._bitmap_table(table.offset, table.entries, f"{table.label}: its table")

    async def _bitmap_table(self, offset: int, entries: int, what: str) -> None:
        if offset % self._size or entries > TABLE_ENTRIES_MAX:
            self._findings.corruption(f"{what} ({entries} entries at {offset:#x}) is not possible")
            return
        self._refer(offset, entries * ENTRY_BYTES, what)
        entries = self._to_follow(offset, entries, what)
        for start in range(0, entries, CHUNK_ENTRIES):
            count = min(CHUNK_ENTRIES, entries - start)
            words = await self._read(offset + start * ENTRY_BYTES, count, what)
            for index, entry in enumerate(words or ()):
                host = entry & OFFSET_MASK
                where = f"bitmap table entry at {offset + (start + index) * ENTRY_BYTES:#x}"
                if entry & ENTRY_RESERVED or (host and (host % self._size or entry & 1)):
                    self._findings.corruption(f"{where} is not possible: {entry:#x}")
                elif host:
                    self._refer(host, self._size, where)

    # --- the refcount structures ---

    def count_refcount_structures(self, disk: DiskRefcounts) -> None:
        """Last: a block that anything else names as well is unusable. Suspends: never."""
        header = self._header
        length = header.refcount_table_clusters << self._bits
        refused = self.refused
        if not self._refer(header.refcount_table_offset, length, "the refcount table"):
            self.rebuild = "the refcount table is past the end of the file"
        elif self.refused != refused:
            self.rebuild = "the refcount table lies over something else"
        for index, entry in enumerate(disk.table):
            if entry:
                self._refcount_block(index, entry)
        first = header.refcount_table_offset >> self._bits
        clipped = self.counts.clipped(first, header.refcount_table_clusters)
        if clipped.count(1) != len(clipped):
            self.rebuild = self.rebuild or "the refcount table lies over something else"

    def _refcount_block(self, index: int, entry: int) -> None:
        cluster = entry >> self._bits
        if entry & REFTABLE_RESERVED:
            reason = "has reserved bits set"
        elif entry & (self._size - 1):
            reason = "is not aligned to a cluster"
        elif cluster >= self.end:
            reason = "is past the end of the file"
        else:
            others = self.counts.get(cluster)
            self._count(cluster, 1, "a refcount block", 1)
            if not others:
                return
            reason = f"names a cluster that {others} others name, too"
            if self.counts.get(cluster) == 1:  # said already: it can't be counted
                self.rebuild = self.rebuild or f"refcount table entry {index} {reason}"
                return
        line = f"refcount table entry {index} (block at {entry:#x}) {reason}"
        self._findings.corruption(line)
        self.rebuild = self.rebuild or line


def _entry(table: L2Table, index: int) -> str:
    return f"L2 entry at {table.place(index):#x}"
