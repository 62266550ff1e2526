# SPDX-License-Identifier: Apache-2.0
"""Subclusters in an external data file: where data_clusters.py and subclusters.py meet.

A subcluster lies at its guest offset, if its bit says that it is there at all. Guest cluster 0 has
offset 0, so it is COPIED that tells that a cluster has its place.

In a raw data file all bits are set from the start, for the reason that data_file.py gives.

Context: as guest_write.py and guest_erase.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.qcow2.cluster_map import Extent
from blockemu.drivers.qcow2.data_clusters import DataFileEraser, DataFileWriter
from blockemu.drivers.qcow2.guest_write import Target
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from blockemu.drivers.qcow2.subcluster_erase import ZERO_ENTRY, SubclusterEraser
from blockemu.drivers.qcow2.subcluster_map import SubclusterMap
from blockemu.drivers.qcow2.subcluster_write import Area, SubclusterWriter

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.metadata_writer import Reference
    from blockemu.drivers.qcow2.table_cache import Slice


class DataSubclusterMap(SubclusterMap):
    """Each entry maps its cluster to its own place, or doesn't."""

    def _extent(self, found: Slice, offset: int, length: int) -> Extent:
        index = (offset >> self._bits) % self.slice_entries
        word = found.words[index]
        if word & COMPRESSED:
            raise self._damage.report(
                f"L2 entry at offset {found.offset + index * 16} is {word:#x}: compressed, "
                "which a cluster of an external data file can't be"
            )
        guest = offset & ~self._mask
        if self._is_placed(word) and word & OFFSET_MASK != guest:
            raise self._damage.report(
                f"L2 entry at offset {found.offset + index * 16} is {word:#x}, but in an external "
                f"data file the guest's cluster is at {guest:#x}"
            )
        return super()._extent(found, offset, length)

    def _is_placed(self, word: int) -> bool:
        return bool(word & (OFFSET_MASK | COPIED))

    def _is_past_end(self, host: int) -> bool:
        return False  # behind the end of the data file, it reads as zeroes

    def reference(self, word: int) -> Reference | None:
        return None  # the data file's clusters aren't counted


class DataSubclusterWriter(DataFileWriter, SubclusterWriter):
    """Writes the subclusters touched, each in its place."""

    async def _link(self, cluster: int, target: Target) -> None:
        start, length = cluster << self._bits, target.clusters << self._bits
        await self._link_area(cluster, target, Area(start, start + length, start))


class DataSubclusterEraser(DataFileEraser, SubclusterEraser):
    """As DataFileEraser, with zeroes by the subcluster."""

    def _discarded(self, word: int) -> int:
        if not word & (OFFSET_MASK | COPIED):
            return word
        return ZERO_ENTRY if self._has_backing else 0
