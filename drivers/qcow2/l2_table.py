# SPDX-License-Identifier: Apache-2.0
"""An L2 table read whole, for the check and its repairs: the words, and the bitmaps if it has any.

What looks at host clusters needs the words alone, and finds them in a row as in any other table,
whether an entry has a second word (subclusters.py) or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockemu.drivers.qcow2.entry_runs import EntryReader, write_entries
from blockemu.drivers.qcow2.layout import COMPRESSED, OFFSET_MASK, Layout
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.subclusters import ALL_ALLOCATED, is_possible

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator

    from blockemu.drivers.qcow2.image_file import ImageFile


@dataclass(slots=True)
class L2Table:
    """The table at host offset `offset`. `bitmaps`: one for each of the words, or None."""

    offset: int
    words: array[int]
    bitmaps: array[int] | None

    def place(self, index: int) -> int:
        """The host offset of an entry."""
        return self.offset + index * (ENTRY_BYTES if self.bitmaps is None else 2 * ENTRY_BYTES)

    def holds_data(self, index: int) -> bool:
        """Whether the bitmap says that something of this cluster lies in its host cluster."""
        return self.bitmaps is not None and bool(self.bitmaps[index] & ALL_ALLOCATED)

    def wrong_bitmaps(self) -> Iterator[int]:
        """Indexes of the entries whose bitmap isn't possible beside their word."""
        for index, bitmap in enumerate(self.bitmaps or ()):
            if bitmap:
                word = self.words[index]
                if word & COMPRESSED or not is_possible(bitmap, has_host=bool(word & OFFSET_MASK)):
                    yield index


async def read_l2(reader: EntryReader, layout: Layout, offset: int) -> L2Table | None:
    """The table at `offset`, what is past the end of the file as zeroes; None if all is 0.

    Raises: OSError.
    """
    words = await reader.read(offset, layout.cluster_size // ENTRY_BYTES)
    if words is None:
        return None
    if not layout.extended_l2:
        return L2Table(offset, words, None)
    return L2Table(offset, words[::2], words[1::2])


async def write_l2(file: ImageFile, table: L2Table, changed: Iterable[int]) -> None:
    """Write the sectors that hold the entries `changed`, as `write_entries`. Raises: OSError."""
    if table.bitmaps is None:
        await write_entries(file, table.offset, table.words, changed)
        return
    both = table.words + table.words
    both[::2], both[1::2] = table.words, table.bitmaps
    await write_entries(file, table.offset, both, [2 * index for index in changed])
