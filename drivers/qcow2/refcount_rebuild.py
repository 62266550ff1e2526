# SPDX-License-Identifier: Apache-2.0
"""Writes all refcounts of an image anew, when the old ones can't be mended in place.

The new table and its blocks go behind the end of the file, in a row: nothing that is there is
written over, be it named or not, so until the header names the new table the image is what it was.
Where entries name places past the end (a file that was cut off), growing over these would make them
name something else; then a gap inside the file is taken, where nothing is named.
They count themselves; the old table and blocks are named by nobody afterwards and count 0. Blocks
are made for ranges where something is counted, no others.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.data_file_walk import DataFileWalk
from blockemu.drivers.qcow2.disk_refcounts import BlockWidth
from blockemu.drivers.qcow2.findings import Findings, say_nothing
from blockemu.drivers.qcow2.layout import HOST_OFFSET_MAX, REFTABLE_BYTES_MAX, div_up
from blockemu.drivers.qcow2.metadata_walk import MetadataWalk
from blockemu.drivers.qcow2.reference_counts import LARGE, Allowance, ReferenceCounts
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.table_cache import disk_bytes

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.check import Examination
    from blockemu.drivers.qcow2.header import Header
    from blockemu.drivers.qcow2.header_file import HeaderFile
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.layout import Layout


SEARCHED_CLUSTERS_MAX = 1 << 24
"""From the start of the file, for a gap: a byte of memory each."""


class Gaps(NamedTuple):
    """What of the file is named, the old refcounts included: a byte a cluster, 0 for no."""

    used: bytes

    @classmethod
    def of(cls, old: Examination) -> Gaps:
        bits = old.header.cluster_bits
        clusters = min(old.file.length >> bits, SEARCHED_CLUSTERS_MAX)
        used = bytearray(old.walk.counts.clipped(0, clusters))
        for entry in old.disk.table:  # the damaged ones, too: they may be half right
            if entry >> bits < clusters:
                used[entry >> bits] = 1
        return cls(bytes(used))


class _Plan(NamedTuple):
    """Where everything goes: the table at cluster `first`, the blocks behind it."""

    first: int
    table_clusters: int
    blocks: array[int]
    """Their indexes in the table, ascending."""

    @property
    def clusters(self) -> int:
        return self.table_clusters + len(self.blocks)


async def rebuild_refcounts(
    name: str,
    header: Header,
    file: ImageFile,
    header_file: HeaderFile,
    gaps: Gaps,
) -> None:
    """New refcounts, durable when this returns.

    Raises: ImageError, OSError.
    """
    walk_class = DataFileWalk if header.has_data_file else MetadataWalk
    walk = walk_class(name, header, file, Findings(say_nothing), Allowance(name))
    await walk.run()
    layout = header.layout
    old_length = file.length
    if walk.names_past_end:
        plan = _plan_in_gap(name, layout, walk.counts, gaps)
    else:
        plan = _plan(name, layout, walk.counts, first=walk.end)
    end = (plan.first + plan.clusters) << layout.cluster_bits
    if end > HOST_OFFSET_MAX:
        raise ImageError(name, "there is no room for new refcounts behind the end of the file")
    walk.counts.add(plan.first, plan.clusters)
    if end > file.length:
        await file.cover(end)
    await _write_blocks(layout, file, walk.counts, plan)
    await file.flush()
    await header_file.move_refcount_table(
        offset=plan.first << layout.cluster_bits, clusters=plan.table_clusters
    )
    await file.trim(max(end, old_length))


def _plan(name: str, layout: Layout, counts: ReferenceCounts, *, first: int) -> _Plan:
    """What it takes at `first`: more blocks may be needed for the place of the new ones."""
    needed = _blocks_in_use(layout, counts)
    table_clusters, blocks = 1, len(needed)
    while True:
        last = first + table_clusters + blocks - 1
        own = range(first >> layout.block_bits, (last >> layout.block_bits) + 1)
        entries = max(needed[-1], own[-1]) + 1
        if entries * ENTRY_BYTES > REFTABLE_BYTES_MAX:
            raise ImageError(name, "the refcount table would take over 8 MiB; the file is too long")
        before, behind = bisect_left(needed, own[0]), bisect_right(needed, own[-1])
        table = div_up(entries * ENTRY_BYTES, layout.cluster_size)
        count = before + len(own) + len(needed) - behind
        if (table, count) == (table_clusters, blocks):
            return _Plan(first, table, needed[:before] + array("Q", own) + needed[behind:])
        table_clusters, blocks = max(table, table_clusters), max(count, blocks)


def _plan_in_gap(name: str, layout: Layout, counts: ReferenceCounts, gaps: Gaps) -> _Plan:
    """The first gap of the file that holds it all. Raises: ImageError."""
    plan = _plan(name, layout, counts, first=0)
    gap = gaps.used.find(bytes(plan.clusters))
    while gap >= 0:
        plan = _plan(name, layout, counts, first=gap)
        fitting = gaps.used.find(bytes(plan.clusters), gap)
        if fitting == gap:
            return plan
        gap = fitting
    raise ImageError(
        name,
        "new refcounts have no room inside the file, and must not go behind its end, "
        "for there are entries that name places there",
    )


def _blocks_in_use(layout: Layout, counts: ReferenceCounts) -> array[int]:
    found = array("Q")
    cluster = counts.next_page(0)
    while cluster is not None and cluster < counts.end:
        index = cluster >> layout.block_bits
        first = index << layout.block_bits
        clipped = counts.clipped(first, layout.block_entries)
        if clipped.count(0) != len(clipped):
            found.append(index)
        cluster = counts.next_page(first + layout.block_entries)
    return found


async def _write_blocks(
    layout: Layout, file: ImageFile, counts: ReferenceCounts, plan: _Plan
) -> None:
    size, width = layout.cluster_size, BlockWidth(layout.refcount_order)
    words = array("Q", bytes(plan.table_clusters * size))
    offset = (plan.first + plan.table_clusters) * size
    for index in plan.blocks:
        first = index << layout.block_bits
        clipped = counts.clipped(first, layout.block_entries)
        data = width.encode(clipped)
        position = clipped.find(LARGE)
        while position >= 0:
            width.set(data, position, counts.get(first + position))
            position = clipped.find(LARGE, position + 1)
        await file.write(offset, memoryview(data))
        words[index] = offset
        offset += size
    await file.write(plan.first * size, disk_bytes(words))
