# SPDX-License-Identifier: Apache-2.0
"""The numbers of one qcow2 image: cluster and table sizes, flag bits, and the limits on tables.

Everything here is fixed when an image is opened. An image is an array of host clusters; the guest's
disk is cut into clusters of the same size. Two trees map one to the other: L1 table -> L2 tables ->
host cluster for the data, refcount table -> refcount blocks -> reference count for the space.

Limits: the format allows tables that no machine could hold. These bounds are QEMU's own, so that
whatever it makes we open, and what a hostile header claims is refused before memory is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

COPIED: Final = 1 << 63
"""L1 and L2 entries: refcount is exactly one, so the target may be changed in place."""
COMPRESSED: Final = 1 << 62
"""L2 entries: the descriptor is that of a compressed cluster."""
ZERO: Final = 1
"""L2 entries, version 3: reads as zeroes, whatever the host offset."""
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9..55 of an L1 entry or a standard L2 entry: the host offset."""
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
REFTABLE_RESERVED: Final = 0x1FF

CLUSTER_BITS_MIN: Final = 9
CLUSTER_BITS_MAX: Final = 21
EXTENDED_L2_CLUSTER_BITS_MIN: Final = 14
"""So that a subcluster, a 32nd of a cluster, is a sector at least."""
REFCOUNT_ORDER_MAX: Final = 6
L1_BYTES_MAX: Final = 32 * 1024 * 1024
REFTABLE_BYTES_MAX: Final = 8 * 1024 * 1024
SNAPSHOTS_MAX: Final = 65536
BACKING_NAME_MAX: Final = 1023
HOST_OFFSET_MAX: Final = 1 << 56
"""L2 entries can name host clusters below this offset."""
SECTOR: Final = 512
"""Bytes that a disk writes whole or not at all; also the unit of compressed lengths."""


def div_up(value: int, unit: int) -> int:
    """How many units it takes to hold `value`."""
    return -(-value // unit)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True, slots=True)
class Layout:
    """The geometry that a header declares. `version` decides which L2 flags exist."""

    cluster_bits: int
    refcount_order: int
    version: int
    extended_l2: bool = False
    """L2 entries have a second word, the bitmap of subclusters (subclusters.py)."""

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l2_entry_bytes(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_bits(self) -> int:
        """log2 of the entries in an L2 table (one cluster a table)."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def block_bits(self) -> int:
        """log2 of the entries in a refcount block (one cluster a block)."""
        return self.cluster_bits + 3 - self.refcount_order

    @property
    def block_entries(self) -> int:
        return 1 << self.block_bits

    @property
    def refcount_max(self) -> int:
        return int((1 << self.refcount_bits) - 1)

    def l1_entries(self, size_bytes: int) -> int:
        """L1 entries that a disk of this size needs."""
        return div_up(size_bytes, 1 << (self.cluster_bits + self.l2_bits))

    @property
    def _compressed_shift(self) -> int:
        """The bit at which a compressed descriptor's sector count begins."""
        return 62 - (self.cluster_bits - 8)

    @property
    def compressed_end_max(self) -> int:
        """Compressed descriptors can name bytes below this host offset."""
        return min(1 << self._compressed_shift, HOST_OFFSET_MAX)

    def compressed_descriptor(self, host: int, length: int) -> int:
        """The L2 entry of a compressed cluster of `length` bytes at `host`."""
        sectors = (host + length - 1) // SECTOR - host // SECTOR
        return COMPRESSED | sectors << self._compressed_shift | host

    def compressed_extent(self, descriptor: int) -> tuple[int, int]:
        """Host offset and length in bytes of what a compressed L2 entry points to."""
        shift = self._compressed_shift
        host = descriptor & ((1 << shift) - 1) & (HOST_OFFSET_MAX - 1)
        sectors = (descriptor & (COMPRESSED - 1)) >> shift
        return host, (sectors + 1) * SECTOR - host % SECTOR
