# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots of an open image: made, gone back to, deleted.

What a crash may leave is decided by one thing: the header's fixed fields lie in one sector, which
is written as a whole. Each of the three prepares all that is new beside what is in use, has it
durable, and then writes the header; only then does it let go of what is old.

    create    counts of all that the active L1 table leads to: up, COPIED cleared;
              a copy of the L1 table; a new snapshot table
              -> header: snapshots_offset, nb_snapshots
              the old snapshot table is freed
    go to     counts of what the snapshot's L1 table leads to and the active one doesn't: up; a
              copy of that L1 table
              -> header: l1_table_offset, l1_size, size
              counts of what the old L1 table alone led to: down; it is freed
    delete    a new snapshot table
              -> header: snapshots_offset, nb_snapshots
              counts of what the snapshot's L1 table leads to: down; it and the old snapshot table
              are freed; COPIED is set where what is left is ours alone

So before the header's write there is the old image, perhaps with leaks, and after it the new one,
perhaps with leaks and flags that are clear though they could be set (tree_references.py). When the
write itself fails nobody knows which of the two there is: no more metadata is written then.

L1 tables are never changed in place, as QEMU does it when it goes to a snapshot: half of each is
no disk. The price is one more L1 table for the time being.

A machine state that QEMU has saved with a snapshot lies behind the disk's end, in L1 entries of its
own. It stays with its snapshot: an active L1 table that we make leaves it out, and so does a new
snapshot. QEMU reads it from the snapshot.

Clients wait as long as it takes: 6 ms for a GiB whose 64 KiB clusters lie in a row, and some 10 us
for each cluster that doesn't lie behind its neighbour. Going back costs what differs.

Context: home thread of the AioContext, alone with the image: it is drained, its direct map is gone,
all guest clusters are locked, and the caller holds the metadata mutex.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2 import tree_references
from blockemu.drivers.qcow2.layout import OFFSET_MASK, div_up, round_up
from blockemu.drivers.qcow2.metadata_writer import Reference
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.snapshot_table import Snapshot, SnapshotTable, check_name, serialise
from blockemu.drivers.qcow2.table_cache import disk_bytes, words_from

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image import Image

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
    entries = image.layout.l1_entries(image.header.size)
    words = _disk_entries(image.l1.words, entries)
    table = image.header_file.snapshots
    try:
        await tree_references.share(image, words)
        for index in range(entries):
            if image.l1.words[index] != words[index]:
                image.l1.put(index, words[index])
        return await _enter(image, name, words, now_ns)
    except BaseException:
        if not image.writer.is_stopped and image.header_file.snapshots is table:
            await tree_references.mark_own(image, range(entries))
        raise


async def _enter(image: Image, name: str, words: array[int], now_ns: int) -> Snapshot:
    """Write the copy of the L1 table and the snapshot table, once everything is shared."""
    before = image.header_file.snapshots
    copy: Reference | None = None
    try:
        copy = await _write_l1(image, words)
        seconds, nanoseconds = divmod(now_ns, NS_PER_S)
        disk_size = image.header.size
        made = Snapshot(
            id=before.next_id(),
            name=name,
            l1_table_offset=copy.first << image.layout.cluster_bits,
            l1_size=len(words),
            disk_size=disk_size,
            date_sec=min(seconds, DATE_SEC_MAX),
            date_nsec=nanoseconds,
            extra=bytes(8) + disk_size.to_bytes(8, "big") + bytes(_EXTRA_BYTES - 16),
        )
        await _move_table(image, (*before.entries, made))
    except BaseException:
        if not image.writer.is_stopped and image.header_file.snapshots is before:
            if copy is not None:
                await image.refcounts.release(copy)
            await tree_references.drop(image, words)
        raise
    return made


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
    await tree_references.share(image, new, instead_of=old)
    copy: Reference | None = None
    try:
        copy = await _write_l1(image, new)
        await image.writer.flush()
    except BaseException:
        if copy is not None:
            await image.refcounts.release(copy)
        await tree_references.drop(image, new, instead=old)
        raise
    offset = copy.first << image.layout.cluster_bits
    freed = _l1_clusters(image, image.l1.offset, len(old))
    try:
        await image.header_file.move_disk(offset=offset, entries=len(new), size=size)
    except BaseException:
        image.writer.stop("the disk's new L1 table may not be in the header")
        raise
    image.l1.replace(new, offset=offset)
    image.guest_writer.disk_bytes = size
    image.reader.forget_unpacked()
    await tree_references.drop(image, old, instead=new)
    if freed.clusters:
        await image.refcounts.release(freed)


async def delete(image: Image, snapshot: Snapshot) -> None:
    """Delete a snapshot, and free what nothing else uses.

    Suspends: for I/O. Raises: ImageError (a damaged snapshot), OSError of the file; the image is
    then as before.
    """
    words = await _read_l1(image, snapshot)
    await _settle(image)
    rest = tuple(entry for entry in image.header_file.snapshots.entries if entry is not snapshot)
    await _move_table(image, rest)
    await tree_references.drop(image, words)
    freed = _l1_clusters(image, snapshot.l1_table_offset, snapshot.l1_size)
    if freed.clusters:
        await image.refcounts.release(freed)
    active = image.l1.words
    shared = [index for index, entry in enumerate(words) if entry and index < len(active)]
    await tree_references.mark_own(image, shared)


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


async def _write_l1(image: Image, words: array[int]) -> Reference:
    """A new L1 table in clusters of its own. Not durable yet."""
    return await _write_new(image, disk_bytes(words))


async def _write_new(image: Image, data: bytes) -> Reference:
    clusters = div_up(len(data), image.layout.cluster_size)
    taken = await image.refcounts.allocate_contiguous(clusters)
    place = Reference(taken.first, clusters, is_table=True)
    padded = data + bytes(round_up(len(data), image.file.granule) - len(data))
    try:
        await image.file.write(place.first << image.layout.cluster_bits, padded)
    except BaseException:
        await image.refcounts.release(place)
        raise
    return place


async def _move_table(image: Image, entries: tuple[Snapshot, ...]) -> None:
    """Have the header name a new table of these snapshots, and free the old one."""
    data = serialise(image.name, entries)
    place: Reference | None = None
    try:
        if data:
            place = await _write_new(image, data)
        await image.writer.flush()
    except BaseException:
        if place is not None:
            await image.refcounts.release(place)
        raise
    offset = place.first << image.layout.cluster_bits if place is not None else 0
    old = image.header_file.snapshots
    try:
        await image.header_file.move_snapshots(SnapshotTable(offset, len(data), entries))
    except BaseException:
        image.writer.stop("the snapshot table's new place may not be in the header")
        raise
    clusters = div_up(old.length, image.layout.cluster_size)
    if clusters:
        first = old.offset >> image.layout.cluster_bits
        await image.refcounts.release(Reference(first, clusters, is_table=True))


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
