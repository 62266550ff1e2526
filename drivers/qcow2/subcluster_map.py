# SPDX-License-Identifier: Apache-2.0
"""The cluster map of an image with extended L2 entries: extents that end where subclusters differ.

A cached slice keeps the two words of its entries in two arrays: `words` is what it is in any image,
so that whatever looks at host clusters alone (snapshots, COPIED flags) need not know, and `bitmaps`
lies beside it. They are put together again when the slice is written.

An entry is told by `entries` and `check_entry`, and taken by `set_entry`, as one number
(subclusters.py).

Context: as in cluster_map.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from blockemu.drivers.qcow2.cluster_map import ClusterMap, Extent, Kind
from blockemu.drivers.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    Layout,
)
from blockemu.drivers.qcow2.subclusters import (
    ALL_ALLOCATED,
    BITMAP_SHIFT,
    SUBCLUSTER_SHIFT,
    SUBCLUSTERS,
    WORD_MASK,
    alike,
    is_possible,
)
from blockemu.drivers.qcow2.table_cache import Slice, TableCache, disk_bytes, words_from

if TYPE_CHECKING:
    from array import array
    from collections.abc import Sequence
    from typing import Any


class ExtendedSlice(Slice):
    """`bitmaps[index]` belongs to `words[index]`."""

    __slots__ = ("bitmaps",)

    def __init__(self, offset: int, words: array[int], bitmaps: array[int]) -> None:
        super().__init__(offset, words)
        self.bitmaps = bitmaps


class ExtendedTableCache(TableCache):
    """A cache of L2 tables with entries of two words."""

    def _entry_bytes(self) -> int:
        return 16

    def _slice_from(self, offset: int, data: bytes | bytearray) -> ExtendedSlice:
        both = words_from("Q", data)
        return ExtendedSlice(offset, both[::2], both[1::2])

    def _bytes_of(self, found: Slice, start: int, stop: int) -> bytes:
        words = found.words[start:stop]
        both = words + words
        both[::2] = words
        both[1::2] = cast("ExtendedSlice", found).bitmaps[start:stop]
        return disk_bytes(both)


class SubclusterMap(ClusterMap):
    """As ClusterMap, by the subcluster."""

    def __init__(self, layout: Layout, **parts: Any) -> None:
        super().__init__(layout, **parts)
        self.cluster_bits = layout.cluster_bits
        self.subcluster_bits = layout.cluster_bits - SUBCLUSTER_SHIFT

    # --- looking ---

    def is_whole(self, cluster: int) -> bool:
        """Whether all of a guest cluster lies in a host cluster, as far as is known without I/O:
        what a direct map may have. Suspends: never."""
        if not self.has_table(cluster):
            return False
        found = self._l2.slices.get(self.slice_offset(cluster))
        if found is None:
            return False
        index = cluster % self.slice_entries
        bitmap = cast("ExtendedSlice", found).bitmaps[index]
        return bitmap == ALL_ALLOCATED and not found.words[index] & COMPRESSED

    def _extent(self, found: Slice, offset: int, length: int) -> Extent:
        words, bitmaps = found.words, cast("ExtendedSlice", found).bitmaps
        index = (offset >> self._bits) % self.slice_entries
        word, bitmap = words[index], bitmaps[index]
        size = self._mask + 1
        inside = offset & self._mask
        if word & COMPRESSED:
            return Extent(Kind.COMPRESSED, min(size - inside, length), word)
        self._check_pair(found, index, word, bitmap)
        host, placed = word & OFFSET_MASK, self._is_placed(word)
        bits = self.subcluster_bits
        first = inside >> bits
        end = first + alike(bitmap, first)
        covered = (end << bits) - inside
        kind_bits = bitmap >> first & 0x1_0000_0001
        if end == SUBCLUSTERS:
            step = size if placed else 0
            entries = self.slice_entries
            while covered < length:
                index += 1
                word += step
                if index >= entries or words[index] != word:
                    break
                bitmap = bitmaps[index]
                if bitmap & 0x1_0000_0001 != kind_bits or bitmap >> 32 & bitmap:
                    break
                end = alike(bitmap, 0)
                covered += end << bits
                if end < SUBCLUSTERS:
                    break
        length = min(covered, length)
        if kind_bits == 1:
            return Extent(Kind.DATA, length, host + inside, bool(word & COPIED))
        if not placed:
            return Extent(Kind.ZERO if kind_bits else Kind.UNALLOCATED, length)
        kind = Kind.ZERO_ALLOCATED if kind_bits else Kind.UNALLOCATED
        return Extent(kind, length, host + inside, bool(word & COPIED))

    def entries(self, found: Slice, index: int, count: int) -> Sequence[int]:
        bitmaps = cast("ExtendedSlice", found).bitmaps[index : index + count]
        words = found.words[index : index + count]
        return [bitmap << BITMAP_SHIFT | word for word, bitmap in zip(words, bitmaps, strict=True)]

    def check_entry(self, found: Slice, index: int) -> int:
        word, bitmap = found.words[index], cast("ExtendedSlice", found).bitmaps[index]
        if word & COMPRESSED:
            return word
        self._check_pair(found, index, word, bitmap)
        return bitmap << BITMAP_SHIFT | word

    def _check_pair(self, found: Slice, index: int, word: int, bitmap: int) -> None:
        host = word & OFFSET_MASK
        place = found.offset + index * 16
        placed = self._is_placed(word)
        if not is_possible(bitmap, has_host=placed):
            raise self._damage.report(
                f"L2 entry at offset {place} has the subcluster bitmap {bitmap:#018x},"
                f" which is not possible {'with' if placed else 'without'} a host cluster"
            )
        if (
            word & L2_RESERVED
            or host & self._mask
            or (bitmap & ALL_ALLOCATED and self._is_past_end(host))
        ):
            raise self._damage.report(
                f"L2 entry at offset {place} is {word:#x}, which is no valid cluster of this file"
            )

    def _is_placed(self, word: int) -> bool:
        """Whether the word gives its cluster a host cluster."""
        return bool(word & OFFSET_MASK)

    def _is_past_end(self, host: int) -> bool:
        return host >= self._file.length

    # --- changing ---

    def set_entry(self, found: Slice, index: int, word: int, *, discard: bool = False) -> None:
        """As ClusterMap's; `word` is the whole entry, its bitmap included."""
        cast("ExtendedSlice", found).bitmaps[index] = word >> BITMAP_SHIFT
        super().set_entry(found, index, word & WORD_MASK, discard=discard)

    def set_entries(self, found: Slice, index: int, entries: Sequence[int]) -> None:
        for step, entry in enumerate(entries):
            self.set_entry(found, index + step, entry)
