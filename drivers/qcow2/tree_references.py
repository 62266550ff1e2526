# SPDX-License-Identifier: Apache-2.0
"""All references that an L1 table stands for, counted up or down: what snapshots are made of.

An L1 table refers to L2 tables, and each of these to host clusters. A snapshot is one more L1 table
that names the same L2 tables: they, and all that they name, get one more reference *for each way*
that leads to them. So the two trees share what neither has changed since, and whoever changes
something copies it first, because COPIED is clear.

COPIED must say, in what the active L1 table leads to, whether a refcount is exactly 1. When
something is shared it is cleared (`without_copied`); when a snapshot is gone it is set where what
is left is ours alone (`mark_own`). Counts and flags are those of tables that are prepared beside
the ones in use (shadow_tables.py), so no crash comes between the two.

When one L1 table takes the place of another, what both lead to in the same place keeps its count:
it is left out on both sides (`instead_of`, `instead`). So that costs what differs, and needs no
count above those of before and after.

Context: home thread of the AioContext, alone with the image, under the metadata mutex. All yield to
the loop between slices, so that a large tree doesn't stop the other images of a thread.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.errors import io_error
from blockemu.drivers.qcow2.layout import COMPRESSED, COPIED, L1_RESERVED, OFFSET_MASK, ZERO
from blockemu.drivers.qcow2.metadata_writer import Reference
from blockemu.loop.sync import yield_now

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image import Image
    from blockemu.drivers.qcow2.shadow_tables import ShadowTables
    from blockemu.drivers.qcow2.table_cache import Slice


class Run(NamedTuple):
    """Entries of a slice from `start` on. `reference`: the host clusters that they name, one for
    each entry, or all those of one compressed cluster."""

    start: int
    reference: Reference
    is_compressed: bool = False


async def share(image: Image, words: array[int], *, instead_of: array[int] | None = None) -> None:
    """Count one more reference to all that these L1 entries lead to. What `instead_of` leads to in
    the same place isn't counted.

    Suspends: for tables. Raises: ImageError (a count is at its limit), OSError; some counts are
    higher then.
    """
    for entry, other in _pairs(words, instead_of):
        if not _same(entry, other):
            table = _table(image, entry)
            for reference in await _references(image, table, other):
                await image.refcounts.share(reference)
            await image.refcounts.share(_reference(image, table))


async def without_copied(image: Image, tables: ShadowTables, entry: int) -> int:
    """An L2 table that holds what that of an L1 entry holds, COPIED clear: itself, or a copy.

    Returns its host offset. Suspends: for tables. Raises: OSError.
    """
    table = _table(image, entry)
    for start in _slices(image, table):
        if max((await image.l2.load(start)).words) >= COPIED:
            break
    else:
        return table
    copy = await tables.copy_table(table)
    for start in _slices(image, copy):
        found = await image.l2.load(start)
        _replace(image, found, array("Q", [word & ~COPIED for word in found.words]))
    return copy


async def drop(image: Image, words: array[int], *, instead: array[int] | None = None) -> None:
    """Count one reference less to all that these L1 entries lead to, which nothing on disk may name
    by this way any more. What `instead` leads to in the same place isn't counted. What is then used
    by nobody is free, and the host is offered its space.

    Never fails: what can't be counted down is leaked, and logged. Suspends: for tables.
    """
    for entry, other in _pairs(words, instead):
        if _same(entry, other):
            continue
        try:
            table = _table(image, entry)
            references = await _references(image, table, other)
        except OSError as error:
            image.damage.report(f"L1 entry {entry:#x}: what it leads to leaks: {error}")
            continue
        for reference in references:
            await image.refcounts.release(reference._replace(discard=True))
        await image.refcounts.release(_reference(image, table)._replace(discard=True))


async def mark_own(
    image: Image, tables: ShadowTables, words: array[int], indexes: Iterable[int]
) -> None:
    """Set COPIED to what the counts say, in these active L1 entries and their L2 tables, or in
    copies of them. `words`, all the entries, are changed in place.

    Suspends: for tables. Raises: OSError of the file. A table that is damaged is left as it is.
    """
    for index in indexes:
        if not words[index]:
            continue
        try:
            table = _table(image, words[index])
            own = bool(await image.refcounts.own(table >> image.layout.cluster_bits, 1))
            flagged = await _flagged(image, table) if own else None
        except OSError as error:
            image.damage.report(f"L1 entry {index}: COPIED flags stay clear: {error}")
            continue
        if flagged is not None:
            tables.forget(_reference(image, table))
            table = await tables.copy_table(table)
            for start, slice_words in zip(_slices(image, table), flagged, strict=True):
                _replace(image, await image.l2.load(start), slice_words)
        # All that a shared table names is shared, too.
        words[index] = table | COPIED if own else table


async def _flagged(image: Image, table: int) -> list[array[int]] | None:
    """The slices of an L2 table with COPIED as the counts say; None, if they are right already."""
    result: list[array[int]] = []
    differs = False
    for start in _slices(image, table):
        found = await image.l2.load(start)
        words, found_runs = found.words[:], runs(image, found, found.words)
        before = found.words[:]
        for first, reference, is_compressed in found_runs:
            if is_compressed:
                continue
            end = first + reference.clusters
            own = await image.refcounts.own(reference.first, reference.clusters)
            flagged = [word & ~COPIED for word in words[first:end]]
            for step in own:
                flagged[step] |= COPIED
            words[first:end] = array("Q", flagged)
        result.append(words)
        differs = differs or words != before
        await yield_now()
    return result if differs else None


async def _references(image: Image, table: int, other: int) -> list[Reference]:
    """What an L2 table refers to, and the one that the L1 entry `other` names doesn't.

    An `other` that is damaged counts as none: it can't be counted down, but it may be left.
    Suspends: to read, and once for each slice. Raises: OSError.
    """
    references: list[Reference] = []
    try:
        beside = _table(image, other) - table if other else 0
    except OSError:
        beside = 0
    for start in _slices(image, table):
        not_counted = (await image.l2.load(start + beside)).words[:] if beside else array("Q")
        found = await image.l2.load(start)
        words = found.words
        if beside:
            words = array("Q", map(_what_differs, words, not_counted))
        references += [run.reference for run in runs(image, found, words)]
        await yield_now()
    return references


def _what_differs(word: int, other: int) -> int:
    return word if (word ^ other) & ~(COPIED | ZERO) else 0


def _pairs(words: array[int], others: array[int] | None) -> Iterator[tuple[int, int]]:
    """Each L1 entry with the other table's in the same place, or 0."""
    for index, entry in enumerate(words):
        yield entry, others[index] if others is not None and index < len(others) else 0


def _same(entry: int, other: int) -> bool:
    """Both L1 entries name the same L2 table, or the first one none."""
    return not (entry ^ other) & OFFSET_MASK or not entry


def runs(image: Image, found: Slice, words: array[int]) -> list[Run]:
    """What the entries of a slice refer to, neighbours together. `words` are the slice's, with 0
    for those that don't matter.

    Suspends: never. Raises: OSError(EIO), for an entry that can't be right.
    """
    clusters = image.clusters
    size, bits = image.layout.cluster_size, image.layout.cluster_bits
    result: list[Run] = []
    if not any(words):
        return result
    index, end = 0, len(words)
    while index < end:
        word = words[index]
        run = 1
        if word:
            clusters.check_entry(found, index)
            if word & OFFSET_MASK and not word & COMPRESSED:
                expected = word + size
                while index + run < end and words[index + run] == expected:
                    run += 1
                    expected += size
                clusters.check_entry(found, index + run - 1)
                result.append(Run(index, Reference((word & OFFSET_MASK) >> bits, run)))
            elif word & COMPRESSED:
                reference = clusters.reference(word)
                assert reference is not None
                result.append(Run(index, reference, is_compressed=True))
        index += run
    return result


def _replace(image: Image, found: Slice, words: array[int]) -> None:
    """Flags differ at most, so nothing is let go."""
    if found.words != words:
        found.words[:] = words
        image.l2.mark_dirty(found, 0, len(words))


def _reference(image: Image, table: int) -> Reference:
    return Reference(table >> image.layout.cluster_bits, 1, is_table=True)


def _slices(image: Image, table: int) -> range:
    return range(table, table + image.layout.cluster_size, image.l2.slice_bytes)


def _table(image: Image, entry: int) -> int:
    """The L2 table of an L1 entry that isn't 0. Raises: OSError(EIO), if it can't be one."""
    table, size = entry & OFFSET_MASK, image.layout.cluster_size
    if entry & L1_RESERVED or not table or table % size or table + size > image.file.length:
        raise io_error(
            errno.EIO, f"{image.name}: L1 entry {entry:#x} names no L2 table inside the file"
        )
    return table
