# SPDX-License-Identifier: Apache-2.0
"""Where the structures of an image are in its bytes, so that a test can damage one of them."""

from __future__ import annotations

import struct

COPIED = 1 << 63
COMPRESSED = 1 << 62
EXTENDED_L2 = 1 << 4
OFFSET = 0x00FF_FFFF_FFFF_FE00


class Structures:
    """An image's bytes, changed in place. Places are offsets of 8-byte entries."""

    def __init__(self, content: bytearray) -> None:
        self.content = content
        fields = struct.unpack_from(">4sIQIIQIIQQIIQ", content)
        self.version: int = fields[1]
        self.bits: int = fields[4]
        self.cluster: int = 1 << self.bits
        self.l1_entries: int = fields[7]
        self.l1_offset: int = fields[8]
        self.reftable_offset: int = fields[9]
        self.snapshots: int = fields[11]
        self.snapshots_offset: int = fields[12]
        self.reftable_entries: int = fields[10] * self.cluster // 8
        self.order: int = struct.unpack_from(">I", content, 96)[0] if self.version == 3 else 4
        features: int = struct.unpack_from(">Q", content, 72)[0] if self.version == 3 else 0
        self.entry_bytes = 16 if features & EXTENDED_L2 else 8
        """Of an L2 entry; the second half is the bitmap of subclusters."""
        self.l2_entries = self.cluster // self.entry_bytes

    def get(self, place: int) -> int:
        if place + 8 > len(self.content):
            return 0
        return int(struct.unpack_from(">Q", self.content, place)[0])

    def put(self, place: int, value: int) -> None:
        struct.pack_into(">Q", self.content, place, value)

    def l1_place(self, index: int = 0) -> int:
        return self.l1_offset + index * 8

    def l2_place(self, index: int = 0, table: int = 0) -> int:
        """Of an entry in the L2 table that the L1 table's entry `table` names."""
        return (self.get(self.l1_place(table)) & OFFSET) + index * self.entry_bytes

    def is_compressed_with_bitmap(self, l1_entry: int) -> bool:
        """Whether that is so of some entry in an extended L2 table."""
        table = l1_entry & OFFSET
        places = range(table, min(table + self.cluster, len(self.content) - 15), 16)
        return table > 0 and any(
            self.get(place) & COMPRESSED and self.get(place + 8) for place in places
        )

    def reftable_place(self, index: int = 0) -> int:
        return self.reftable_offset + index * 8

    def refcount(self, cluster: int) -> int:
        place, mask, shift = self._refcount_place(cluster)
        return self._word(place) >> shift & mask

    def set_refcount(self, cluster: int, value: int) -> None:
        place, mask, shift = self._refcount_place(cluster)
        width = max(1, (1 << self.order) // 8)
        word = self._word(place) & ~(mask << shift) | value << shift
        self.content[place : place + width] = word.to_bytes(width, "big")

    def _word(self, place: int) -> int:
        width = max(1, (1 << self.order) // 8)
        return int.from_bytes(self.content[place : place + width], "big")

    def _refcount_place(self, cluster: int) -> tuple[int, int, int]:
        per_block = self.cluster * 8 >> self.order
        block = self.get(self.reftable_place(cluster // per_block))
        assert block, f"cluster {cluster} has no refcount block"
        bit = (cluster % per_block) << self.order
        mask = (1 << (1 << self.order)) - 1
        return block + bit // 8, mask, bit % 8 if self.order < 3 else 0
