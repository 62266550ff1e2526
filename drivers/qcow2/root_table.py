# SPDX-License-Identifier: Apache-2.0
"""The two tables that are held in memory whole: the active L1 table and the refcount table.

They are small (8 bytes for each L2 table or refcount block, bounded in layout.py) and contiguous in
the file. Like a cached slice, a root table knows which of its granules are dirty, and hands their
bytes to the metadata writer as a capture.
"""

from __future__ import annotations

from array import array

from blockemu.drivers.qcow2.layout import div_up
from blockemu.drivers.qcow2.table_cache import disk_bytes, merge

ENTRY_BYTES = 8


class RootTable:
    """Entries in native byte order at host offset `offset`. Change them through `put`.

    `granule`: bytes written at once; at most a cluster.
    """

    __slots__ = ("_dirty", "_granule_words", "offset", "words")

    def __init__(self, words: array[int], *, offset: int, granule: int) -> None:
        assert words.typecode == "Q"
        self.words = words
        self.offset = offset
        self._granule_words = granule // ENTRY_BYTES
        self._dirty: set[int] = set()

    def __len__(self) -> int:
        return len(self.words)

    @property
    def is_dirty(self) -> bool:
        return bool(self._dirty)

    def put(self, index: int, value: int) -> None:
        """Change one entry in memory; it is dirty until captured."""
        self.words[index] = value
        self._dirty.add(index // self._granule_words)

    def drop_changes(self) -> None:
        """Nothing is dirty: all of the table is about to be written, or to be forgotten."""
        self._dirty = set()

    def replace(self, words: array[int], *, offset: int) -> None:
        """The table has moved: the copy at `offset` is on disk, and the header names it."""
        assert not self._dirty
        self.words = words
        self.offset = offset

    def capture(self) -> tuple[list[tuple[int, bytes]], set[int]]:
        """Writes for all that is dirty now, and what to hand back to `restore` if they fail."""
        step = self._granule_words
        writes = []
        for granule in self._dirty:
            data = disk_bytes(self.words[granule * step : (granule + 1) * step])
            # The table's last cluster is its own to the end, so a short granule may be filled up.
            whole = data.ljust(step * ENTRY_BYTES, b"\0")
            writes.append((self.offset + granule * step * ENTRY_BYTES, whole))
        taken, self._dirty = self._dirty, set()
        return merge(writes), taken

    def restore(self, taken: set[int]) -> None:
        """The captured writes weren't made: dirty again."""
        self._dirty |= {granule for granule in taken if granule < self._granules()}

    def _granules(self) -> int:
        return div_up(len(self.words), self._granule_words)
