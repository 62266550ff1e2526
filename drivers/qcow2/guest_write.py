# SPDX-License-Identifier: Apache-2.0
"""Writing guest bytes: in place where the cluster is ours alone, else into newly taken clusters.

An allocating write takes as many host clusters in a row as it can, writes them whole (what the
request doesn't cover is copied from where the guest sees it now: *copy on write*), and only then
enters them in the L2 table. A crash before that leaves the old contents, and at worst a leak.

What needn't be written isn't: a host cluster that was never used reads as zeroes; if the guest,
too, sees zeroes around the request, the request's own bytes are all that is written.

Context: home thread of the AioContext. The caller holds the clusters (cluster_lock.py): shared for
`write_in_place`, exclusive for `write`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.qcow2.cluster_map import ClusterMap, Extent, Kind, kind_of
from blockemu.drivers.qcow2.layout import COPIED, OFFSET_MASK, Layout, round_up
from blockemu.drivers.qcow2.metadata_writer import MetadataWriter, Reference
from blockemu.loop.sync import Mutex, gather

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    from blockemu.drivers.qcow2.guest_data import GuestData
    from blockemu.drivers.qcow2.guest_read import GuestReader
    from blockemu.drivers.qcow2.refcount import Allocation, Refcounts
    from blockemu.drivers.qcow2.table_cache import Slice
    from blockemu.loop.buffers import BufferPool

WRITES_AT_ONCE = 16
"""Pieces of one request that are written side by side."""

MERGE_BYTES = 256 * 1024
"""A run up to this long is copied together and written at once. In a longer one, only its first
and last cluster are copied; what lies between is written from the request's own buffer."""


class Target(NamedTuple):
    """Host clusters for a run of guest clusters."""

    first: int
    clusters: int
    reads_zero: bool
    taken: bool
    """They were free; else they are those that the guest clusters have already, marked zero."""
    replaces_data: bool
    """Some guest cluster's data lies elsewhere now, where a direct map may point."""


class GuestWriter:
    """Writes what the guest writes. `disk_bytes` is the virtual size, kept by the driver."""

    def __init__(
        self,
        layout: Layout,
        *,
        data: GuestData,
        clusters: ClusterMap,
        refcounts: Refcounts,
        writer: MetadataWriter,
        reader: GuestReader,
        mutex: Mutex,
        buffers: Callable[[], BufferPool],
        disk_bytes: int,
    ) -> None:
        self.disk_bytes = disk_bytes
        self._bits = layout.cluster_bits
        self._size = layout.cluster_size
        self._data = data
        self._clusters = clusters
        self._refcounts = refcounts
        self._writer = writer
        self._reader = reader
        self._mutex = mutex
        self._buffers = buffers

    # --- in place ---

    async def write_in_place(self, offset: int, view: memoryview) -> bool:
        """Write, if every cluster is ours alone already; else do nothing and return False."""
        length = len(view)
        extent = self._clusters.peek(offset, length)
        if extent is None:
            extent = await self._clusters.resolve(offset, length)
        if extent.kind is not Kind.DATA or not extent.writable:
            return False
        if extent.length == length:
            await self._data.write(extent.host, view, offset)
            self._reader.publish(extent, offset)
            return True
        pieces: list[tuple[Extent, int, memoryview]] = []
        done = 0
        while True:
            pieces.append((extent, offset + done, view[done : done + extent.length]))
            done += extent.length
            if done == length:
                break
            extent = await self._clusters.resolve(offset + done, length - done)
            if extent.kind is not Kind.DATA or not extent.writable:
                return False
        for start in range(0, len(pieces), WRITES_AT_ONCE):
            batch = pieces[start : start + WRITES_AT_ONCE]
            await gather(*(self._write_extent(*piece) for piece in batch))
        return True

    async def _write_extent(self, extent: Extent, offset: int, view: memoryview) -> None:
        await self._data.write(extent.host, view, offset)
        self._reader.publish(extent, offset)

    # --- anywhere ---

    async def write(self, offset: int, view: memoryview) -> None:
        """Write, allocating and copying as it takes. Raises: OSError; part may be written then."""
        done = 0
        while done < len(view):
            done += await self._step(offset + done, view[done:])

    async def _step(self, offset: int, view: memoryview) -> int:
        """Write the first run of clusters that can be treated alike. Returns its bytes."""
        extent = self._clusters.peek(offset, len(view))
        if extent is None:
            extent = await self._clusters.resolve(offset, len(view))
        if extent.kind is Kind.DATA and extent.writable:
            await self._write_extent(extent, offset, view[: extent.length])
            return extent.length
        if self._writer.wants_flush:
            await self._writer.flush()
        cluster = offset >> self._bits
        end = (offset + len(view) + self._size - 1) >> self._bits
        target = self._take_at_once(cluster, end - cluster)
        if target is None:
            async with self._mutex:
                target = await self._take(cluster, end - cluster)
        view = view[: ((cluster + target.clusters) << self._bits) - offset]
        try:
            await self._fill(target, offset, view)
            if target.replaces_data and self._reader.direct_map is not None:
                await self._reader.direct_map.invalidate(offset, len(view))
            await self._link(cluster, target)
        except BaseException:
            if target.taken:
                async with self._mutex:
                    await self._refcounts.release(Reference(target.first, target.clusters))
            raise
        return len(view)

    def _take_at_once(self, cluster: int, count: int) -> Target | None:
        """As `_take`, if it needn't wait for anything; else None, and nothing is taken.

        Suspends: never, so it needs the mutex to be free, and not to be held.
        """
        if self._mutex.locked():
            return None
        found = self._clusters.writable_slice(cluster)
        if found is None:
            return None
        run, reused, replaces_data = self._run(found, cluster, count)
        taken = self._refcounts.allocate_at_once(run) if not reused else None
        if taken is None:
            return None
        return self._target(taken, replaces_data=replaces_data)

    async def _take(self, cluster: int, count: int) -> Target:
        """Host clusters for up to `count` guest clusters from `cluster` on."""
        await self._clusters.make_writable(cluster)
        found = await self._clusters.load(cluster)
        run, reused, replaces_data = self._run(found, cluster, count)
        if reused:
            await self._data.cover((reused + run) << self._bits)
            return Target(reused, run, reads_zero=False, taken=False, replaces_data=False)
        taken = await self._refcounts.allocate(run)
        return self._target(taken, replaces_data=replaces_data)

    def _target(self, taken: Allocation, *, replaces_data: bool) -> Target:
        reads_zero = taken.reads_zero and self._data.keeps_zeroes
        return Target(
            taken.first, taken.clusters, reads_zero, taken=True, replaces_data=replaces_data
        )

    def _run(self, found: Slice, cluster: int, count: int) -> tuple[int, int, bool]:
        """How many clusters can share a target, which host cluster they have already (or 0), and
        whether one of them has data. Stays in the slice. Suspends: never."""
        index = cluster % self._clusters.slice_entries
        stop = min(index + count, self._clusters.slice_entries)
        if not any(found.words[index:stop]):
            return stop - index, 0, False
        first = self._clusters.check_entry(found, index)
        reused = self._own_zero_cluster(first)
        replaces_data = kind_of(first) is Kind.DATA
        run = 1
        while index + run < stop:
            word = self._clusters.check_entry(found, index + run)
            own = self._own_zero_cluster(word)
            if reused:
                if own != reused + run:
                    break
            else:
                kind = kind_of(word)
                if own or (kind is Kind.DATA and word & COPIED):
                    break
                replaces_data = replaces_data or kind is Kind.DATA
            run += 1
        return run, reused, replaces_data

    def _own_zero_cluster(self, word: int) -> int:
        if kind_of(word) is Kind.ZERO_ALLOCATED and word & COPIED:
            return (word & OFFSET_MASK) >> self._bits
        return 0

    async def _link(self, cluster: int, target: Target) -> None:
        """Enter the target in the L2 table, all of it without suspending."""
        found = self._clusters.cached(cluster) or await self._clusters.load(cluster)
        host, length = target.first << self._bits, target.clusters << self._bits
        entries = range(host | COPIED, (host | COPIED) + length, self._size)
        self._clusters.set_entries(found, cluster % self._clusters.slice_entries, entries)
        extent = Extent(Kind.DATA, length, host, writable=True)
        self._reader.publish(extent, cluster << self._bits)

    # --- preallocation ---

    async def give_places(
        self, first: int, last: int, prepare: Callable[[Target], Awaitable[None]]
    ) -> None:
        """Give host clusters to those of guest clusters `[first, last)` that have none of their
        own. The caller holds them, and they have no data that anybody wants.

        `prepare` makes a target read as zeroes before an entry names it.
        Suspends: for I/O, and while the writer flushes. Raises: OSError; part may be done then.
        """
        while first < last:
            extent = await self._clusters.resolve(first << self._bits, (last - first) << self._bits)
            if extent.writable:
                first += max(extent.length >> self._bits, 1)
                continue
            if self._writer.wants_flush:
                await self._writer.flush()
            async with self._mutex:
                target = await self._take(first, last - first)
            try:
                await prepare(target)
                await GuestWriter._link(self, first, target)  # subclusters: a place, no more
            except BaseException:
                if target.taken:
                    async with self._mutex:
                        await self._refcounts.release(Reference(target.first, target.clusters))
                raise
            first += target.clusters

    # --- the data ---

    def _fill(self, target: Target, offset: int, view: memoryview) -> Coroutine[Any, Any, None]:
        """Write the target's clusters: the request's bytes, and around them what was there."""
        host, length = target.first << self._bits, target.clusters << self._bits
        head = offset & (self._size - 1)
        tail = length - head - len(view)
        if not head and not tail:
            return self._data.write(host, view, offset)
        return self._fill_around(target, offset, view, head, tail)

    async def _fill_around(
        self, target: Target, offset: int, view: memoryview, head: int, tail: int
    ) -> None:
        host, length = target.first << self._bits, target.clusters << self._bits
        if target.reads_zero and await self._zeroes_around(offset, view, head, tail):
            await self._write_sparsely(host, offset, view, head)
        elif length <= max(MERGE_BYTES, 2 * self._size):
            await self._write_merged(host, offset, view, head, tail)
        else:
            await self._write_parts(host, offset, view, head, tail)

    async def _zeroes_around(self, offset: int, view: memoryview, head: int, tail: int) -> bool:
        end = offset + len(view)
        for start, length in ((offset - head, head), (end, min(tail, self.disk_bytes - end))):
            if length > 0:
                extent = await self._clusters.resolve(start, length)
                if not self._reader.reads_zero(extent, start):
                    return False
        return True

    async def _write_sparsely(self, host: int, offset: int, view: memoryview, head: int) -> None:
        granule = self._data.granule
        start = head // granule * granule
        end = round_up(head + len(view), granule)
        if end - start == len(view):
            await self._data.write(host + head, view, offset)
            return
        buffer = self._buffers().take(end - start)
        try:
            padded = buffer.view[: end - start]
            padded[: head - start] = bytes(head - start)
            padded[head - start : head - start + len(view)] = view
            padded[head - start + len(view) :] = bytes(end - head - len(view))
            await self._data.write(host + start, padded, offset - head + start)
        finally:
            self._buffers().give(buffer)

    async def _write_merged(
        self, host: int, offset: int, view: memoryview, head: int, tail: int
    ) -> None:
        length = head + len(view) + tail
        buffer = self._buffers().take(length)
        try:
            merged = buffer.view[:length]
            await self._read_around(offset - head, merged[:head])
            merged[head : head + len(view)] = view
            await self._read_around(offset + len(view), merged[head + len(view) :])
            await self._data.write(host, merged, offset - head)
        finally:
            self._buffers().give(buffer)

    async def _write_parts(
        self, host: int, offset: int, view: memoryview, head: int, tail: int
    ) -> None:
        """A long run: its ragged ends copied together, its middle from the request's buffer."""
        start = self._size - head if head else 0
        stop = len(view) - (self._size - tail if tail else 0)
        parts = [self._data.write(host + head + start, view[start:stop], offset + start)]
        if head:
            parts.append(self._write_merged(host, offset, view[:start], head, 0))
        if tail:
            last = host + head + stop
            parts.append(self._write_merged(last, offset + stop, view[stop:], 0, tail))
        await gather(*parts)

    async def _read_around(self, offset: int, view: memoryview) -> None:
        """What the guest sees next to its request; zeroes behind the end of the disk."""
        inside = max(min(len(view), self.disk_bytes - offset), 0)
        if inside:
            await self._reader.read(offset, view[:inside])
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)
