# SPDX-License-Identifier: Apache-2.0
"""Reading guest bytes: from the image, its backing file, compressed clusters, or nothing at all.

Runs of clusters that lie together in the file are one host read. A request that falls to pieces has
them read side by side, a bounded number at a time.

What was found plain on the way, data that lies in the file as the guest sees it, is *published* in
the direct map (direct_map.py), so that the next request for it needn't come here.

Context: home thread of the AioContext. The caller holds the clusters (cluster_lock.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.node import NESTED_IMAGES_MAX
from blockemu.drivers.qcow2.cluster_lock import ClusterLocks
from blockemu.drivers.qcow2.cluster_map import ClusterMap, Extent, Kind
from blockemu.loop.coroutine import run_on_fresh_stack
from blockemu.loop.sync import gather

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.direct_map import DirectMap
    from blockemu.drivers.qcow2.compression import Decompressor
    from blockemu.drivers.qcow2.damage import DamageLog
    from blockemu.drivers.qcow2.guest_data import GuestData
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.layout import Layout
    from blockemu.drivers.qcow2.shown_slices import ShownSlices

READS_AT_ONCE = 16
"""Pieces of one request that are read side by side."""

PUBLISH_MAX = 256
"""Clusters published for one request: keeps a huge one from filling the map by itself."""


HOST_CLUSTERS_MAX = 1 << 55
"""More than any file has."""


class GuestReader:
    """Reads what the guest would see. `direct_map` is set while there is one."""

    def __init__(
        self,
        layout: Layout,
        *,
        file: ImageFile,
        data: GuestData,
        clusters: ClusterMap,
        backing: BdrvChild | None,
        decompress: Decompressor,
        damage: DamageLog,
    ) -> None:
        self.backing = backing
        self.direct_map: DirectMap | None = None
        self.maps_writes = False
        """The direct map may take writes, where a cluster may be written in place."""
        self.locks = ClusterLocks()
        """Which guest clusters are being changed."""
        self.shown: ShownSlices | None = None
        """What of the L2 cache native code may read by itself; None where it may not."""
        self.used_end: Callable[[], int] = lambda: HOST_CLUSTERS_MAX
        """Behind the last host cluster that was ever in use."""
        self._layout = layout
        self._mask = layout.cluster_size - 1
        self._file = file
        self._data = data
        self._clusters = clusters
        self._decompress = decompress
        self._damage = damage
        self._unpacked: tuple[int, bytes] | None = None
        """The last compressed cluster: a guest reads one in several requests."""

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the guest bytes from `offset`, all inside the disk. Raises: OSError."""
        length = len(view)
        extent = self._clusters.peek(offset, length)
        if extent is None:
            extent = await self._clusters.resolve(offset, length)
        if extent.length == length:
            if extent.kind is Kind.DATA:
                await self._data.read(extent.host, view, offset)
                self.publish(extent, offset)
                if self.shown is not None and self.direct_map is not None:
                    self.shown.show(self.direct_map, offset)
            else:
                await self._read_extent(extent, offset, view)
            return
        pieces: list[tuple[Extent, int, memoryview]] = []
        done = 0
        while True:
            pieces.append((extent, offset + done, view[done : done + extent.length]))
            done += extent.length
            if done == length:
                break
            extent = await self._clusters.resolve(offset + done, length - done)
        for start in range(0, len(pieces), READS_AT_ONCE):
            batch = pieces[start : start + READS_AT_ONCE]
            await gather(*(self._read_extent(*piece) for piece in batch))

    def fill(self, offset: int, length: int) -> None:
        """Publish the first run of clusters of a range, if it is plain data that nobody is about to
        change, and finding that out takes no waiting. Suspends: never."""
        direct_map, bits = self.direct_map, self._layout.cluster_bits
        if direct_map is None:
            return
        if self.locks.may_change(offset >> bits, (offset + length - 1) >> bits):
            return
        try:
            extent = self._clusters.peek(offset, length)
        except OSError:
            return  # the request that goes the long way will say it
        if extent is not None and extent.kind is Kind.DATA:
            self.publish(extent, offset)
            if self.shown is not None:
                self.shown.show(direct_map, offset)

    def reads_zero(self, extent: Extent, offset: int) -> bool:
        """Whether all guest bytes of `extent`, from `offset` on, are known to be zeroes."""
        if extent.kind is Kind.UNALLOCATED:
            return self.backing is None or offset >= self.backing.length_bytes
        return extent.kind in (Kind.ZERO, Kind.ZERO_ALLOCATED)

    def publish(self, extent: Extent, offset: int) -> None:
        """Enter the plain clusters of an extent into the direct map. Suspends: never."""
        if self.direct_map is None or extent.kind is not Kind.DATA:
            return
        size = self._mask + 1
        inside = offset & self._mask
        guest, host = offset - inside, extent.host - inside
        end = min(offset + extent.length, guest + PUBLISH_MAX * size)
        writable = (
            extent.writable
            and self.maps_writes
            and self._data.takes_writes(host, min(extent.length + inside, PUBLISH_MAX * size))
        )
        publish = self.direct_map.publish
        host_end = self.host_end
        while guest < end and host + size <= host_end:
            publish(guest, host, writable=writable)
            guest += size
            host += size

    @property
    def host_end(self) -> int:
        """Behind the last byte of the file that a direct map may lead to: only what was ever in
        use, since what will be used next is no guest's yet (overlap_check.py)."""
        return min(self._data.length, self.used_end() << self._layout.cluster_bits)

    def is_mapped(self, host: int, length: int) -> bool:
        """Whether the direct map leads into this host range. Slow; suspends: never."""
        return self.direct_map is not None and self.direct_map.leads_into(host, length)

    def forget_unpacked(self) -> None:
        """Where compressed clusters have been there may be something else from now on."""
        self._unpacked = None

    async def _read_extent(self, extent: Extent, offset: int, view: memoryview) -> None:
        kind = extent.kind
        if kind is Kind.DATA:
            await self._data.read(extent.host, view, offset)
            self.publish(extent, offset)
        elif kind is Kind.COMPRESSED:
            cluster = await self._unpack(extent.host)
            inside = offset & self._mask
            view[:] = cluster[inside : inside + len(view)]
        elif kind is Kind.UNALLOCATED and self.backing is not None:
            await self._read_backing(self.backing, offset, view)
        else:
            view[:] = bytes(len(view))

    async def _read_backing(self, backing: BdrvChild, offset: int, view: memoryview) -> None:
        inside = max(min(len(view), backing.length_bytes - offset), 0)
        if inside and (backing.node.backing_depth + 1) % NESTED_IMAGES_MAX:
            await backing.preadv(offset, view[:inside])
        elif inside:
            await run_on_fresh_stack(lambda: backing.preadv(offset, view[:inside]))
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)

    async def _unpack(self, descriptor: int) -> bytes:
        unpacked = self._unpacked
        if unpacked is not None and unpacked[0] == descriptor:
            return unpacked[1]
        host, length = self._layout.compressed_extent(descriptor)
        if host >= self._file.length:
            raise self._damage.report(f"compressed cluster at {host:#x} lies past the file's end")
        data = bytearray(min(length, self._file.length - host))
        await self._file.read(host, memoryview(data))
        try:
            cluster = self._decompress(bytes(data), self._mask + 1)
        except ValueError as error:
            raise self._damage.report(
                f"compressed cluster at {host:#x} can't be unpacked: {error}"
            ) from None
        self._unpacked = (descriptor, cluster)
        return cluster
