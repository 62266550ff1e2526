# SPDX-License-Identifier: Apache-2.0
"""Tables of 8-byte entries, read and written for the check, and L2 tables taken apart into runs.

Guest data mostly lies in the order in which it was written, so most of an L2 table is entries that
each name the next host cluster. Such runs are found by comparing blocks of entries, as one number
each, with how a run would go on; all that follows (counting, comparing flags) is then done by the
run. Tables without entries, and holes of the file, are not looked at entry by entry at all.
"""

from __future__ import annotations

import sys
from array import array
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from blockemu.drivers.qcow2.layout import COMPRESSED, L2_RESERVED, OFFSET_MASK, SECTOR
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.table_cache import disk_bytes, words_from

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blockemu.drivers.qcow2.image_file import ImageFile

CHUNK_ENTRIES: Final = 131072
"""Entries of an L1 or bitmap table that are read at once: 1 MiB."""

BLOCK_ENTRIES: Final = 64
"""Entries that are compared as one number; the smallest table has as many."""

_SECTOR_ENTRIES = SECTOR // ENTRY_BYTES


class Run(NamedTuple):
    """Entries `at` and following of an L2 table, the first of which is `value`.

    `entries` counts plain entries, each the one before plus a cluster. It is 0 for one entry that
    is compressed, or not as the format wants it.
    """

    at: int
    entries: int
    value: int


def runs_of(words: array[int], cluster_size: int) -> list[Run]:
    """All entries that name host clusters, or have reserved bits set. Suspends: never."""
    odd_bits = COMPRESSED | L2_RESERVED | (OFFSET_MASK & (cluster_size - 1))
    ones, ramp = _patterns(cluster_size)
    found: list[Run] = []
    start, expected = -1, 0
    for base in range(0, len(words), BLOCK_ENTRIES):
        block = words[base : base + BLOCK_ENTRIES]
        value = int.from_bytes(block.tobytes(), sys.byteorder)
        if start >= 0 and value == ramp + expected * ones and len(block) == BLOCK_ENTRIES:
            expected += BLOCK_ENTRIES * cluster_size
            continue
        if not value and start < 0:
            continue
        for index, entry in enumerate(block, base):
            if start >= 0:
                if entry == expected:
                    expected += cluster_size
                    continue
                found.append(Run(start, index - start, words[start]))
                start = -1
            if not entry:
                continue
            if entry & odd_bits:
                found.append(Run(index, 0, entry))
            elif entry & OFFSET_MASK:
                start, expected = index, entry + cluster_size
    if start >= 0:
        found.append(Run(start, len(words) - start, words[start]))
    return found


@lru_cache(maxsize=2)
def _patterns(cluster_size: int) -> tuple[int, int]:
    """A block of entries that are all 1, and one of 0, 1, 2... clusters, as one number each.

    A block that goes on with a run is `ramp + expected * ones`: no entry of a run overflows into
    its neighbour, for its reserved bits are 0.
    """
    ones = array("Q", [1]) * BLOCK_ENTRIES
    ramp = array("Q", range(0, BLOCK_ENTRIES * cluster_size, cluster_size))
    one, two = (int.from_bytes(words.tobytes(), sys.byteorder) for words in (ones, ramp))
    return one, two


class EntryReader:
    """Reads tables; skips holes once it has met zeroes.

    Context: home thread of the file's AioContext.
    """

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self._met_zeroes = False

    async def read(self, offset: int, entries: int) -> array[int] | None:
        """The entries, what is past the end of the file as zeroes; None if all are 0.

        Raises: OSError.
        """
        length = entries * ENTRY_BYTES
        if self._met_zeroes and await self._is_hole(offset, length):
            return None
        data = bytearray(length)
        await self._file.read(offset, memoryview(data))
        self._met_zeroes = data.count(0) == length
        return None if self._met_zeroes else words_from("Q", data)

    async def _is_hole(self, offset: int, length: int) -> bool:
        inside = min(length, self._file.length - offset)
        if inside <= 0:
            return True
        status = await self._file.child.block_status(offset, inside)
        return status.zero and status.length >= inside


async def write_entries(
    file: ImageFile, offset: int, words: array[int], changed: Iterable[int]
) -> None:
    """Write the sectors of a table that hold the entries `changed`. Not flushed.

    A disk writes a sector whole or not at all, so each entry is the old or the new one after a
    crash. Raises: OSError.
    """
    for sector in sorted({index // _SECTOR_ENTRIES for index in changed}):
        start = sector * _SECTOR_ENTRIES
        data = disk_bytes(words[start : start + _SECTOR_ENTRIES])
        await file.write(offset + start * ENTRY_BYTES, data)
