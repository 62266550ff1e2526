# SPDX-License-Identifier: Apache-2.0
"""Repairs what a check has found: has refcounts and COPIED flags say what the tables do.

The tables are what is believed. An entry that names a place past the end of the file, or no cluster
at all, stays as it is: what it should be, nobody knows.

What a power cut in between leaves is never worse than what was there. Each step is durable before
the next begins:

1. Zero clusters whose preallocated place isn't aligned lose it: they read as zeroes as before. So
   do clusters none of whose subclusters is there. Compressed ones lose a bitmap of subclusters,
   which nobody looks at.
2. Refcounts that are too low are raised where they are. Where they can't be (a block is missing,
   not aligned, past the end, or lies over something else), all refcounts are written anew behind
   the end of the file, and the header is written last, in one sector, to name them: the old ones
   hold until then, and nothing of theirs is written over.
3. COPIED flags are set right. None is set for a cluster that has two names.
4. Refcounts that are too high are lowered.
5. The dirty and the corrupt bit are taken off when another check has found nothing wrong.

`-r leaks` is step 4 alone (and 5).
"""

from __future__ import annotations

import enum
import logging
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.bitmap_directory import AUTOCLEAR_BITMAPS
from blockemu.drivers.qcow2.check import Examination
from blockemu.drivers.qcow2.compression import TYPE_NAMES
from blockemu.drivers.qcow2.copied_flags import CopiedFlags
from blockemu.drivers.qcow2.entry_runs import EntryReader, runs_of
from blockemu.drivers.qcow2.features import CORRUPT, DIRTY, RAW_DATA
from blockemu.drivers.qcow2.findings import CheckResult, Findings, Say, say_nothing
from blockemu.drivers.qcow2.header_file import HeaderFile, read_header
from blockemu.drivers.qcow2.image_file import ImageFile
from blockemu.drivers.qcow2.l2_table import L2Table, read_l2, write_l2
from blockemu.drivers.qcow2.layout import COMPRESSED, OFFSET_MASK, SECTOR, ZERO
from blockemu.drivers.qcow2.refcount_rebuild import Gaps, rebuild_refcounts
from blockemu.drivers.qcow2.reference_counts import LARGE

if TYPE_CHECKING:
    from blockemu.drivers.child import BdrvChild
    from blockemu.drivers.qcow2.header import Header

log = logging.getLogger(__name__)


class Repair(enum.Enum):
    """How far a repair may go."""

    LEAKS = "leaks"
    ALL = "all"


async def check_image(
    name: str, child: BdrvChild, *, repair: Repair | None = None, say: Say = say_nothing
) -> CheckResult:
    """Check the qcow2 image in the file `child`, and repair it.

    `child` must be writable for a repair. `say` is told each finding, once, before the repair. The
    result is what holds at the end. Context: home thread of the child's node.
    Raises: ImageError: the image can't be checked, or not repaired.
    """
    header = await read_header(name, child)
    if header.compression_type not in TYPE_NAMES:
        raise ImageError(name, f"compression type {header.compression_type} is not supported")
    file = ImageFile(child, cluster_size=header.cluster_size, name=name)
    return await check_and_repair(name, header, file, repair=repair, say=say)


async def check_and_repair(
    name: str, header: Header, file: ImageFile, *, repair: Repair | None, say: Say
) -> CheckResult:
    """The same for an image whose header is known; `header` is kept up to date."""
    examined = Examination(name, header, file, say=say)
    before = await examined.run()
    if repair is None:
        return before
    if examined.walk.unreadable:
        raise ImageError(name, "a table can't be read, so what isn't in use can't be told")
    try:
        work = _Repair(examined)
        await work.begin()
        after = before
        if before.leaks or not before.is_clean:
            await work.run(repair)
            work.forget()
            after = await Examination(name, header, file, say=say_nothing).run()
        if after.is_clean:
            await work.header_file.clear_incompatible(DIRTY | CORRUPT)
    except OSError as error:
        raise ImageError.from_os_error(name, error) from error
    after.corruptions_fixed = max(before.corruptions - after.corruptions, 0)
    after.leaks_fixed = max(before.leaks - after.leaks, 0)
    return after


async def repair_dirty(name: str, header: Header, file: ImageFile) -> None:
    """Repair an image that is about to be opened for writing and wasn't closed.

    Raises: ImageError: it couldn't be repaired, and is dirty still.
    """
    log.warning("%s: was not closed cleanly; repairing its refcounts", name)
    result = await check_and_repair(name, header, file, repair=Repair.ALL, say=log.info)
    if not result.is_clean:
        raise ImageError(
            name,
            "was not closed cleanly, and repairing its refcounts left "
            f"{result.corruptions + result.check_errors} errors: look at them with "
            f"blockemu img check {name}",
        )
    log.warning(
        "%s: repaired: %d errors, %d leaked clusters",
        name, result.corruptions_fixed, result.leaks_fixed,
    )  # fmt: skip


class _Repair:
    """The steps, on what one examination found."""

    def __init__(self, examined: Examination) -> None:
        self._name = examined.name
        self._header = examined.header
        self._file = examined.file
        self._examined = examined
        self.header_file = HeaderFile(self._header, self._file)

    async def begin(self) -> None:
        """Before the first change: data that only others could keep right is theirs no more."""
        raw = RAW_DATA if self._header.has_data_file else 0
        await self.header_file.keep_autoclear(AUTOCLEAR_BITMAPS | raw)

    async def run(self, repair: Repair) -> None:
        """Steps 1 to 4. Raises: ImageError, OSError."""
        if repair is Repair.LEAKS:
            if self._examined.walk.rebuild is not None:
                raise ImageError(
                    self._name,
                    f"{self._examined.walk.rebuild}: before leaks can be repaired, the refcounts "
                    "must be written anew, which -r all does",
                )
            await self._adjust(raising=False)
            return
        walk = self._examined.walk
        if (walk.unaligned_zeroes and self._header.version >= 3) or walk.stray_bitmaps:
            await self._mend_entries()
            self.forget()
            await self._examine_again()
        if self._examined.walk.rebuild is not None:
            gaps = Gaps.of(self._examined)
            self.forget()
            await rebuild_refcounts(
                self._name,
                self._header,
                self._file,
                self.header_file,
                gaps,
            )
            await self._examine_again()
        await self._adjust(raising=True)
        await self._fix_flags()
        await self._adjust(raising=False)

    def forget(self) -> None:
        """Give memory back: two sets of counts at a time are more than a check may take."""
        self._examined.forget()

    async def _examine_again(self) -> None:
        self._examined = Examination(self._name, self._header, self._file, say=say_nothing)
        await self._examined.run()

    async def _mend_entries(self) -> None:
        reader = EntryReader(self._file)
        size, layout = self._header.cluster_size, self._header.layout
        for cluster, _ in self._examined.walk.tables.counted():
            if not self._examined.walk.is_only_table(cluster):
                continue
            table = await read_l2(reader, layout, cluster * size)
            changed = _mend(table, size) if table is not None else []
            if table is not None and changed:
                await write_l2(self._file, table, changed)
        await self._file.flush()

    async def _fix_flags(self) -> None:
        walk, disk = self._examined.walk, self._examined.disk

        async def lookup(first: int, clusters: int) -> bytes:
            """As step 4 will leave it; behind the file's end nothing is adjusted."""
            inside = min(clusters, max(walk.end - first, 0))
            behind = await disk.clipped(first + inside, clusters - inside)
            return walk.counts.clipped(first, inside) + behind

        await CopiedFlags(
            self._header,
            self._file,
            Findings(say_nothing),
            self._examined.walk,
            lookup,
            fix=True,
        ).run()
        await self._file.flush()

    async def _adjust(self, *, raising: bool) -> None:
        """Write refcounts that are too low (or too high) in the blocks where they are."""
        counts, disk = self._examined.walk.counts, self._examined.disk
        for index, first, clusters in self._examined.blocks():
            if not disk.block_offset(index) or not disk.is_readable(index):
                continue
            data = await disk.block(index)
            found, wanted = disk.width.clip(data)[:clusters], counts.clipped(first, clusters)
            if found == wanted and LARGE not in found:
                continue
            changed = bytearray(data)
            for position in range(clusters):
                if found[position] == wanted[position] != LARGE:
                    continue
                reference, refcount = counts.get(first + position), disk.width.get(data, position)
                if reference != refcount and (reference > refcount) is raising:
                    disk.width.set(changed, position, reference)
            await self._write_changes(disk.block_offset(index), data, changed)
        await self._file.flush()

    async def _write_changes(self, offset: int, old: bytes, new: bytearray) -> None:
        view = memoryview(new)
        for start in range(0, len(new), SECTOR):
            if view[start : start + SECTOR] != old[start : start + SECTOR]:
                await self._file.write(offset + start, view[start : start + SECTOR])


def _mend(table: L2Table, cluster_size: int) -> list[int]:
    """Step 1 on one table, in memory; the entries that are changed now."""
    changed = []
    for run in runs_of(table.words, cluster_size):
        if run.entries:
            continue
        index, word = run.at, run.value
        if word & COMPRESSED:
            if table.bitmaps is not None and table.bitmaps[index]:
                table.bitmaps[index] = 0
                changed.append(index)
        elif word & OFFSET_MASK & (cluster_size - 1):
            if table.bitmaps is not None and not table.holds_data(index):
                table.words[index] = 0
                changed.append(index)
            elif table.bitmaps is None and word & ZERO:
                table.words[index] = ZERO
                changed.append(index)
    return changed
