# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots of an open image: made, gone back to, deleted.

What a crash may leave is decided by one thing: the header's fixed fields lie in one sector, which
is written as a whole. Each of the three prepares all that is new beside what is in use, has it
durable, and then writes the header; only then does it let go of what is old (shadow_tables.py).

    create    counts of all that the active L1 table leads to: up, in L2 tables with COPIED clear;
              a copy of the L1 table for the snapshot
    go to     counts of what the snapshot's L1 table leads to and the active one doesn't: up, and
              of what the active one alone led to: down; a copy of the snapshot's L1 table
    delete    counts of what the snapshot's L1 table leads to: down; L2 tables with COPIED set for
              what is left and ours alone

So before the header's write there is the old image, and after it the new one, perhaps with leaks.
When the write itself fails nobody knows which of the two there is: no more metadata is written
then.

L1 tables are never changed in place, as QEMU does it when it goes to a snapshot: half of each is
no disk. The price is one more L1 table for the time being.

A machine state that QEMU has saved with a snapshot lies behind the disk's end, in L1 entries of its
own. It stays with its snapshot: an active L1 table that we make leaves it out, and so does a new
snapshot. QEMU reads it from the snapshot.

Clients wait as long as it takes: 6 ms for a GiB whose 64 KiB clusters lie in a row, and some 10 us
for each cluster that doesn't lie behind its neighbour. Going back costs what differs, and the
copies of the refcount blocks.

Context: home thread of the AioContext, alone with the image: it is drained, its direct map is gone,
all guest clusters are locked, and the caller holds the metadata mutex.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2 import tree_references
from blockemu.drivers.qcow2.layout import COPIED, OFFSET_MASK, div_up
from blockemu.drivers.qcow2.metadata_writer import Reference
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.shadow_tables import prepared
from blockemu.drivers.qcow2.snapshot_table import Snapshot, SnapshotTable, check_name, serialise
from blockemu.drivers.qcow2.table_cache import disk_bytes, words_from

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image import Image
    from blockemu.drivers.qcow2.shadow_tables import ShadowTables

NS_PER_S = 1_000_000_000
DATE_SEC_MAX = 2**32 - 1

_EXTRA_BYTES = 24
"""Of what we write: sizes of machine state and disk, and an instruction count of 0, as QEMU."""


async def create(image: Image, name: str, *, now_ns: int) -> Snapshot:
    """Keep the disk as it is now under `name`. `now_ns`: the wall clock.

    Suspends: for I/O. Raises: ImageError for what can't be (a bad name, counts too narrow), OSError
    of the file; the image is then as before.
    """
    check_name(image.name, name)
    if image.layout.refcount_bits == 1:
        raise ImageError(
            image.name, "its reference counts have one bit (refcount_bits=1), too few for snapshots"
        )
    await _settle(image)
    words = _disk_entries(image.l1.words, image.layout.l1_entries(image.header.size))
    before = image.header_file.snapshots
    async with prepared(image) as tables:
        bits = image.layout.cluster_bits
        for index, entry in enumerate(words):
            if entry:
                words[index] = await tree_references.without_copied(image, tables, entry)
                if words[index] != entry:
                    tables.forget(Reference(entry >> bits, 1, is_table=True))
        await tree_references.share(image, words)
        active = image.l1.words[:] or words
        active[: len(words)] = words
        copy = await tables.write_new(disk_bytes(words))
        made = _entry(image, name, copy.first << bits, len(words), now_ns)
        await _switch(image, tables, active, (*before.entries, made))
    return made


def _entry(image: Image, name: str, offset: int, entries: int, now_ns: int) -> Snapshot:
    seconds, nanoseconds = divmod(now_ns, NS_PER_S)
    disk_size = image.header.size
    return Snapshot(
        id=image.header_file.snapshots.next_id(),
        name=name,
        l1_table_offset=offset,
        l1_size=entries,
        disk_size=disk_size,
        date_sec=min(seconds, DATE_SEC_MAX),
        date_nsec=nanoseconds,
        extra=bytes(8) + disk_size.to_bytes(8, "big") + bytes(_EXTRA_BYTES - 16),
    )


async def go_to(image: Image, snapshot: Snapshot) -> None:
    """Make the disk what it was when the snapshot was taken, its size included. What it is now is
    lost; the snapshot stays.

    Suspends: for I/O. Raises: ImageError (a count is at its limit, a damaged snapshot), OSError of
    the file; the image is then as before.
    """
    theirs = await _read_l1(image, snapshot)
    await _settle(image)
    size = snapshot.disk_size
    old = image.l1.words[:]
    new = _disk_entries(theirs, image.layout.l1_entries(size))
    async with prepared(image) as tables:
        copied = await _copy_flagged(image, tables, new, old)
        await tree_references.share(image, new, instead_of=old)
        await tree_references.drop(image, old, instead=new)
        for index in copied:  # which the snapshot doesn't share
            place = Reference(new[index] >> image.layout.cluster_bits, 1, is_table=True)
            await image.refcounts.release(place)
            new[index] |= COPIED
        await tables.write_l1(new)
        await tables.commit(size=size)
        image.guest_writer.disk_bytes = size
        image.reader.forget_unpacked()


async def _copy_flagged(
    image: Image, tables: ShadowTables, new: array[int], old: array[int]
) -> list[int]:
    """Where a snapshot's L2 table has COPIED set, which means nothing in a snapshot, have the disk
    use a copy without. Returns the L1 indexes."""
    copied = []
    for index, entry in enumerate(new):
        is_ours = index < len(old) and old[index] & OFFSET_MASK == entry
        if entry and not is_ours:
            new[index] = await tree_references.without_copied(image, tables, entry)
            if new[index] != entry:
                copied.append(index)
    return copied


async def delete(image: Image, snapshot: Snapshot) -> None:
    """Delete a snapshot, and free what nothing else uses.

    Suspends: for I/O. Raises: ImageError (a damaged snapshot), OSError of the file; the image is
    then as before.
    """
    words = await _read_l1(image, snapshot)
    await _settle(image)
    rest = tuple(entry for entry in image.header_file.snapshots.entries if entry is not snapshot)
    async with prepared(image) as tables:
        await tree_references.drop(image, words)
        freed = _l1_clusters(image, snapshot.l1_table_offset, snapshot.l1_size)
        if freed.clusters:
            tables.forget(freed)
        active = image.l1.words[:]
        shared = [index for index, entry in enumerate(words) if entry and index < len(active)]
        await tree_references.mark_own(image, tables, active, shared)
        await _switch(image, tables, active, rest)


async def _switch(
    image: Image, tables: ShadowTables, l1: array[int], entries: tuple[Snapshot, ...]
) -> None:
    """Have the header name all that is prepared, and a new table of these snapshots."""
    await tables.write_l1(l1)
    data = serialise(image.name, entries)
    offset = 0
    if data:
        offset = (await tables.write_new(data)).first << image.layout.cluster_bits
    old = image.header_file.snapshots
    clusters = div_up(old.length, image.layout.cluster_size)
    if clusters:
        first = old.offset >> image.layout.cluster_bits
        tables.forget(Reference(first, clusters, is_table=True))
    await tables.commit(snapshots=SnapshotTable(offset, len(data), entries))


async def _settle(image: Image) -> None:
    """Nothing waits to be written or freed: what we prepare starts from what is on the disk."""
    await image.writer.flush()
    await image.refcounts.apply_released()


def _disk_entries(words: array[int], entries: int) -> array[int]:
    """L1 entries of the disk alone, at least one, without COPIED."""
    found = array("Q", (word & OFFSET_MASK for word in words[: max(entries, 1)]))
    return found or array("Q", (0,))


def _l1_clusters(image: Image, offset: int, entries: int) -> Reference:
    clusters = div_up(entries * ENTRY_BYTES, image.layout.cluster_size)
    return Reference(offset >> image.layout.cluster_bits, clusters, is_table=True)


async def _read_l1(image: Image, snapshot: Snapshot) -> array[int]:
    """A snapshot's L1 table. Raises: ImageError, if it or what it names lies in other metadata."""
    snapshot.check_l1(image.name, image.header, file_bytes=image.file.length)
    data = bytearray(snapshot.l1_size * ENTRY_BYTES)
    if data:
        await image.file.read(snapshot.l1_table_offset, memoryview(data))
    words = words_from("Q", data)
    places = image.refcounts.metadata_places()
    own = _l1_clusters(image, snapshot.l1_table_offset, snapshot.l1_size)
    _refuse_overlap(image, snapshot, "L1 table", places, own)
    active = image.l1.words
    for index, word in enumerate(words):
        table = word & OFFSET_MASK
        if table and not (index < len(active) and active[index] & OFFSET_MASK == table):
            place = Reference(table >> image.layout.cluster_bits, 1)
            _refuse_overlap(image, snapshot, f"L2 table {index}", places, place)
    return words


def _refuse_overlap(
    image: Image, snapshot: Snapshot, what: str, places: array[int], place: Reference
) -> None:
    at = bisect_left(places, place.first)
    if at < len(places) and places[at] < place.first + place.clusters:
        raise ImageError(
            image.name,
            f"the {what} of snapshot '{snapshot.name}' lies over other metadata"
            f" (host cluster {places[at]}): the image is damaged",
        )
