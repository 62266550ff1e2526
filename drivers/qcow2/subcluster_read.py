# SPDX-License-Identifier: Apache-2.0
"""Reading an image with subclusters: as any other, but for what a direct map may be told.

A direct map's page is a guest cluster. One whose 32 subclusters all lie in its host cluster is
published; of another one a hit would read, or write, what isn't the guest's. Pages of a subcluster
would take 32 entries where one does, and disks that are in use soon have their clusters whole. So
those that aren't are left to the node, which knows.

Context: as in guest_read.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from blockemu.drivers.qcow2.cluster_map import Extent, Kind
from blockemu.drivers.qcow2.guest_read import GuestReader

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.subcluster_map import SubclusterMap


class SubclusterReader(GuestReader):
    """As GuestReader; its map is a SubclusterMap."""

    def publish(self, extent: Extent, offset: int) -> None:
        """Enter the clusters of an extent that are whole into the direct map. Suspends: never."""
        if self.direct_map is None or extent.kind is not Kind.DATA:
            return
        clusters = cast("SubclusterMap", self._clusters)
        bits = clusters.cluster_bits
        first, last = offset >> bits, (offset + extent.length - 1) >> bits
        while first <= last and not clusters.is_whole(first):
            first += 1
        end = first
        while end <= last and clusters.is_whole(end):
            end += 1
        if end > first:
            start = max(offset, first << bits)
            stop = min(offset + extent.length, end << bits)
            host = extent.host + start - offset
            super().publish(Extent(Kind.DATA, stop - start, host, extent.writable), start)
