# SPDX-License-Identifier: Apache-2.0
"""Write zeroes and discard with subclusters.

As in guest_erase.py, with two differences. Zeroes are known by the subcluster: at the ends of a
request, where it covers a cluster in part, the subclusters that it covers are marked, and no more
than the rest is written. (A compressed cluster has none; there, zeroes are written.) And a whole
cluster is 32 zero bits, its allocation bits all clear, with the host cluster kept or not.

Discards are of whole clusters: less gives no host cluster back.

An entry here is one number with its bitmap in it (subclusters.py).

Context: as in guest_erase.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.qcow2.cluster_map import Kind
from blockemu.drivers.qcow2.guest_erase import GuestEraser
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, Layout, round_up
from blockemu.drivers.qcow2.subclusters import (
    ALL_ZERO,
    BITMAP_SHIFT,
    SUBCLUSTER_SHIFT,
    WORD_MASK,
    allocated,
    span,
    with_zeroes,
)

if TYPE_CHECKING:
    from typing import Any

ZERO_ENTRY = ALL_ZERO << BITMAP_SHIFT
"""A cluster that reads as zeroes and has no place."""


class SubclusterEraser(GuestEraser):
    """As GuestEraser; its map is a SubclusterMap."""

    def __init__(self, layout: Layout, **parts: Any) -> None:
        super().__init__(layout, **parts)
        self._subcluster_bits = layout.cluster_bits - SUBCLUSTER_SHIFT

    @property
    def _unit(self) -> int:
        return 1 << self._subcluster_bits

    async def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        unit, size = 1 << self._subcluster_bits, self._size
        end = offset + length
        first = round_up(offset, unit)
        last = end & -unit if end < self._guest_writer.disk_bytes else round_up(end, size)
        if first >= last:  # inside one subcluster
            await self._write_zero_bytes(offset, end)
            return
        await self._write_zero_bytes(offset, first)
        start, stop = round_up(first, size), last & -size
        if start > stop:  # inside one cluster
            await self._zero_subclusters(first, last)
        else:
            await self._zero_subclusters(first, start)
            change = self._unmapped_zero if may_unmap else self._kept_zero
            await self._change(start >> self._bits, stop >> self._bits, change, discard=may_unmap)
            await self._zero_subclusters(stop, last)
        await self._write_zero_bytes(last, end)

    async def _zero_subclusters(self, start: int, end: int) -> None:
        """Mark whole subclusters, `start` to `end`, of one cluster."""
        if start >= end:
            return
        cluster = start >> self._bits
        if (await self._clusters.resolve(start, 1)).kind is Kind.COMPRESSED:
            end = min(end, self._guest_writer.disk_bytes)
            await self._guest_writer.write(start, memoryview(bytes(end - start)))
            return
        base = cluster << self._bits
        mask = span((start - base) >> self._subcluster_bits, (end - base) >> self._subcluster_bits)
        await self._change(cluster, cluster + 1, lambda e: self._marked(e, mask), discard=False)

    # --- what becomes of an entry ---

    def _marked(self, entry: int, mask: int) -> int:
        bitmap = entry >> BITMAP_SHIFT
        if not self._has_backing:
            mask &= allocated(bitmap)  # the others read as zeroes already
        return entry & WORD_MASK | with_zeroes(bitmap, mask) << BITMAP_SHIFT

    def _kept_zero(self, word: int) -> int:
        if word & COPIED and word & OFFSET_MASK and not word & COMPRESSED:
            return word & (COPIED | OFFSET_MASK) | ZERO_ENTRY
        return self._unmapped_zero(word)

    def _unmapped_zero(self, word: int) -> int:
        return 0 if not word and not self._has_backing else ZERO_ENTRY

    def _discarded(self, word: int) -> int:
        if not word & (OFFSET_MASK | COMPRESSED):
            return word
        return ZERO_ENTRY if self._has_backing else 0
