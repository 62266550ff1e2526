# SPDX-License-Identifier: Apache-2.0
"""Runs of L2 entries that are plain: unallocated, or data in a whole host cluster.

The loop over the entries is C's (native/plain_entries.c): in Python it takes longer than all else
that a map of a large disk needs. Whatever is not plain ends it, and is the caller's to look at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blockemu.drivers.qcow2._plain_entries import ffi, lib
from blockemu.drivers.qcow2.layout import OFFSET_MASK

if TYPE_CHECKING:
    from array import array

RUNS_AT_ONCE: Final = 2048
"""Found by one call at most."""


class PlainEntries:
    """Looks at entries of one image. `odd`: bits that no plain entry has.

    Context: one thread at a time. Suspends: never.
    """

    __slots__ = ("_lengths", "_walk")

    def __init__(self, *, odd: int, cluster_size: int) -> None:
        self._lengths = ffi.new("uint64_t[]", RUNS_AT_ONCE)
        self._walk = ffi.new("struct plain_walk *")
        self._walk.odd = odd
        self._walk.offset_mask = OFFSET_MASK
        self._walk.cluster_bytes = cluster_size

    def runs(
        self, words: array[int], *, start: int, end: int, runs_max: int
    ) -> tuple[int, bool, list[int]]:
        """(how many entries are plain, whether the first is data, lengths of runs in bytes).

        The runs are data and unallocated by turns. Data lies at host offsets in `[start, end)`.
        """
        walk = self._walk
        walk.start, walk.end = start, max(end, 0)
        walk.runs_max = min(runs_max, RUNS_AT_ONCE)
        taken = lib.plain_entries(
            walk, ffi.from_buffer("uint64_t[]", words), len(words), self._lengths
        )
        return taken, bool(walk.is_data), ffi.unpack(self._lengths, walk.runs)
