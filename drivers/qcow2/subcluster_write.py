# SPDX-License-Identifier: Apache-2.0
"""Writing an image with subclusters: no more is written, or copied, than the subclusters touched.

    cluster                                   what a write does
    subclusters allocated, ours alone         writes in place
    a host cluster of ours, subclusters not   writes the subclusters touched, then sets their bits
    no host cluster                           takes one, writes the subclusters touched
    a host cluster that a snapshot shares     takes one, and moves what is allocated with it
    compressed                                takes one, and moves it whole

Copy on write is by the subcluster: of one that a request covers in part, the rest is copied from
where the guest sees it now. Where data has to move, all between the first and the last subcluster
that is allocated or written moves, so that it is one write.

The bits are set when the data is written, and reach the disk behind it (metadata_writer.py), as a
new cluster's entry does. Until then what lies in the subcluster is nobody's.

Context: as in guest_write.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.qcow2.cluster_map import Extent, Kind
from blockemu.drivers.qcow2.guest_write import MERGE_BYTES, GuestWriter, Target
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, Layout, round_up
from blockemu.drivers.qcow2.metadata_writer import Reference
from blockemu.drivers.qcow2.subclusters import (
    BITMAP_SHIFT,
    SUBCLUSTER_SHIFT,
    allocated,
    allocated_end,
    first_allocated,
    span,
    with_data,
)

if TYPE_CHECKING:
    from typing import Any

    from blockemu.drivers.qcow2.subcluster_map import SubclusterMap
    from blockemu.drivers.qcow2.table_cache import Slice


class Area(NamedTuple):
    """Guest bytes `[start, end)`, whole subclusters, that are written to `host`."""

    start: int
    end: int
    host: int


class SubclusterWriter(GuestWriter):
    """As GuestWriter; its map is a SubclusterMap."""

    def __init__(self, layout: Layout, *, clusters: SubclusterMap, **parts: Any) -> None:
        super().__init__(layout, clusters=clusters, **parts)
        self._subcluster_bits = layout.cluster_bits - SUBCLUSTER_SHIFT
        self._subcluster = 1 << self._subcluster_bits

    async def _step(self, offset: int, view: memoryview) -> int:
        extent = await self._clusters.resolve(offset, len(view))
        if extent.kind is Kind.DATA and extent.writable:
            await self._write_extent(extent, offset, view[: extent.length])
            return extent.length
        if self._writer.wants_flush:
            await self._writer.flush()
        if extent.writable:
            view = view[: extent.length]
            await self._add_subclusters(extent, offset, view)
        else:
            view = await self._write_new(offset, view)
        return len(view)

    # --- into host clusters that are there ---

    async def _add_subclusters(self, extent: Extent, offset: int, view: memoryview) -> None:
        """Write where nothing is allocated yet, all in host clusters of ours."""
        start, end = self._outwards(offset, offset + len(view))
        area = Area(start, end, extent.host - (offset - start))
        async with self._mutex:
            await self._clusters.make_writable(offset >> self._bits)
            await self._data.cover(round_up(area.host + end - start, self._size))
        await self._write_area(area, offset, view, reads_zero=False)
        await self._set_bits(area)
        self._reader.publish(extent._replace(kind=Kind.DATA), offset)

    async def _set_bits(self, area: Area) -> None:
        """The area lies in the host clusters that its entries name. They lie in one slice."""
        found = await self._clusters.load(area.start >> self._bits)
        for cluster, mask in self._masks(area):
            index = cluster % self._clusters.slice_entries
            (entry,) = self._clusters.entries(found, index, 1)
            word, bitmap = entry & (COPIED | OFFSET_MASK), entry >> BITMAP_SHIFT
            entry = word | with_data(bitmap, mask) << BITMAP_SHIFT
            self._clusters.set_entry(found, index, entry)

    # --- into new host clusters ---

    async def _write_new(self, offset: int, view: memoryview) -> memoryview:
        """Returns the part of `view` that was written."""
        cluster = offset >> self._bits
        end = (offset + len(view) + self._size - 1) >> self._bits
        target = self._take_at_once(cluster, end - cluster)
        if target is None:
            async with self._mutex:
                target = await self._take(cluster, end - cluster)
        view = view[: ((cluster + target.clusters) << self._bits) - offset]
        try:
            area = await self._area_to_move(cluster, target, offset, offset + len(view))
            await self._write_area(area, offset, view, reads_zero=target.reads_zero)
            if target.replaces_data and self._reader.direct_map is not None:
                await self._reader.direct_map.invalidate(offset, len(view))
            await self._link_area(cluster, target, area)
        except BaseException:
            if target.taken:
                async with self._mutex:
                    await self._refcounts.release(Reference(target.first, target.clusters))
            raise
        return view

    def _run(self, found: Slice, cluster: int, count: int) -> tuple[int, int, bool]:
        """How many clusters need new host clusters, none that they have, and whether one of them
        has data."""
        index = cluster % self._clusters.slice_entries
        stop = min(index + count, self._clusters.slice_entries)
        run, replaces_data = 0, False
        while index + run < stop:
            entry = self._clusters.check_entry(found, index + run)
            compressed = bool(entry & COMPRESSED)
            if not compressed and entry & OFFSET_MASK and entry & COPIED:
                break
            replaces_data |= not compressed and bool(allocated(entry >> BITMAP_SHIFT))
            run += 1
        assert run, "a host cluster that is ours was taken for another's"
        return run, 0, replaces_data

    async def _area_to_move(self, cluster: int, target: Target, offset: int, end: int) -> Area:
        """What the new host clusters get: the subclusters of the request, and in its first and its
        last cluster those that the old host cluster had."""
        start, stop = self._outwards(offset, end)
        found = await self._clusters.load(cluster)
        index = cluster % self._clusters.slice_entries
        first, last = (
            self._clusters.check_entry(found, place)
            for place in (index, index + target.clusters - 1)
        )
        base = cluster << self._bits
        if first & COMPRESSED:
            start = base
        elif bitmap := allocated(first >> BITMAP_SHIFT):
            start = min(start, base + (first_allocated(bitmap) << self._subcluster_bits))
        base = (cluster + target.clusters - 1) << self._bits
        if last & COMPRESSED:
            stop = base + self._size
        elif bitmap := allocated(last >> BITMAP_SHIFT):
            stop = max(stop, base + (allocated_end(bitmap) << self._subcluster_bits))
        host = (target.first << self._bits) + start - (cluster << self._bits)
        return Area(start, stop, host)

    async def _link_area(self, cluster: int, target: Target, area: Area) -> None:
        """Enter the new host clusters in the L2 table, all of it without suspending."""
        found = await self._clusters.load(cluster)
        for guest, mask in self._masks(area):
            index = guest % self._clusters.slice_entries
            (old,) = self._clusters.entries(found, index, 1)
            bitmap = 0 if old & COMPRESSED else old >> BITMAP_SHIFT
            word = (target.first + guest - cluster) << self._bits | COPIED
            self._clusters.set_entry(found, index, word | with_data(bitmap, mask) << BITMAP_SHIFT)
        extent = Extent(Kind.DATA, area.end - area.start, area.host, writable=True)
        self._reader.publish(extent, area.start)

    # --- the data ---

    def _outwards(self, offset: int, end: int) -> tuple[int, int]:
        """The subclusters that these bytes touch, from and to."""
        return offset & -self._subcluster, round_up(end, self._subcluster)

    def _masks(self, area: Area) -> list[tuple[int, int]]:
        """The area's guest clusters, and which subclusters of each belong to it."""
        found = []
        start = area.start
        while start < area.end:
            cluster = start >> self._bits
            base = cluster << self._bits
            stop = min(area.end, base + self._size)
            first, end = start - base, stop - base
            mask = span(first >> self._subcluster_bits, end >> self._subcluster_bits)
            found.append((cluster, mask))
            start = stop
        return found

    async def _write_area(
        self, area: Area, offset: int, view: memoryview, *, reads_zero: bool
    ) -> None:
        """Write the request's bytes, and around them, to the area's ends, what was there."""
        head, tail = offset - area.start, area.end - offset - len(view)
        if not head and not tail:
            await self._data.write(area.host, view, offset)
        elif reads_zero and await self._zeroes_around(offset, view, head, tail):
            await self._write_sparsely(area.host, offset, view, head)
        elif area.end - area.start <= max(MERGE_BYTES, 2 * self._size):
            await self._write_merged(area.host, offset, view, head, tail)
        else:
            await self._write_parts(area.host, offset, view, head, tail)

    async def _zeroes_around(self, offset: int, view: memoryview, head: int, tail: int) -> bool:
        end = offset + len(view)
        for start, stop in ((offset - head, offset), (end, min(end + tail, self.disk_bytes))):
            while start < stop:
                extent = await self._clusters.resolve(start, stop - start)
                if not self._reader.reads_zero(extent, start):
                    return False
                start += extent.length
        return True
