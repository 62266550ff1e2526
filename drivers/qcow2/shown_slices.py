# SPDX-License-Identifier: Apache-2.0
"""What of the L2 cache the native poll may read by itself, to find clusters not read before.

The direct map knows a cluster once a request for it has come here. On a large disk that is read at
random, nearly every request is the first of its cluster. So when one has found its L2 slice in the
cache, the slice is *shown* to the map's twin in C (native_map.py), which looks the next ones up in
its words; and while the cache isn't full, so are those that were read with it (table_cache.py).

What keeps that right:

- Words change in place, in this thread, and only when what they say is true: new data is entered
  when it is written.
- Who changes what a word says of *data* holds the cluster alone, and invalidates the direct map
  before; that hides the slice, and waits for what C has begun. It isn't shown again while anybody
  holds one of its clusters alone, or waits to.
- A slice that leaves the cache is hidden first (table_cache.py). What was shown of a table that has
  been copied since may stay: its words of data are still true until they are invalidated, and what
  is shown of the copy takes its place.
- It is for reads alone. What may be written where it lies, overlap_check.py decides, one by one.

Context: home thread of the node's AioContext.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.direct_map import TableWords
from blockemu.drivers.qcow2.layout import COPIED, OFFSET_MASK

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockemu.drivers.direct_map import DirectMap
    from blockemu.drivers.native_map import NativeMap
    from blockemu.drivers.qcow2.cluster_lock import ClusterLocks
    from blockemu.drivers.qcow2.cluster_map import ClusterMap
    from blockemu.drivers.qcow2.table_cache import Slice, TableCache


class ShownSlice:
    """One slice in one twin."""

    __slots__ = ("_address", "_native", "_number")

    def __init__(self, native: NativeMap, number: int, address: int) -> None:
        self._native = native
        self._number = number
        self._address = address

    def was_used(self) -> bool:
        """Whether C found something in it since this was last asked."""
        return self._native.was_used(self._number, self._address)

    def hide(self) -> None:
        """C reads it no more."""
        self._native.hide(self._number, self._address)


class ShownSlices:
    """For images whose L2 entries are single words, and whose data lies as the guest sees it."""

    def __init__(
        self,
        clusters: ClusterMap,
        *,
        cluster_bits: int,
        l2: TableCache,
        locks: ClusterLocks,
        host_end: Callable[[], int],
    ) -> None:
        self.words = TableWords(
            clusters.slice_entries.bit_length() - 1, host_mask=OFFSET_MASK, plain_mask=COPIED
        )
        """What a direct map must know for them."""
        self._clusters = clusters
        self._bits = cluster_bits
        self._l2 = l2
        self._locks = locks
        self._host_end = host_end

    def show(self, direct_map: DirectMap, offset: int) -> None:
        """A read was the first of the cluster at guest `offset`: the next needn't come here.

        In a full cache, where most slices soon make room for others, one is worth the trouble when
        it is met again.
        Suspends: never. The caller holds the cluster, whose L2 table exists.
        """
        native = direct_map.native
        if native is None:
            return
        cluster = offset >> self._bits
        start = self._clusters.slice_offset(cluster)
        found = self._l2.slices.get(start)
        if found is None:
            return  # evicted, while the data was read
        has_room = self._l2.has_room
        if not has_room and not found.was_met:
            found.was_met = True
            return
        host_end = self._host_end()
        number = cluster >> self.words.slice_bits
        is_new = found.shown is None
        self._show(native, found, number, host_end)
        if not is_new or not has_room:
            return
        step = self._l2.slice_bytes
        for other in self._l2.around(start):
            found = self._l2.slices.get(other)
            if found is not None and found.shown is None:
                self._show(native, found, number + (other - start) // step, host_end)

    def _show(self, native: NativeMap, found: Slice, number: int, host_end: int) -> None:
        first = number << self.words.slice_bits
        if self._locks.may_change(first, first + self._clusters.slice_entries - 1):
            return
        address = found.words.buffer_info()[0]
        native.show(number, address, host_end=host_end)
        found.shown = ShownSlice(native, number, address)
