# SPDX-License-Identifier: Apache-2.0
"""The check of a qcow2 image: do the refcounts say what the tables do?

Three steps: count what names each host cluster (metadata_walk.py), compare that with the refcounts
(here), look at the COPIED flags (copied_flags.py). Nothing is written; repair.py does that with
what an `Examination` has found, and examines again.

It works on the file below the image, not on an open qcow2 node: a damaged image need not be one
that can be opened. What the header says must be possible, though, and the active L1 table must be
there; without it there is nothing to compare with.

The kinds of findings and what counts as one of each follow qemu-img check, so that the numbers of
both can be compared (tests/unit/img/test_check_against_qemu_img.py has the exceptions).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.copied_flags import CopiedFlags
from blockemu.drivers.qcow2.data_file_walk import DataFileWalk
from blockemu.drivers.qcow2.disk_refcounts import DiskRefcounts
from blockemu.drivers.qcow2.findings import CheckResult, Findings, Say
from blockemu.drivers.qcow2.header import Header, check_tables
from blockemu.drivers.qcow2.layout import SECTOR, div_up, round_up
from blockemu.drivers.qcow2.metadata_walk import MetadataWalk
from blockemu.drivers.qcow2.reference_counts import LARGE, Allowance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockemu.drivers.qcow2.image_file import ImageFile


COMPARED_AT_ONCE = 64
"""Counts; of a block with few differences, most is skipped in such steps."""


class Examination:
    """One check, and all that it learned. Context: home thread of the file's AioContext."""

    def __init__(self, name: str, header: Header, file: ImageFile, *, say: Say) -> None:
        self.name = name
        self.header = header
        self.file = file
        self.findings = Findings(say)
        walk_class = DataFileWalk if header.has_data_file else MetadataWalk
        self.walk = walk_class(name, header, file, self.findings, Allowance(name))
        self.disk: DiskRefcounts
        self.result = CheckResult()
        self._used_end = 0

    async def run(self) -> CheckResult:
        """Raises: ImageError: the check can't be done."""
        check_places(self.name, self.header, file_bytes=self.file.length)
        try:
            self.disk = await DiskRefcounts.read(self.header, self.file)
            await self.walk.run()
            self.walk.count_refcount_structures(self.disk)
            await self._compare()
            await CopiedFlags(
                self.header, self.file, self.findings, self.walk, self.disk.clipped, fix=False
            ).run()
        except OSError as error:
            raise ImageError.from_os_error(self.name, error) from error
        self.findings.close()
        return self._sum()

    def forget(self) -> None:
        """Give back the memory of the counts; nothing can be asked of them any more."""
        del self.walk

    def _sum(self) -> CheckResult:
        findings, walk, result = self.findings, self.walk, self.result
        result.corruptions, result.leaks = findings.corruptions, findings.leaks
        result.check_errors = findings.check_errors
        result.image_end_offset = self._used_end << self.header.cluster_bits
        size = round_up(self.header.size, SECTOR)
        result.total_clusters = div_up(size, self.header.cluster_size)
        result.allocated_clusters = walk.allocated
        result.fragmented_clusters = walk.fragmented
        result.compressed_clusters = walk.compressed
        return result

    # --- comparing ---

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """`(block, first cluster, clusters)` of all ranges where anything is counted or names."""
        counts, end, bits = self.walk.counts, self.walk.end, self.header.layout.block_bits
        entries = 1 << bits
        index = 0
        while index << bits < end:
            first = index << bits
            clusters = min(entries, end - first)
            if index >= len(self.disk.table):
                found = counts.next_page(first)
                if found is None:
                    return
                index = found >> bits
                first = index << bits
                clusters = min(entries, end - first)
                if clusters <= 0:
                    return
                yield index, first, clusters
            elif self.disk.table[index] or counts.has_page(first, clusters):
                yield index, first, clusters
            index += 1

    async def _compare(self) -> None:
        for index, first, clusters in self.blocks():
            if not self.disk.is_readable(index):
                self.findings.check_error(
                    f"refcounts of host clusters {first}+{clusters} can't be read: "
                    f"block {index} can't be anywhere",
                    clusters,
                )
                continue
            wanted = self.walk.counts.clipped(first, clusters)
            if not self.disk.block_offset(index):
                data, found = b"", bytes(clusters)
                if wanted.count(0) != clusters and self.walk.rebuild is None:
                    self.walk.rebuild = f"host clusters from {first} on have no refcount block"
            else:
                data = await self.disk.block(index)
                found = self.disk.width.clip(data)[:clusters]
            used = max(len(found.rstrip(b"\0")), len(wanted.rstrip(b"\0")))
            if used:
                self._used_end = first + used
            if found != wanted or LARGE in found:
                self._compare_block(first, found, wanted, data)

    def _compare_block(self, first: int, found: bytes, wanted: bytes, data: bytes) -> None:
        if LARGE not in found and wanted.count(0) == len(wanted):
            leaked = len(found) - found.count(0)
            if leaked == len(found) == found.count(found[0]):
                self._difference(first, first + leaked, found[0], 0)
                return
            if not self.findings.wants_lines:
                self.findings.leak(f"{leaked} host clusters from {first} on", leaked)
                return
        run: tuple[int, int, int, int] | None = None
        for position in _differing(found, wanted):
            ours, theirs = wanted[position], found[position]
            if ours == LARGE:
                ours = self.walk.counts.get(first + position)
            if theirs == LARGE:
                theirs = self.disk.width.get(data, position)
            cluster = first + position
            if run is not None and (run[1] != cluster or run[2:] != (theirs, ours)):
                self._difference(*run)
                run = None
            if ours != theirs:
                run = (run[0] if run is not None else cluster), cluster + 1, theirs, ours
        if run is not None:
            self._difference(*run)

    def _difference(self, first: int, end: int, refcount: int, references: int) -> None:
        """Of the clusters `[first, end)`, each."""
        clusters = end - first
        offset = first << self.header.cluster_bits
        which = f"host cluster {first}" if clusters == 1 else f"host clusters {first}+{clusters}"
        line = f"{which} at {offset:#x}: refcount {refcount}, {references} references"
        if refcount > references:
            self.findings.leak(line, clusters)
        else:
            self.findings.corruption(line, clusters)


def _differing(found: bytes, wanted: bytes) -> Iterator[int]:
    """Where two blocks of counts differ, or may: both say "large"."""
    for base in range(0, len(found), COMPARED_AT_ONCE):
        ours, theirs = wanted[base : base + COMPARED_AT_ONCE], found[base : base + COMPARED_AT_ONCE]
        if ours == theirs and LARGE not in theirs:
            continue
        for position, (one, other) in enumerate(zip(ours, theirs, strict=True), base):
            if one != other or other == LARGE:
                yield position


def check_places(name: str, header: Header, *, file_bytes: int) -> None:
    """Refuse what leaves nothing to check. Raises: ImageError."""
    check_tables(
        name,
        replace(header, refcount_table_clusters=0, nb_snapshots=0),
        file_bytes=file_bytes,
    )
    for table, offset, used in (
        ("refcount table", header.refcount_table_offset, True),
        ("snapshot table", header.snapshots_offset, header.nb_snapshots > 0),
    ):
        if used and offset % header.cluster_size:
            raise ImageError(name, f"the {table} at offset {offset} is not aligned to a cluster")
