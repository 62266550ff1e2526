# SPDX-License-Identifier: Apache-2.0
"""Where the image's own tables lie: what no guest's data and no other table may be written over.

Which kinds are looked after is QEMU's option `overlap-check` (options.py). All but one are known
without reading anything: the header (and with it the encryption header), the L1 table and the L2
tables that it names, the refcount table and the blocks that it names, the snapshot table, the
snapshots' L1 tables, the bitmap directory and with it, unlike QEMU, the bitmaps' tables. The L2
tables of snapshots are read once, and again when the snapshots change.

The clusters stand in a sorted array, so a question is one bisection, whatever the size of the
image: 8 bytes for each entry of the L1 and the refcount table, whose sizes are bounded (layout.py).
It is collected at the first question. A table that we make, or free, is entered or taken out; one
that moves (rare) has all be collected again. So the array may name too much, never too little, and
whoever finds a clash asks again after `forget`.

A cluster that is two things stands there twice. That is how a table is found out that lies over
another one.

Context: home thread of the AioContext. Suspends: never, but for `read_inactive`.
"""

from __future__ import annotations

import enum
import errno
from array import array
from bisect import bisect_left, insort
from heapq import merge
from typing import TYPE_CHECKING

from blockemu.drivers.errors import io_error
from blockemu.drivers.qcow2.header import SNAPSHOT_ENTRY_MIN
from blockemu.drivers.qcow2.layout import OFFSET_MASK, Layout, div_up
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES, RootTable
from blockemu.drivers.qcow2.table_cache import words_from

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from blockemu.drivers.qcow2.header_file import HeaderFile
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.metadata_writer import MetadataWriter

_NOWHERE = 1 << 63
"""Behind every cluster: ends the array, twice, so that there is always a next one."""

INACTIVE_BYTES_MAX = 32 * 1024 * 1024
"""Bytes of snapshots' L1 tables read for their L2 tables' places, which take as much memory."""

_SORT_MAX = 1 << 18
"""Numbers sorted at once: as Python objects they take 40 bytes each."""


class Structure(enum.Enum):
    """Kinds of metadata, in the order in which a clash is named."""

    MAIN_HEADER = "header"
    ACTIVE_L1 = "active L1 table"
    ACTIVE_L2 = "active L2 table"
    REFCOUNT_TABLE = "refcount table"
    REFCOUNT_BLOCK = "refcount block"
    SNAPSHOT_TABLE = "snapshot table"
    INACTIVE_L1 = "L1 table of a snapshot"
    INACTIVE_L2 = "L2 table of a snapshot"
    BITMAP_DIRECTORY = "bitmap directory"


class MetadataPlaces:
    """The host clusters of the tables. `kinds`: those that are looked after."""

    def __init__(
        self,
        layout: Layout,
        *,
        file: ImageFile,
        header: HeaderFile,
        writer: MetadataWriter,
        kinds: Collection[Structure],
    ) -> None:
        self._layout = layout
        self._bits = layout.cluster_bits
        self._file = file
        self._header = header
        self._writer = writer
        self._kinds = frozenset(kinds)
        self._inactive_l2 = array("Q")
        self._places: array[int] | None = None if kinds else _nothing()
        header.on_moved = self.forget

    # --- asking ---

    def has(self, kind: Structure) -> bool:
        """This kind is looked after."""
        return kind in self._kinds

    def first_in(self, first: int, clusters: int) -> int | None:
        """The first host cluster of a run that holds metadata, if there is one."""
        places = self._places
        if places is None:
            places = self._collect()
        found = places[bisect_left(places, first)]
        return found if found < first + clusters else None

    def is_clear(self, host: int, length: int) -> bool:
        """No metadata lies in these bytes of the file. `length` > 0."""
        places = self._places
        if places is None:
            places = self._collect()
        return places[bisect_left(places, host >> self._bits)] > (host + length - 1) >> self._bits

    def is_only(self, kind: Structure, cluster: int) -> bool:
        """Nothing else than one table of this kind is known to lie there."""
        places = self._places
        if places is None:
            places = self._collect()
        return places[bisect_left(places, cluster) + (kind in self._kinds)] != cluster

    def kind_of(self, cluster: int, *, besides: Structure | None = None) -> Structure | None:
        """What lies there, other than `besides`. Slow."""
        for kind in Structure:
            if kind in self._kinds and kind is not besides and cluster in self._clusters(kind):
                return kind
        return None

    def without_snapshots(self) -> array[int]:
        """The clusters of all tables as they are now, but for the tables of snapshots."""
        inactive = (Structure.INACTIVE_L1, Structure.INACTIVE_L2)
        return self._sorted(kind for kind in Structure if kind not in inactive)

    # --- keeping up ---

    def add(self, kind: Structure, cluster: int) -> None:
        """A table is made there."""
        if self._places is not None and kind in self._kinds:
            insort(self._places, cluster)

    def remove(self, cluster: int) -> None:
        """No table is there any more."""
        if self._places is not None:
            index = bisect_left(self._places, cluster)
            if self._places[index] == cluster:
                del self._places[index]

    def forget(self) -> None:
        """Tables have moved: collect again when somebody asks."""
        if self._kinds:
            self._places = None

    async def read_inactive(self) -> None:
        """Read which L2 tables the snapshots have, if these are looked after.

        Suspends: to read their L1 tables. Raises: OSError.
        """
        if Structure.INACTIVE_L2 not in self._kinds:
            return
        ranges = self._header.snapshots.l1_ranges(self._file.length)
        total = sum(length for _, length in ranges)
        if total > INACTIVE_BYTES_MAX:
            raise io_error(
                errno.EFBIG,
                f"{self._file.name}: the L1 tables of its snapshots have {total} bytes, and"
                f" overlap-check.inactive-l2 goes with {INACTIVE_BYTES_MAX} at most",
            )
        found = array("Q")
        for offset, length in ranges:
            data = bytearray(length)
            await self._file.read(offset, memoryview(data))
            found.extend(_named(words_from("Q", data), self._bits))
        self._inactive_l2 = found
        self.forget()

    # --- collecting ---

    def _collect(self) -> array[int]:
        self._places = self._sorted(self._kinds)
        return self._places

    def _sorted(self, kinds: Iterable[Structure]) -> array[int]:
        found = _nothing()
        for kind in kinds:
            found.extend(self._clusters(kind))
        parts = (
            array("Q", sorted(found[start : start + _SORT_MAX]))
            for start in range(0, len(found), _SORT_MAX)
        )
        return array("Q", merge(*parts))

    def _clusters(self, kind: Structure) -> Iterator[int]:
        """The clusters of one kind, in no order."""
        if kind is Structure.ACTIVE_L2:
            yield from _named(self._writer.l1.words, self._bits)
        elif kind is Structure.REFCOUNT_BLOCK:
            yield from _named(self._writer.reftable.words, self._bits)
        elif kind is Structure.INACTIVE_L2:
            yield from self._inactive_l2
        else:
            for offset, length in self._ranges(kind):
                first = offset >> self._bits
                yield from range(first, first + div_up(length, self._layout.cluster_size))

    def _ranges(self, kind: Structure) -> list[tuple[int, int]]:
        """(offset, length) of the tables of a kind that isn't named by another table's entries."""
        header, snapshots = self._header.header, self._header.snapshots
        if kind is Structure.MAIN_HEADER:
            crypto = header.crypto_area
            return [(0, self._layout.cluster_size), *([crypto] if crypto is not None else ())]
        if kind is Structure.ACTIVE_L1:
            return [_range(self._writer.l1)]
        if kind is Structure.REFCOUNT_TABLE:
            return [_range(self._writer.reftable)]
        if kind is Structure.SNAPSHOT_TABLE:
            least = header.nb_snapshots * SNAPSHOT_ENTRY_MIN
            return [(header.snapshots_offset, max(least, snapshots.length))]
        if kind is Structure.INACTIVE_L1:
            return snapshots.l1_ranges(self._file.length)
        assert kind is Structure.BITMAP_DIRECTORY
        return [(offset, length) for _, offset, length in self._header.bitmaps.ranges()]


def _nothing() -> array[int]:
    return array("Q", (_NOWHERE, _NOWHERE))


def _named(words: array[int], bits: int) -> Iterator[int]:
    """The clusters that the entries of a table name."""
    return ((word & OFFSET_MASK) >> bits for word in words if word & OFFSET_MASK)


def _range(table: RootTable) -> tuple[int, int]:
    return table.offset, len(table) * ENTRY_BYTES
