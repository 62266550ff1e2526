# SPDX-License-Identifier: Apache-2.0
"""All references that an L1 table stands for, counted up or down: what snapshots are made of.

An L1 table refers to L2 tables, and each of these to host clusters. A snapshot is one more L1 table
that names the same L2 tables: they, and all that they name, get one more reference *for each way*
that leads to them. So the two trees share what neither has changed since, and whoever changes
something copies it first, because COPIED is clear.

COPIED must say, in what the active L1 table leads to, whether a refcount is exactly 1. Before
something is shared it is cleared (`share`); when a snapshot is gone it is set where what is left
is ours alone (`mark_own`). A crash between a count and its flag leaves a flag that is stale but
harmless: clear, though the cluster is ours alone (a copy too many), or set, though a count is one
too high for a reference that never came to be (a leak).

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
    from blockemu.drivers.qcow2.table_cache import Slice


class Run(NamedTuple):
    """Entries of a slice from `start` on. `reference`: the host clusters that they name, one for
    each entry, or all those of one compressed cluster."""

    start: int
    reference: Reference
    is_compressed: bool = False


async def share(image: Image, words: array[int], *, instead_of: array[int] | None = None) -> None:
    """Count one more reference to all that these L1 entries lead to, and clear COPIED there. What
    `instead_of` leads to in the same place isn't counted.

    Suspends: for tables. Raises: ImageError (a count is at its limit), OSError; then all counts are
    as before, and flags that should be set may be clear (`mark_own`).
    """
    done = 0
    try:
        for entry, other in _pairs(words, instead_of):
            if not _same(entry, other):
                await _share_table(image, _table(image, entry), other)
            done += 1
    except BaseException:
        await drop(image, words[:done], instead=instead_of)
        raise


async def _share_table(image: Image, table: int, other: int) -> None:
    references = await _references(image, table, other)
    for start in _slices(image, table):
        _clear_copied(image, await image.l2.load(start))
    own = Reference(table >> image.layout.cluster_bits, 1, is_table=True)
    references.append(own)
    done = 0
    try:
        for reference in references:
            await image.refcounts.share(reference)
            done += 1
    except BaseException:
        for reference in references[:done]:
            await image.refcounts.release(reference)
        raise


async def drop(image: Image, words: array[int], *, instead: array[int] | None = None) -> None:
    """Count one reference less to all that these L1 entries lead to, which nothing on disk may name
    by this way any more. What `instead` leads to in the same place isn't counted. What is then used
    by nobody is free, and the host is offered its space.

    Never fails: what can't be counted down is leaked, and logged. Suspends: for tables.
    """
    tables = []
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
        await image.refcounts.apply_released()
        tables.append(table)
    for table in tables:  # only now: each makes the places of metadata be looked up again
        first = table >> image.layout.cluster_bits
        await image.refcounts.release(Reference(first, 1, is_table=True, discard=True))
    await image.refcounts.apply_released()


async def mark_own(image: Image, indexes: Iterable[int]) -> None:
    """Set COPIED to what the counts say, in these active L1 entries and their L2 tables.

    Never fails: a flag that stays clear costs a copy. Suspends: for tables.
    """
    for index in indexes:
        entry = image.l1.words[index]
        if not entry:
            continue
        try:
            table = _table(image, entry)
            own = bool(await image.refcounts.own(table >> image.layout.cluster_bits, 1))
            wanted = entry | COPIED if own else entry & ~COPIED
            if wanted != entry:
                image.l1.put(index, wanted)
            if own:  # else all that it names is shared, too
                await _mark_own_entries(image, table)
        except OSError as error:
            image.damage.report(f"L1 entry {index}: COPIED flags stay clear: {error}")


async def _mark_own_entries(image: Image, table: int) -> None:
    for start in _slices(image, table):
        found = await image.l2.load(start)
        words, found_runs = found.words[:], runs(image, found, found.words)
        for first, reference, is_compressed in found_runs:
            if is_compressed:
                continue
            end = first + reference.clusters
            own = await image.refcounts.own(reference.first, reference.clusters)
            flagged = [word & ~COPIED for word in words[first:end]]
            for step in own:
                flagged[step] |= COPIED
            words[first:end] = array("Q", flagged)
        _replace(image, await image.l2.load(start), words)
        await yield_now()


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


def _clear_copied(image: Image, found: Slice) -> None:
    if max(found.words) >= COPIED:
        _replace(image, found, array("Q", [word & ~COPIED for word in found.words]))


def _replace(image: Image, found: Slice, words: array[int]) -> None:
    """Flags differ at most, so nothing is let go."""
    if found.words != words:
        found.words[:] = words
        image.l2.mark_dirty(found, 0, len(words))


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
