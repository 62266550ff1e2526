# SPDX-License-Identifier: Apache-2.0
"""Room for compressed clusters: byte after byte, several of them in one host cluster.

A compressed cluster begins where the last one ended, at any byte (specification: Compressed
Clusters Descriptor). If it doesn't fit into what is left of the host cluster, it runs on into the
next one, where that happens to be the one that is allocated; else it begins in the newly allocated
one, and the rest of the old one is lost. A host cluster counts one reference for each compressed
cluster that has bytes in it.

The host cluster that is being filled is held by these references only. When the last of them goes
it is free, like any other, and filled no further (`forget`).

Context: home thread of the AioContext; all but `forget` under the metadata mutex.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from blockemu.drivers.qcow2.metadata_writer import Reference

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.layout import Layout
    from blockemu.drivers.qcow2.refcount import Refcounts


class PackedSpace:
    """Hands out byte ranges of host clusters that hold compressed clusters."""

    def __init__(self, layout: Layout, *, refcounts: Refcounts) -> None:
        self._bits = layout.cluster_bits
        self._size = layout.cluster_size
        self._end_max = layout.compressed_end_max
        self._refcounts = refcounts
        self._next = 0
        """Behind the byte that was handed out last, inside its host cluster; 0: no such place."""

    def reaches(self, clusters: int) -> bool:
        """Whether descriptors can name so many host clusters more, at the end of the file."""
        return (self._refcounts.used_end + clusters) << self._bits <= self._end_max

    def forget(self, cluster: int) -> None:
        """No reference to this host cluster is left: it may be anything next. Suspends: never."""
        if self._next and self._next >> self._bits == cluster:
            self._next = 0

    async def take(self, lengths: Sequence[int]) -> list[int]:
        """Host offsets for runs of these many bytes, each more than 0 and less than a cluster.

        They are counted as taken. Suspends: as allocation does. Raises: OSError; nothing is taken.
        """
        taken: list[int] = []
        try:
            for length in lengths:
                taken.append(await self._take_one(length))
        except BaseException:
            await self.give_back(zip(taken, lengths, strict=False))
            raise
        return taken

    async def give_back(self, runs: Iterable[tuple[int, int]]) -> None:
        """Runs (offset, length) that no entry names, in memory or on disk."""
        for offset, length in runs:
            first, last = offset >> self._bits, (offset + length - 1) >> self._bits
            await self._refcounts.release(Reference(first, last - first + 1))

    async def _take_one(self, length: int) -> int:
        assert 0 < length < self._size, length
        await self._refcounts.apply_released()  # may free the cluster that is being filled
        begun = self._next
        if begun and begun % self._size + length <= self._size:
            if await self._refcounts.share_one(begun >> self._bits):
                return self._hand_out(begun, length)
            begun = 0
        taken = await self._refcounts.allocate(1)
        if begun and begun == self._next and taken.first == (begun >> self._bits) + 1:
            try:
                shared = await self._refcounts.share_one(begun >> self._bits)
            except BaseException:
                await self._refcounts.release(Reference(taken.first, 1))
                raise
            if shared:
                return self._hand_out(begun, length)
        return self._hand_out(taken.first << self._bits, length)

    def _hand_out(self, offset: int, length: int) -> int:
        end = offset + length
        self._next = end if end % self._size else 0
        return offset
