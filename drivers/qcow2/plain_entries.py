# SPDX-License-Identifier: Apache-2.0
"""Which of many L2 entries are data and which unallocated: all of a slice at once.

A slice is taken as one large integer of 64-bit lanes, a lane an entry; the few questions to be
asked of each entry are additions and masks of that integer, in which no lane spills into the next.
That takes a tenth of what a loop over the entries takes, and a client that maps a large disk wants
millions of them.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import compress
from typing import TYPE_CHECKING, Final

from blockemu.drivers.qcow2.layout import OFFSET_MASK

if TYPE_CHECKING:
    from array import array

_TOP: Final = 1 << 63


@lru_cache(maxsize=64)
def _lanes(value: int, count: int) -> int:
    """`value` in each of `count` lanes."""
    return int.from_bytes(value.to_bytes(8, "little") * count, "little")


def find_data(words: array[int], *, odd: int, start: int, end: int) -> bytes | None:
    """For each entry 1, if it names a host cluster, or 0, if it is unallocated.

    None, if some entry has one of the bits `odd`, or names a host offset outside `[start, end)`.
    """
    count = len(words)
    if sys.byteorder == "big":
        words = words[:]
        words.byteswap()
    entries = int.from_bytes(words, "little")
    if entries & _lanes(odd, count):
        return None
    hosts = entries & _lanes(OFFSET_MASK, count)
    top = _lanes(_TOP, count)
    if hosts + _lanes(_TOP - max(end, 0), count) & top:
        return None
    named = hosts + _lanes(_TOP - 1, count) & top
    if start > 0 and named & ~(hosts + _lanes(_TOP - start, count)):
        return None
    return (named >> 63).to_bytes(8 * count, "little")[::8]


def edges_of(flags: bytes, size: int) -> list[int]:
    """Where runs of alike bytes begin, in order, and the end of the last; each byte is `size`."""
    count = len(flags)
    number = int.from_bytes(flags, "little")
    changes = number ^ (number << 8 | flags[0])
    at = compress(range(0, count * size, size), changes.to_bytes(count + 1, "little"))
    return [0, *at, count * size]
