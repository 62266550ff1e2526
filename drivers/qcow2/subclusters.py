# SPDX-License-Identifier: Apache-2.0
"""Subclusters: what the second word of an extended L2 entry says, and arithmetic on it.

With extended L2 entries (incompatible feature bit 4) an entry has two words. The first is as it
ever was, but for the zero flag, which is always clear. The second is a bitmap for the 32
subclusters of the guest cluster (specification: Extended L2 Entries):

    bit x         subcluster x is allocated: it lies in the host cluster, at its own place there
    bit 32 + x    subcluster x reads as zeroes
    neither       it isn't there: the backing file shows, or zeroes

Both at once is no possible state, nor is an allocated subcluster without a host cluster. Compressed
clusters have no subclusters, and a bitmap of 0.

Both words lie in one sector, so an entry is written as a whole. In memory it is one number: the
first word, plus the bitmap shifted by 64.
"""

from __future__ import annotations

from typing import Final

SUBCLUSTERS: Final = 32
"""Of a cluster."""
SUBCLUSTER_SHIFT: Final = 5
"""log2 of that."""
ALL_ALLOCATED: Final = 0xFFFF_FFFF
ALL_ZERO: Final = 0xFFFF_FFFF << 32
BITMAP_SHIFT: Final = 64
"""In an entry as one number."""
WORD_MASK: Final = (1 << 64) - 1


def span(first: int, end: int) -> int:
    """Allocation bits of subclusters `[first, end)`."""
    return (1 << end) - (1 << first)


def allocated(bitmap: int) -> int:
    """The allocation bits."""
    return bitmap & ALL_ALLOCATED


def zeroes(bitmap: int) -> int:
    """The zero bits, each at its subcluster's place."""
    return bitmap >> 32


def is_possible(bitmap: int, *, has_host: bool) -> bool:
    """Whether a standard cluster may have this bitmap."""
    if has_host:
        return not bitmap >> 32 & bitmap
    return not bitmap & ALL_ALLOCATED


def with_data(bitmap: int, mask: int) -> int:
    """The bitmap, once the subclusters in `mask` lie in the host cluster."""
    return (bitmap | mask) & ~(mask << 32)


def with_zeroes(bitmap: int, mask: int) -> int:
    """The bitmap, once the subclusters in `mask` read as zeroes."""
    return (bitmap | mask << 32) & ~mask


def alike(bitmap: int, first: int) -> int:
    """How many subclusters from `first` on are of one kind with it. At least one."""
    if bitmap >> first & 1:
        bits = bitmap & ALL_ALLOCATED
    elif bitmap >> (first + 32) & 1:
        bits = bitmap >> 32
    else:
        bits = ~(bitmap | bitmap >> 32) & ALL_ALLOCATED
    bits >>= first
    return (~bits & (bits + 1)).bit_length() - 1


def first_allocated(bitmap: int) -> int:
    """The first subcluster that is allocated, or SUBCLUSTERS."""
    bits = bitmap & ALL_ALLOCATED
    return (bits & -bits).bit_length() - 1 if bits else SUBCLUSTERS


def allocated_end(bitmap: int) -> int:
    """Behind the last subcluster that is allocated, or 0."""
    return (bitmap & ALL_ALLOCATED).bit_length()
