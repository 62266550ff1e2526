# SPDX-License-Identifier: Apache-2.0
"""Another set of an image's tables, prepared beside the one in use and switched to by one write.

A snapshot changes a reference count and the COPIED flags of the entries that name the cluster. The
two lie in different sectors, so whichever is written first, a power cut between them leaves a flag
that isn't what the count says. That does no harm, but the format calls it an error, and
`qemu-img check` counts it as a corruption. No order of writes in place helps.

But the header's one sector names all three roots: the L1 table, the refcount table, the snapshot
table. So all blocks of counts are copied, and every L2 table of which an entry changes; the copies
are changed, and the header is written once. Before that write there is the old image, bit by bit as
it was but for leaks; after it, the new one.

    begin      places for the copies are taken, by the old counts (after a cut: leaks);
               blocks of counts are copied, and memory uses the copies from here on
    meanwhile  counts go up and down in the copies; what would become free stays taken, since the
               disk still shows the old image; L2 tables are copied before a flag changes
    commit     all is durable -> header: L1, refcount and snapshot table, disk size
               then what only the old image used is free (after a cut: leaks)

It costs reading and writing the counts of all that is in use: 32 MiB for a TiB at 64 KiB clusters.
Making a snapshot has to write these anyway.

Context: home thread of the AioContext, alone with the image, as snapshot.py.
"""

from __future__ import annotations

from array import array
from contextlib import asynccontextmanager
from itertools import chain
from typing import TYPE_CHECKING

from blockemu.drivers.qcow2.layout import div_up
from blockemu.drivers.qcow2.metadata_writer import Reference
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.table_cache import disk_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from blockemu.drivers.qcow2.image import Image
    from blockemu.drivers.qcow2.snapshot_table import SnapshotTable

COPY_BYTES = 1024 * 1024
"""Bytes of a refcount block copied at once."""


class ShadowTables:
    """The tables that are prepared. Get one by `prepared`."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._reserved: list[Reference] = []
        self._unused: list[Reference] = []
        self._old: tuple[array[int], int] | None = None
        """The refcount table and its place, while memory uses another one."""
        self._l1: tuple[array[int], int] = (array("Q"), 0)
        """The L1 table to switch to, and its place."""
        self._is_over = False
        """Switched, or nobody knows: there is no way back."""

    async def copy_table(self, table: int) -> int:
        """A copy of the L2 table at host offset `table`, which may be changed. It has one
        reference, the original one less once all is over. Returns its host offset.

        Suspends: for tables. Raises: OSError.
        """
        image = self._image
        taken = await image.refcounts.allocate(1)
        host = taken.first << image.layout.cluster_bits
        for start in range(0, image.layout.cluster_size, image.l2.slice_bytes):
            await image.l2.insert_copy(host + start, source=table + start)
        return host

    def forget(self, reference: Reference) -> None:
        """Only the old image names these clusters. Suspends: never."""
        self._unused.append(reference)

    async def write_l1(self, words: array[int]) -> None:
        """The L1 table to switch to. To be called once, before `commit`. Raises: OSError."""
        place = await self.write_new(disk_bytes(words))
        self._l1 = words, place.first << self._image.layout.cluster_bits

    async def commit(
        self, *, snapshots: SnapshotTable | None = None, size: int | None = None
    ) -> None:
        """Switch to what is prepared, with another snapshot table or another disk size.

        Suspends: for I/O. Raises: OSError, before the header is written: `prepared` goes back; or
        of the header's write: no metadata is written any more.
        """
        image = self._image
        old = self._old_places()
        image.reftable.drop_changes()  # all of it is written; nothing is allocated from here on
        await image.file.write(image.reftable.offset, disk_bytes(image.reftable.words))
        await image.writer.flush()
        self._is_over = True
        words, offset = self._l1
        try:
            await image.header_file.switch(
                l1=(offset, len(words)), reftable=image.reftable, snapshots=snapshots, size=size
            )
        except BaseException:
            image.writer.stop("the new tables may not be in the header")
            raise
        image.l1.replace(words, offset=offset)
        for reference in chain(self._unused, image.refcounts.stop_postponing(), old):
            await image.refcounts.release(reference)
        await image.refcounts.apply_released()

    async def write_new(self, data: bytes) -> Reference:
        """A table in clusters of its own. Not durable yet. Raises: OSError."""
        image = self._image
        clusters = max(div_up(len(data), image.layout.cluster_size), 1)
        taken = await image.refcounts.allocate_contiguous(clusters)
        padded = data + bytes(-len(data) % image.file.granule)
        await image.file.write(taken.first << image.layout.cluster_bits, padded)
        return Reference(taken.first, clusters, is_table=True)

    # --- beginning ---

    async def begin(self) -> None:
        """See above. Suspends: for I/O. Raises: OSError."""
        image = self._image
        await self._reserve()
        await image.writer.flush()
        table, *blocks = self._reserved
        places = [at for run in blocks for at in range(run.first, run.first + run.clusters)]
        words = image.reftable.words[:]
        used = [index for index, word in enumerate(words) if word]
        for index, place in zip(used, places, strict=True):
            host = place << image.layout.cluster_bits
            await self._copy_cluster(words[index], host)
            words[index] = host
        self._old = (image.reftable.words, image.reftable.offset)
        image.blocks.forget_all()
        image.reftable.replace(words, offset=table.first << image.layout.cluster_bits)
        image.refcounts.start_postponing()
        image.overlaps.places.forget()

    async def _reserve(self) -> None:
        """Take places for the refcount table and all blocks, as the old image counts."""
        image, size = self._image, self._image.layout.cluster_size
        taken = 0
        while True:
            clusters = len(image.reftable) * ENTRY_BYTES // size
            if not self._reserved or self._reserved[0].clusters != clusters:
                run = await image.refcounts.allocate_contiguous(clusters)
                if self._reserved:
                    await image.refcounts.release(self._reserved[0])
                self._reserved[:1] = [Reference(run.first, clusters, is_table=True)]
                continue
            missing = sum(map(bool, image.reftable.words)) - taken
            if missing <= 0:
                return
            run = await image.refcounts.allocate(missing)
            self._reserved.append(Reference(run.first, run.clusters, is_table=True))
            taken += run.clusters

    async def _copy_cluster(self, source: int, target: int) -> None:
        size, file = self._image.layout.cluster_size, self._image.file
        buffer = bytearray(min(size, COPY_BYTES))
        for start in range(0, size, len(buffer)):
            await file.read(source + start, memoryview(buffer))
            await file.write(target + start, memoryview(buffer))

    # --- ending ---

    def _old_places(self) -> list[Reference]:
        """Of the old image's roots and blocks of counts."""
        assert self._old is not None
        words, offset = self._old
        bits, l1 = self._image.layout.cluster_bits, self._image.l1
        blocks = [Reference(word >> bits, 1, is_table=True) for word in words if word]
        return [*blocks, *self._range(len(words), offset), *self._range(len(l1), l1.offset)]

    def _range(self, entries: int, offset: int) -> list[Reference]:
        clusters = div_up(entries * ENTRY_BYTES, self._image.layout.cluster_size)
        first = offset >> self._image.layout.cluster_bits
        return [Reference(first, clusters, is_table=True)] if clusters else []

    async def go_back(self) -> None:
        """Use the old tables again, and free what was reserved. Nothing, once it is over."""
        image = self._image
        if self._is_over:
            return
        if self._old is not None:
            words, offset = self._old
            image.blocks.forget_all()
            image.l2.forget_all()
            image.reftable.drop_changes()
            image.reftable.replace(words, offset=offset)
            image.refcounts.stop_postponing()
            image.overlaps.places.forget()
        for reference in self._reserved:
            await image.refcounts.release(reference)


@asynccontextmanager
async def prepared(image: Image) -> AsyncIterator[ShadowTables]:
    """Tables to change and to `commit`. Whatever is raised inside, the image is as before, unless
    it was the header that couldn't be written. Nothing may be dirty or let go of at the start.
    """
    tables = ShadowTables(image)
    try:
        await tables.begin()
        yield tables
    except BaseException:
        await tables.go_back()
        raise
