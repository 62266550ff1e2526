# SPDX-License-Identifier: Apache-2.0
"""Where the image's own tables lie, so that space for them is never handed out again.

Refcounts say what is free. Where they are wrong (a damaged image; one that a crashed program left
behind), what they call free may be the header or a table in use, and to write guest data there is
the end of the image. So before a cluster that was in the file when it was opened is taken, it is
looked for among the places that are known without reading anything: the header, the encryption
header, the L1 table and
the L2 tables that it names, the refcount table and the blocks that it names, the snapshot table,
the snapshots' L1 tables.
A clash is damage: nothing is taken. So is a guest cluster that claims to lie in such a place, once
it is let go: it isn't counted down, nor is its space discarded. After either the image is marked
and written no more (corrupt_mark.py).

A cluster behind the end that the file had when it was opened can't be one of these, so an image
that only grows never asks. The places are collected at the first question, as a sorted array: 8
bytes for each entry of the L1 and the refcount table, whose sizes are bounded (layout.py).
Tables that we make are counted by us.

Context: home thread of the AioContext. Suspends: never.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING

from blockemu.drivers.qcow2.header import SNAPSHOT_ENTRY_MIN
from blockemu.drivers.qcow2.layout import OFFSET_MASK, Layout, div_up
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.header_file import HeaderFile
    from blockemu.drivers.qcow2.metadata_writer import MetadataWriter


class MetadataPlaces:
    """The clusters of the tables. `end`: behind the file's last cluster when it was opened."""

    def __init__(
        self, layout: Layout, *, header: HeaderFile, writer: MetadataWriter, end: int
    ) -> None:
        self._layout = layout
        self._header = header
        self._writer = writer
        self._end = end
        self._places: array[int] | None = None

    def first_in(self, first: int, clusters: int) -> int | None:
        """The first host cluster of a run that holds metadata, if there is one."""
        if first >= self._end:
            return None
        if self._places is None:
            self._places = self._collect()
        index = bisect_left(self._places, first)
        if index < len(self._places) and self._places[index] < first + clusters:
            return self._places[index]
        return None

    def forget(self) -> None:
        """A table has moved or is freed: its place may be used. Rare, so just collect again."""
        self._places = None

    def _collect(self) -> array[int]:
        header = self._header.header
        least = (header.snapshots_offset, header.nb_snapshots * SNAPSHOT_ENTRY_MIN)
        file_bytes = self._end * self._layout.cluster_size
        return self._collect_with(least, *self._header.snapshots.l1_ranges(file_bytes))

    def without_snapshots(self) -> array[int]:
        """The clusters of the tables as they are now, but for the L1 tables of snapshots."""
        return self._collect_with()

    def _collect_with(self, *ranges: tuple[int, int]) -> array[int]:
        layout = self._layout
        l1, reftable = self._writer.l1, self._writer.reftable
        places = {0}
        crypto = self._header.header.crypto_area or (0, 0)
        for offset, length in (
            (l1.offset, len(l1) * ENTRY_BYTES),
            (reftable.offset, len(reftable) * ENTRY_BYTES),
            (self._header.snapshots.offset, self._header.snapshots.length),
            crypto,
            *ranges,
        ):
            first = offset >> layout.cluster_bits
            places.update(range(first, first + div_up(length, layout.cluster_size)))
        for words in (l1.words, reftable.words):
            places.update((word & OFFSET_MASK) >> layout.cluster_bits for word in words if word)
        return array("Q", sorted(places))
