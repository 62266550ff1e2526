# SPDX-License-Identifier: Apache-2.0
"""Host clusters: which are free, taking them, and giving them back.

A refcount block is created the first time that space in its range is wanted, in the first free
cluster of that range, so that it counts itself. When the refcount table can't name one more block,
the table moves to the end of the file, half as large again.

What is needed for tables is never taken, whatever the counts say, and an image whose counts say
that is marked corrupt (overlap_check.py).

Three rules keep the on-disk state safe, together with metadata_writer.py:
- a cluster that is taken is counted before anything names it (phase order);
- a cluster that is let go is counted down only when no entry on disk can name it any more
  (`MetadataWriter.released`, applied here before the next search);
- a new block or table is complete on disk before it is named.

Context: home thread of the AioContext. All methods that change anything: under the metadata mutex.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.qcow2.layout import (
    HOST_OFFSET_MAX,
    REFTABLE_BYTES_MAX,
    REFTABLE_RESERVED,
    Layout,
    div_up,
)
from blockemu.drivers.qcow2.metadata_places import Structure
from blockemu.drivers.qcow2.metadata_writer import MetadataWriter, Reference
from blockemu.drivers.qcow2.overlap_check import AS_FREE, BY_L2_ENTRY, OverlapCheck
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES, RootTable
from blockemu.drivers.qcow2.table_cache import Slice, TableCache, disk_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from blockemu.drivers.qcow2.corrupt_mark import CorruptMark
    from blockemu.drivers.qcow2.damage import DamageLog
    from blockemu.drivers.qcow2.header_file import HeaderFile
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.refcount_width import RefcountWidth


class Allocation(NamedTuple):
    """Contiguous host clusters that count 1 now. `reads_zero`: nothing was ever written there.
    `is_fresh`: they were never in use, for all we know."""

    first: int
    clusters: int
    reads_zero: bool
    is_fresh: bool


class _Runs:
    """Many references to one cluster each, neighbours together: 16 bytes for each run."""

    def __init__(self) -> None:
        self._firsts = array("Q")
        self._rest = array("Q")

    def append(self, reference: Reference, cluster: int) -> None:
        flags = reference.is_table << 1 | reference.discard
        if self._firsts:
            first, rest = self._firsts[-1], self._rest[-1]
            if rest & 3 == flags and first + (rest >> 2) == cluster:
                self._rest[-1] = rest + 4
                return
        self._firsts.append(cluster)
        self._rest.append(4 | flags)

    def __iter__(self) -> Iterator[Reference]:
        for first, rest in zip(self._firsts, self._rest, strict=True):
            yield Reference(first, rest >> 2, is_table=bool(rest & 2), discard=bool(rest & 1))


class Refcounts:
    """The refcount tree of one image."""

    def __init__(
        self,
        layout: Layout,
        *,
        file: ImageFile,
        cache: TableCache,
        table: RootTable,
        width: RefcountWidth,
        writer: MetadataWriter,
        header: HeaderFile,
        damage: DamageLog,
        mark: CorruptMark,
        overlaps: OverlapCheck,
        pass_discard: bool,
    ) -> None:
        self._layout = layout
        self._file = file
        self._cache = cache
        self._table = table
        self._width = width
        self._writer = writer
        self._header = header
        self._damage = damage
        self._corrupt_mark = mark
        self._pass_discard = pass_discard
        self._emptied: list[int] = []
        self._postponed: _Runs | None = None
        self._overlaps = overlaps
        self._slice_entries = width.entries(cache.slice_bytes)
        self._first = 0 if overlaps.places.has(Structure.MAIN_HEADER) else 1
        self._search_from = self._first
        """No cluster before this one is free. The first, the header's, is never handed out: to an
        entry, offset 0 is nowhere."""
        self.on_freed: Callable[[int], object] = lambda cluster: None
        """Told of each host cluster whose count has become 0."""
        self.used_end = div_up(file.length, layout.cluster_size)
        """Behind the last cluster that was ever in use, or may have been."""

    # --- looking ---

    async def get(self, cluster: int) -> int:
        """The reference count of a host cluster. Raises: OSError (EIO for a damaged table)."""
        if cluster >> self._layout.block_bits >= len(self._table):
            return 0
        found = await self._load(cluster)
        if found is None:
            return 0
        return self._width.get(found.words, cluster % self._slice_entries)

    async def has_used(self, count: int, *, before: int) -> bool:
        """Whether at least `count` of the host clusters before `before` are counted.

        Raises: OSError (EIO for a damaged table).
        """
        cluster = used = 0
        while cluster < before and used < count:
            if cluster >> self._layout.block_bits >= len(self._table):
                break
            found = await self._load(cluster)
            if found is None:
                cluster = (cluster | (self._layout.block_entries - 1)) + 1
                continue
            entries = min(self._slice_entries, before - cluster)
            used += self._width.count_used(found.words, entries)
            cluster += entries
        return used >= count

    async def _load(self, cluster: int) -> Slice | None:
        """The slice that counts `cluster`; None where its block doesn't exist."""
        place = self._slice_place(cluster)
        return None if place is None else await self._cache.load(place)

    def _slice_place(self, cluster: int) -> int | None:
        """The host offset of the slice that counts `cluster`; None where its block doesn't exist.

        Raises: OSError(EIO) for a damaged entry.
        """
        block = cluster >> self._layout.block_bits
        host = self._table.words[block]
        if not host:
            return None
        mask = self._layout.cluster_size - 1
        if host & (REFTABLE_RESERVED | mask) or host + mask >= self._file.length:
            raise self._damage.report(
                f"refcount table entry {block} at offset {self._table.offset + block * ENTRY_BYTES}"
                f" is {host:#x}, which is no cluster of the file"
            )
        return host + self._slice_start(cluster)

    def _slice_start(self, cluster: int) -> int:
        """Where in its block the slice that counts `cluster` begins."""
        within = cluster & (self._layout.block_entries - 1)
        return within // self._slice_entries * self._cache.slice_bytes

    # --- taking ---

    async def allocate(self, count_max: int) -> Allocation:
        """Take the first free cluster, and as many behind it as are free, up to `count_max`.

        Suspends: for tables to be read, created or written back.
        Raises: OSError (ENOSPC, EIO); nothing is taken then.
        """
        at_once = self.allocate_at_once(count_max)
        if at_once is not None:
            return at_once
        await self.apply_released()
        cluster = self._search_from
        while True:
            cluster, found = await self._next_free(cluster)
            first = cluster % self._slice_entries
            stop = min(first + count_max, self._slice_entries)
            count = self._width.free_run(found.words, first, stop)
            end = (cluster + count) << self._layout.cluster_bits
            if end <= self._file.length:
                break
            await self._cover(end)  # suspends: `found` must be looked up again
        await self._refuse_change(cluster)
        await self._overlaps.refuse(cluster, count, AS_FREE)
        return self._take_first(found, cluster, count)

    def allocate_at_once(self, count_max: int) -> Allocation | None:
        """As `allocate`, if all it needs is in memory and in order; else None, and nothing is
        taken. Suspends: never. Raises: OSError(EIO)."""
        cluster = self._search_from
        if self._writer.released or self._emptied:
            return None
        if cluster >> self._layout.block_bits >= len(self._table):
            return None
        place = self._slice_place(cluster)
        found = self._cache.cached(place) if place is not None else None
        if found is None:
            return None
        first = cluster % self._slice_entries
        free = self._width.find_free(found.words, first, self._slice_entries)
        if free < 0:
            return None
        cluster += free - first
        stop = min(free + count_max, self._slice_entries)
        count = self._width.free_run(found.words, free, stop)
        if (cluster + count) << self._layout.cluster_bits > self._file.length:
            return None
        if not self._is_in_order(cluster, count):
            return None
        return self._take_first(found, cluster, count)

    def _is_in_order(self, cluster: int, count: int) -> bool:
        """Neither clusters to be taken nor the block that counts them clash with metadata."""
        places, bits = self._overlaps.places, self._layout.cluster_bits
        block = self._table.words[cluster >> self._layout.block_bits] >> bits
        return places.first_in(cluster, count) is None and places.is_only(
            Structure.REFCOUNT_BLOCK, block
        )

    def _take_first(self, found: Slice, cluster: int, count: int) -> Allocation:
        """Count 1 for the first free clusters there are. Suspends: never."""
        first = cluster % self._slice_entries
        self._width.set_ones(found.words, first, count)
        self._mark(found, first, count)
        self._search_from = cluster + count
        return self._allocation(cluster, count)

    async def allocate_contiguous(self, count: int) -> Allocation:
        """Take exactly `count` clusters in a row, for a table. Raises: OSError."""
        await self.apply_released()
        cluster, run = self._search_from, 0
        while run < count:
            free, found = await self._next_free(cluster)
            if free != cluster:
                cluster, run = free, 0
            first = cluster % self._slice_entries
            stop = min(first + count - run, self._slice_entries)
            length = self._width.free_run(found.words, first, stop)
            run += length
            cluster += length
        first = cluster - run
        await self._overlaps.refuse(first, count, AS_FREE)
        await self._cover(cluster << self._layout.cluster_bits)
        await self._add(Reference(first, count), 1)
        return self._allocation(first, count)

    async def share_one(self, cluster: int) -> bool:
        """Count one more reference to a cluster in use. False, if its count is at its limit.

        Suspends: for the table to be read. Raises: OSError; nothing is counted then.
        """
        if await self.get(cluster) >= self._layout.refcount_max:
            return False
        await self._add(Reference(cluster, 1), 1)
        return True

    async def _refuse_change(self, cluster: int) -> None:
        """A count is about to be changed. Suspends: only if its block is no block, to mark the
        image. Raises: OSError(EIO) then."""
        host = self._table.words[cluster >> self._layout.block_bits]
        await self._overlaps.refuse_table(
            Structure.REFCOUNT_BLOCK, host >> self._layout.cluster_bits
        )

    def _allocation(self, first: int, count: int) -> Allocation:
        is_fresh = first >= self.used_end
        return Allocation(first, count, self._take(first, count), is_fresh)

    def _take(self, first: int, count: int) -> bool:
        fresh = first >= self.used_end
        self.used_end = max(self.used_end, first + count)
        return fresh and self._file.sparse

    async def _cover(self, end: int) -> None:
        if end > HOST_OFFSET_MAX:
            raise io_error(errno.ENOSPC, f"{self._file.name}: no host offset left in the format")
        await self._file.cover(end)

    async def _next_free(self, cluster: int) -> tuple[int, Slice]:
        """The first free cluster from `cluster` on, with the slice that counts it."""
        while True:
            block = cluster >> self._layout.block_bits
            if block >= len(self._table):
                await self._grow_table(cluster)
                cluster = min(cluster, self._search_from)  # the old table's place is free now
                continue
            found = await self._load(cluster)
            if found is None:
                await self._new_block(block, cluster)
                cluster += 1
                continue
            first = cluster % self._slice_entries
            index = self._width.find_free(found.words, first, self._slice_entries)
            if index >= 0:
                return cluster - first + index, found
            cluster += self._slice_entries - first

    async def _new_block(self, block: int, cluster: int) -> None:
        """Create a refcount block in `cluster`, the first free one of its range."""
        size = self._layout.cluster_size
        host = cluster << self._layout.cluster_bits
        await self._overlaps.refuse(cluster, 1, AS_FREE)
        entry = self._table.offset + block * ENTRY_BYTES
        await self._overlaps.refuse_table(
            Structure.REFCOUNT_TABLE, entry >> self._layout.cluster_bits
        )
        if cluster < self.used_end:
            await self._overlaps.take_place(cluster)
        await self._cover(host + size)
        if not self._take(cluster, 1):
            await self._file.zero(host, size)
        found = await self._cache.insert_zeroed(host + self._slice_start(cluster))
        # From here on without suspending: a write-back sees all of it or nothing.
        self._table.put(block, host)
        self._overlaps.places.add(Structure.REFCOUNT_BLOCK, cluster)
        index = cluster % self._slice_entries
        self._width.set_ones(found.words, index, 1)
        self._mark(found, index, 1)

    def _mark(self, found: Slice, first: int, count: int) -> None:
        low, high = self._width.word(first), self._width.word(first + count - 1)
        self._cache.mark_dirty(found, low, high - low + 1)

    # --- sharing ---

    async def share(self, reference: Reference) -> None:
        """Count one more reference to clusters that are in use, to all of them or to none.

        Suspends: for refcount blocks. Raises: ImageError, if a count is at its limit; OSError.
        """
        done = 0
        try:
            while done < reference.clusters:
                done += await self._share_some(reference.first + done, reference.clusters - done)
        except BaseException:
            if done:
                await self.release(reference._replace(clusters=done))
            raise

    async def _share_some(self, cluster: int, count: int) -> int:
        """Those of a run that its first slice counts. Returns how many they are."""
        found = await self._load_counted(cluster)
        await self._refuse_change(cluster)
        first = cluster % self._slice_entries
        stop = min(first + count, self._slice_entries)
        common = self._width.common(found.words, first, stop)
        if common is not None:
            self._check_shareable(cluster, common)
            self._width.fill(found.words, first, stop, common + 1)
        else:
            counts = [self._width.get(found.words, index) for index in range(first, stop)]
            for step, value in enumerate(counts):
                self._check_shareable(cluster + step, value)
            for step, value in enumerate(counts):
                self._width.set(found.words, first + step, value + 1)
        self._mark(found, first, stop - first)
        return stop - first

    def _check_shareable(self, cluster: int, count: int) -> None:
        if not count:
            raise self._damage.report(f"host cluster {cluster} is in use but counted as free")
        if count >= self._layout.refcount_max:
            raise ImageError(
                self._file.name,
                f"host cluster {cluster} has {count} references already, the most that"
                f" refcount_bits={self._layout.refcount_bits} can count",
            )

    async def own(self, first: int, count: int) -> Collection[int]:
        """Which clusters of a run have one reference, by their place in the run.

        Suspends: for refcount blocks. Raises: OSError.
        """
        own: list[int] = []
        done = 0
        while done < count:
            found = await self._load_counted(first + done)
            low = (first + done) % self._slice_entries
            high = min(low + count - done, self._slice_entries)
            common = self._width.common(found.words, low, high)
            if common == 1 and high - low == count:
                return range(count)
            if common in (None, 1):
                get, words = self._width.get, found.words
                own += [done + at - low for at in range(low, high) if get(words, at) == 1]
            done += high - low
        return own

    async def _load_counted(self, cluster: int) -> Slice:
        """The slice that counts a cluster in use. Raises: OSError(EIO), if there is none."""
        if cluster >> self._layout.block_bits >= len(self._table):
            raise self._damage.report(f"host cluster {cluster} is beyond the refcount table")
        found = await self._load(cluster)
        if found is None:
            raise self._damage.report(f"host cluster {cluster} has no refcount block")
        return found

    def metadata_places(self) -> array[int]:
        """The host clusters of the tables, ascending, but for the L1 tables of snapshots."""
        return self._overlaps.places.without_snapshots()

    # --- giving back ---

    def start_postponing(self) -> None:
        """From now on what would become free stays taken: the image on the disk uses it still, and
        these counts aren't its counts (shadow_tables.py). Nor does the header name a new table."""
        self._postponed = _Runs()

    def stop_postponing(self) -> Iterator[Reference]:
        """What would have become free meanwhile; it has one reference still."""
        postponed, self._postponed = self._postponed, None
        self._search_from = self._first
        return iter(postponed or ())

    async def release(self, reference: Reference) -> None:
        """Count down at once: for clusters that no entry names, in memory or on disk.

        Never fails: what can't be counted down is leaked, and logged. In an image that is marked
        corrupt, all stays taken.
        """
        if self._corrupt_mark.is_set:
            return
        try:
            await self._add(reference, -1)
        except OSError as error:
            run = f"{reference.first}+{reference.clusters}"
            self._damage.report(f"host clusters {run} leak: {error}")

    async def apply_released(self) -> None:
        """Count down all that a flush has released since the last time.

        What the guest discarded is handed back to the host first, while nobody can take it.
        """
        released = self._writer.released
        while released and not self._corrupt_mark.is_set:
            await self.release(released.pop())
        if self._emptied and not self._corrupt_mark.is_set:
            emptied, self._emptied = sorted(self._emptied), []
            await self._discard(emptied)

    async def _discard(self, clusters: list[int]) -> None:
        bits = self._layout.cluster_bits
        first = last = clusters[0]
        for cluster in [*clusters[1:], -1]:
            if cluster == last + 1:
                last = cluster
                continue
            await self._file.discard(first << bits, (last + 1 - first) << bits)
            first = last = cluster

    async def _add(self, reference: Reference, delta: int) -> None:
        cluster, end = reference.first, reference.first + reference.clusters
        if delta < 0 and not reference.is_table:
            await self._overlaps.refuse(cluster, reference.clusters, BY_L2_ENTRY)
        postponed = self._postponed if delta < 0 else None
        while cluster < end:
            found = await self._load_counted(cluster)
            await self._refuse_change(cluster)
            first = cluster % self._slice_entries
            stop = min(first + end - cluster, self._slice_entries)
            common = None
            if delta < 0 and stop - first > 1:
                common = self._width.common(found.words, first, stop)
            if common is not None and common > 1:  # all at once, and none becomes free
                self._width.fill(found.words, first, stop, common + delta)
                self._mark(found, first, stop - first)
                cluster += stop - first
                continue
            for index in range(first, stop):
                if postponed is not None and self._width.get(found.words, index) == 1:
                    postponed.append(reference, cluster - first + index)
                    continue
                count = self._add_one(found, index, cluster - first + index, delta)
                if not count and reference.discard and self._pass_discard:
                    self._emptied.append(cluster - first + index)
            self._mark(found, first, stop - first)
            cluster += stop - first
        if delta < 0 and reference.is_table:
            await self._forget_table(reference)

    def _add_one(self, found: Slice, index: int, cluster: int, delta: int) -> int:
        count = self._width.get(found.words, index) + delta
        if count < 0 or count > self._layout.refcount_max:
            raise self._damage.report(f"refcount of host cluster {cluster} would become {count}")
        self._width.set(found.words, index, count)
        if not count:
            self._search_from = max(min(self._search_from, cluster), self._first)
            self.on_freed(cluster)
        return count

    async def _forget_table(self, reference: Reference) -> None:
        """Tables that are no longer in use by anybody: drop their cached slices, free the place."""
        size = self._layout.cluster_size
        for cluster in range(reference.first, reference.first + reference.clusters):
            if not await self.get(cluster):
                self._writer.l2.drop(cluster * size, size)
                self._overlaps.places.remove(cluster)

    # --- a larger refcount table ---

    async def _grow_table(self, cluster: int) -> None:
        """Move the refcount table to `cluster` and behind, where no block counts yet.

        The new blocks come first, then the table; they count themselves and it. Everything is
        durable before the header names the new table, and the old one is free after that.
        """
        blocks, words = self._plan_table(cluster)
        size, bits = self._layout.cluster_size, self._layout.cluster_bits
        table_clusters = len(words) * ENTRY_BYTES // size
        total = blocks + table_clusters
        await self._overlaps.refuse(cluster, total, AS_FREE)
        await self._writer.flush()  # the old table has no dirty entries from here on
        host = cluster << bits
        await self._cover(host + total * size)
        if not self._take(cluster, total):
            await self._file.zero(host, total * size)
        old = self._table.words
        self._table.words = words
        try:
            await self._add(Reference(cluster, total), 1)
            await self._writer.flush()
            offset = host + blocks * size
            await self._file.write(offset, disk_bytes(words))
            await self._file.flush()
        except BaseException:
            self._table.words = old
            self._cache.drop(host, blocks * size)
            raise
        old_clusters = len(old) * ENTRY_BYTES // size
        freed = Reference(self._table.offset >> bits, old_clusters, is_table=True)
        try:
            if self._postponed is None:
                await self._header.move_refcount_table(offset=offset, clusters=table_clusters)
        except BaseException:
            self._writer.stop("the refcount table's new place may not be in the header")
            raise
        self._table.replace(words, offset=offset)
        await self.release(freed)

    def _plan_table(self, cluster: int) -> tuple[int, array[int]]:
        """How many new blocks it takes, and the new table's entries, whole clusters of them."""
        layout = self._layout
        first_block = cluster >> layout.block_bits
        blocks, wanted = 0, 1
        entries = 0
        while blocks != wanted:
            blocks = wanted
            entries = max(len(self._table) * 3 // 2, first_block + blocks)
            table_clusters = div_up(entries * ENTRY_BYTES, layout.cluster_size)
            entries = table_clusters * layout.cluster_size // ENTRY_BYTES
            last = cluster + blocks + table_clusters - 1
            wanted = max((last >> layout.block_bits) - first_block + 1, blocks)
        if entries * ENTRY_BYTES > REFTABLE_BYTES_MAX:
            raise io_error(errno.ENOSPC, f"{self._file.name}: the refcount table is at its limit")
        words = self._table.words + array("Q", bytes((entries - len(self._table)) * ENTRY_BYTES))
        for block in range(blocks):
            words[first_block + block] = (cluster + block) << layout.cluster_bits
        return blocks, words
