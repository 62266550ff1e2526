# SPDX-License-Identifier: Apache-2.0
"""The COPIED flags of the active L1 and L2 tables: set where the refcount is one, and only there.

A flag that is set too much lets a write change a snapshot's data in place; one that is missing
costs a copy. Snapshots' own tables needn't have them right (specification: L1 table entry), so only
the active ones are looked at. The same walk sets them right (`fix`), and takes the flag off
compressed clusters, which may not have it at all. Clusters of an external data file aren't counted,
and must have it. A table that lies over something else isn't written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from blockemu.drivers.qcow2.entry_runs import CHUNK_ENTRIES, EntryReader, runs_of, write_entries
from blockemu.drivers.qcow2.l2_table import read_l2, write_l2
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES

if TYPE_CHECKING:
    from array import array

    from blockemu.drivers.qcow2.findings import Findings
    from blockemu.drivers.qcow2.header import Header
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.metadata_walk import MetadataWalk

Lookup = Callable[[int, int], Awaitable[bytes]]
"""Refcounts of a run of clusters, `(first, clusters)`, a byte each. Raises: OSError where they
can't be told; the flags are then left alone."""


class CopiedFlags:
    """One walk over the active tables. Context: home thread of the file's AioContext."""

    def __init__(
        self,
        header: Header,
        file: ImageFile,
        findings: Findings,
        walk: MetadataWalk,
        lookup: Lookup,
        *,
        fix: bool,
    ) -> None:
        self._header = header
        self._file = file
        self._findings = findings
        self._walk = walk
        self._lookup = lookup
        self._fix = fix
        self._bits = header.cluster_bits
        self._reader = EntryReader(file)

    async def run(self) -> None:
        """Look at all flags. Raises: OSError, only when a fix can't be written."""
        await self._l1()
        for cluster, weight in self._walk.active_tables.counted():
            await self._l2(cluster << self._bits, weight, fix=self._walk.is_only_table(cluster))
        for offset, (weight, _) in self._walk.unaligned_tables.items():
            if weight:
                await self._l2(offset, weight, fix=False)

    async def _read(self, offset: int, entries: int) -> array[int] | None:
        try:
            return await self._reader.read(offset, entries)
        except OSError:
            return None  # said by the walk that counted

    async def _counts(self, first: int, clusters: int) -> bytes | None:
        try:
            return await self._lookup(first, clusters)
        except OSError:
            return None  # said by the comparison

    async def _l1(self) -> None:
        table, entries = self._header.l1_table_offset, self._header.l1_size
        for start in range(0, entries, CHUNK_ENTRIES):
            offset = table + start * ENTRY_BYTES
            words = await self._read(offset, min(CHUNK_ENTRIES, entries - start))
            changed: list[int] = []
            for index, entry in enumerate(words or ()):
                if entry & OFFSET_MASK:
                    place = offset + index * ENTRY_BYTES
                    if await self._run("L1 entry", range(place, place + 1), entry, 1):
                        changed.append(index)
            if words is not None and changed and self._walk.is_only_l1():
                await self._flip(offset, words, changed)

    async def _l2(self, offset: int, weight: int, *, fix: bool) -> None:
        try:
            table = await read_l2(self._reader, self._header.layout, offset)
        except OSError:
            return  # as above
        if table is None:
            return
        changed: list[int] = []
        for run in runs_of(table.words, 1 << self._bits):
            if run.value & COMPRESSED:
                if run.value & COPIED:
                    changed.append(run.at)
            elif run.value & OFFSET_MASK:
                end = run.at + max(run.entries, 1)
                places = range(table.place(run.at), table.place(end), table.place(1) - offset)
                wrong = await self._run(
                    "L2 entry", places, run.value, weight,
                    counted=not self._header.has_data_file,
                )  # fmt: skip
                changed += [run.at + step for step in wrong]
        if changed and fix and self._fix:
            for index in changed:
                table.words[index] ^= COPIED
            await write_l2(self._file, table, changed)

    async def _run(
        self, kind: str, places: range, value: int, weight: int, *, counted: bool = True
    ) -> list[int]:
        """Which entries of a run, counted from its start, have a flag that is wrong. `places`:
        where they lie; `value`: the first one. Not `counted`: each target has one name."""
        first, entries = (value & OFFSET_MASK) >> self._bits, len(places)
        counts = await self._counts(first, entries) if counted else b"\1" * entries
        if counts is None:
            return []
        copied = bool(value & COPIED)
        if (counts.count(1) == entries) if copied else not counts.count(1):
            return []
        wrong = [step for step, count in enumerate(counts) if (count == 1) is not copied]
        state = "set" if copied else "not set"
        for step in wrong:
            self._findings.corruption(
                f"{kind} at {places[step]:#x} has COPIED {state}, "
                f"the refcount of its host cluster {first + step} is {counts[step]}",
                weight,
            )
        return wrong

    async def _flip(self, offset: int, words: array[int], changed: list[int]) -> None:
        if self._fix:
            for index in changed:
                words[index] ^= COPIED
            await write_entries(self._file, offset, words, changed)
