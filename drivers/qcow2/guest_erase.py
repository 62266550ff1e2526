# SPDX-License-Identifier: Apache-2.0
"""Write zeroes and discard: changes of the mapping without data.

    entry                 write zeroes      ... with MAY_UNMAP    discard
    unallocated           zero *            zero *                as it is
    data, ours alone      zero, allocated   zero                  zero, or unallocated without
    data, shared          zero              zero                  a backing file
    compressed            zero              zero                  as data
    zero, allocated       as it is +        zero                  as data
    zero                  as it is          as it is              as it is

    * as it is without a backing file: it reads as zeroes already        + if ours alone

Version 2 has no zero flag. Without a backing file, unallocated does the same; with one, zeroes
must be written (ENOTSUP: the node does it) and a discard does nothing, since the guest may have
been told never to see the backing file's bytes there again.

Only whole clusters are treated so. Parts of clusters at the ends are written with zero bytes, or
left alone by a discard. The last cluster of a disk is whole if the request reaches the disk's end.

Context: home thread of the AioContext. The caller holds the clusters exclusive (cluster_lock.py).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockemu.drivers.errors import io_error
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO, Layout, round_up

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.cluster_map import ClusterMap
    from blockemu.drivers.qcow2.guest_read import GuestReader
    from blockemu.drivers.qcow2.guest_write import GuestWriter
    from blockemu.drivers.qcow2.metadata_writer import MetadataWriter
    from blockemu.drivers.qcow2.table_cache import Slice
    from blockemu.loop.sync import Mutex


class GuestEraser:
    """Makes guest ranges read as zeroes, and gives space back."""

    def __init__(
        self,
        layout: Layout,
        *,
        clusters: ClusterMap,
        writer: MetadataWriter,
        reader: GuestReader,
        guest_writer: GuestWriter,
        mutex: Mutex,
    ) -> None:
        self._bits = layout.cluster_bits
        self._size = layout.cluster_size
        self._has_zero_flag = layout.version >= 3
        self._clusters = clusters
        self._writer = writer
        self._reader = reader
        self._guest_writer = guest_writer
        self._mutex = mutex

    @property
    def _unit(self) -> int:
        """Bytes that have a zero flag of their own."""
        return self._size

    @property
    def _has_backing(self) -> bool:
        return self._reader.backing is not None

    @property
    def has_zeroes(self) -> bool:
        """Clusters can be made to read as zeroes without writing zeroes."""
        return self._has_zero_flag or not self._has_backing

    async def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make the range read as zeroes.

        Raises: OSError (ENOTSUP before anything is done, where only written zeroes will do).
        """
        if not self.has_zeroes:
            raise io_error(errno.ENOTSUP, "qcow2 version 2 has no zero clusters")
        end = offset + length
        first = -(-offset // self._size)
        last = end >> self._bits if end < self._guest_writer.disk_bytes else -(-end // self._size)
        if first > last:  # inside one cluster
            await self._write_zero_bytes(offset, end)
            return
        await self._write_zero_bytes(offset, first << self._bits)
        change = self._unmapped_zero if may_unmap else self._kept_zero
        await self._change(first, last, change, discard=may_unmap)
        await self._write_zero_bytes(last << self._bits, end)

    async def is_fast(self, offset: int, length: int) -> bool:
        """Whether `zero` would hardly write: at least half of the range is whole units, whose
        entries change, or all of it reads as zeroes already. Suspends: for metadata."""
        if not self.has_zeroes:
            return False
        unit, end = self._unit, offset + length
        last = end & -unit if end < self._guest_writer.disk_bytes else end
        if last - round_up(offset, unit) >= length // 2:
            return True
        while offset < end:
            extent = await self._clusters.resolve(offset, end - offset)
            if not self._reader.reads_zero(extent, offset):
                return False
            offset += extent.length
        return True

    async def discard(self, offset: int, length: int) -> None:
        """Let go of the whole clusters in the range."""
        if not self.has_zeroes:
            return
        end = offset + length
        first = -(-offset // self._size)
        last = end >> self._bits if end < self._guest_writer.disk_bytes else -(-end // self._size)
        await self._change(first, last, self._discarded, discard=True)

    async def forget(self, first: int, last: int) -> None:
        """Let go of guest clusters `[first, last)` without a trace: what their entries said, zero
        flags included, is gone. For clusters that the disk is about to lose."""
        await self._change(first, last, lambda word: 0, discard=True)

    # --- what becomes of an entry ---

    def _kept_zero(self, word: int) -> int:
        """For a guest that wants its space kept."""
        if word & COPIED and word & OFFSET_MASK and self._has_zero_flag:
            return word | ZERO
        return self._unmapped_zero(word)

    def _unmapped_zero(self, word: int) -> int:
        if not self._has_zero_flag or (not word and not self._has_backing):
            return 0
        return ZERO

    def _discarded(self, word: int) -> int:
        if not word & (OFFSET_MASK | COMPRESSED):
            return word
        return ZERO if self._has_backing else 0

    # --- carrying it out ---

    async def _change(
        self, first: int, last: int, change: Callable[[int], int], *, discard: bool
    ) -> None:
        """Replace the entries of guest clusters `[first, last)` by `change(entry)`."""
        if first >= last:
            return
        if self._reader.direct_map is not None:
            await self._reader.direct_map.invalidate(
                first << self._bits, (last - first) << self._bits
            )
        while first < last:
            if not self._clusters.has_table(first) and not change(0):
                first = self._clusters.table_end(first)
                continue
            first += await self._change_in_slice(first, last, change, discard=discard)

    async def _change_in_slice(
        self, first: int, last: int, change: Callable[[int], int], *, discard: bool
    ) -> int:
        """Returns how many clusters were seen to: up to the end of the slice."""
        entries = self._clusters.slice_entries
        index = first % entries
        count = min(last - first, entries - index)
        if self._clusters.has_table(first):
            found = await self._clusters.load(first)
            if self._changes(found, index, count, change) == 0:
                return count
        if self._writer.wants_flush:
            await self._writer.flush()
        async with self._mutex:
            await self._clusters.make_writable(first)
        found = await self._clusters.load(first)
        for position, old in enumerate(self._clusters.entries(found, index, count), index):
            entry = change(old)
            if entry != old:
                self._clusters.set_entry(found, position, entry, discard=discard)
        return count

    def _changes(self, found: Slice, index: int, count: int, change: Callable[[int], int]) -> int:
        """How many entries `change` would change, all of them being possible ones."""
        changes = 0
        for position, entry in enumerate(self._clusters.entries(found, index, count), index):
            if entry:
                self._clusters.check_entry(found, position)
            changes += change(entry) != entry
        return changes

    async def _write_zero_bytes(self, start: int, end: int) -> None:
        while start < end:
            extent = await self._clusters.resolve(start, end - start)
            if not self._reader.reads_zero(extent, start):
                await self._guest_writer.write(start, memoryview(bytes(extent.length)))
            start += extent.length
