# SPDX-License-Identifier: Apache-2.0
"""The walk of a check over an image whose guest clusters lie in an external data file.

They aren't counted there, and the qcow2 file holds none. What can be wrong with an L2 entry is its
offset, which must be the guest's, and its being compressed. An offset that isn't the guest's can't
be repaired: nobody knows what the guest was to see. (qemu-img check takes no notice of it, though
QEMU refuses to read such a cluster.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockemu.drivers.qcow2.entry_runs import runs_of
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO
from blockemu.drivers.qcow2.metadata_walk import MetadataWalk
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES

if TYPE_CHECKING:
    from array import array

    from blockemu.drivers.qcow2.entry_runs import Run


class DataFileWalk(MetadataWalk):
    """As MetadataWalk; L2 entries name places in another file."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._first_entry: dict[int, int] = {}
        """Offset of an L2 table -> the L1 entry that names it first."""

    def _l1_entries(self, words: array[int], table: int, *, active: int, weight: int) -> None:
        if active:
            start = (table - self._header.l1_table_offset) // ENTRY_BYTES
            for index, entry in enumerate(words, start):
                if entry:
                    self._first_entry.setdefault(entry & OFFSET_MASK, index)
        super()._l1_entries(words, table, active=active, weight=weight)

    async def _l2_table(self, offset: int, *, active: int, weight: int) -> None:
        words = await self._read(offset, self._size // ENTRY_BYTES, "the L2 table")
        if words is None:
            return
        guest = self._first_entry.get(offset, 0) << (self._bits + self._layout.l2_bits)
        next_host = 0
        if not guest and words[0] & (COPIED | ZERO | OFFSET_MASK) == COPIED:
            self.allocated += active  # guest cluster 0, which no run of entries shows
            next_host = self._size
        for run in runs_of(words, self._size):
            entries = self._data_entry(offset, run, guest, weight)
            if entries:
                host = run.value & OFFSET_MASK
                self.allocated += active * entries
                if next_host and host != next_host:
                    self.fragmented += active
                next_host = host + entries * self._size

    def _data_entry(self, table: int, run: Run, guest: int, weight: int) -> int:
        """Returns how many clusters are mapped."""
        where = f"L2 entry at {table + run.at * ENTRY_BYTES:#x}"
        if run.value & COMPRESSED:
            self._findings.corruption(
                f"{where} is compressed, which a cluster of an external data file can't be", weight
            )
            return 0
        host = run.value & OFFSET_MASK
        if run.value & L2_RESERVED:
            self._findings.corruption(f"{where} has reserved bits set: {run.value:#x}", weight)
        if not host:
            return 0
        expected = guest + (run.at << self._bits)
        if host % self._size:
            self._findings.corruption(
                f"{where} names offset {host:#x} of the data file: not aligned to a cluster", weight
            )
            self.unaligned_zeroes += bool(run.value & ZERO)
        elif host != expected:
            count = max(run.entries, 1)
            self._findings.corruption(
                f"{where} names offset {host:#x} of the data file, but guest offset {expected:#x} "
                f"is what it maps ({count} clusters)",
                count * weight,
            )
        return max(run.entries, 1)
