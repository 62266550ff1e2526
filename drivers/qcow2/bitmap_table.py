# SPDX-License-Identifier: Apache-2.0
"""The bits of one bitmap in the file: read, written to new places, and the places that they take.

A table has an entry for each cluster of bits (specification: Bitmap table): where the cluster is,
or 0 or 1 for one of zeroes or ones, which then takes no space.

What is written is never written over what a bitmap holds: new clusters, a new table. Nothing names
them until the caller has a new directory do so, when all of it is durable (bitmap_store.py).

Context: home thread of the AioContext; writing under the metadata mutex.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.bitmap_directory import BitmapEntry, bits_of
from blockemu.drivers.qcow2.layout import OFFSET_MASK, div_up, round_up
from blockemu.drivers.qcow2.metadata_writer import Reference
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.table_cache import disk_bytes, words_from
from blockemu.drivers.sparse_bits import SparseBits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from blockemu.drivers.qcow2.header import Header
    from blockemu.drivers.qcow2.image import Image
    from blockemu.drivers.qcow2.image_file import ImageFile

ALL_ONES: Final = 1
ENTRY_RESERVED: Final = 0xFF00_0000_0000_01FE
CHUNK_ENTRIES: Final = 64 * 1024
"""Table entries that are read at once: 512 KiB."""
WRITE_BYTES: Final = 2 << 20
"""Bits that are written at once."""


async def load_bits(
    name: str, header: Header, file: ImageFile, entry: BitmapEntry, *, room_bytes: int
) -> SparseBits:
    """What a bitmap holds. Suspends: for I/O.

    Raises: ImageError, for a table that lies, or more than `room_bytes` of memory; OSError.
    """
    entry.check_size(name, header)
    bits = SparseBits(bits_of(header.size, granularity_bits=entry.granularity_bits))
    size = header.cluster_size
    buffer = bytearray(size)
    async for index, value in _set_entries(name, header, file, entry):
        start = index * size * 8
        if value == ALL_ONES:
            bits.set(start, min(start + size * 8, bits.length))
        else:
            await file.read(value, memoryview(buffer))
            bits.write(index * size, buffer)
        if bits.bytes_bound > room_bytes:
            raise ImageError(name, f"bitmap '{entry.name}' takes more memory than there is for it")
    return bits


async def write_bits(
    image: Image, bits: SparseBits, *, entries: int
) -> tuple[int, list[Reference]]:
    """Write these bits and a table of `entries` entries. Returns the table's offset in the file,
    and all that was taken. Nothing is durable yet.

    Suspends: for I/O. Raises: OSError; nothing is taken then.
    """
    size, cluster_bits = image.layout.cluster_size, image.layout.cluster_bits
    words = array("Q", bytes(entries * ENTRY_BYTES))
    wanted = []
    for index in _used_clusters(bits, size):
        end = (index + 1) * size * 8
        if end <= bits.length and bits.next_clear(index * size * 8) >= end:
            words[index] = ALL_ONES
        else:
            wanted.append(index)
    taken: list[Reference] = []
    try:
        at = 0
        while at < len(wanted):
            count = min(len(wanted) - at, max(WRITE_BYTES // size, 1))
            got = await image.refcounts.allocate(count)
            taken.append(Reference(got.first, got.clusters))
            batch = wanted[at : at + got.clusters]
            data = b"".join(bits.read(index * size, size) for index in batch)
            await image.file.write(got.first << cluster_bits, data)
            for step, index in enumerate(batch):
                words[index] = (got.first + step) << cluster_bits
            at += len(batch)
        table = await write_table(image, disk_bytes(words))
        taken.append(table)
    except BaseException:
        await release(image, taken)
        raise
    return table.first << cluster_bits, taken


async def write_table(image: Image, data: bytes) -> Reference:
    """Put `data` in new clusters in a row. Raises: OSError; nothing is taken then."""
    clusters = div_up(len(data), image.layout.cluster_size)
    got = await image.refcounts.allocate_contiguous(clusters)
    place = Reference(got.first, clusters, is_table=True)
    padded = data + bytes(round_up(len(data), image.file.granule) - len(data))
    try:
        await image.file.write(place.first << image.layout.cluster_bits, padded)
    except BaseException:
        await image.refcounts.release(place)
        raise
    return place


async def places_of(image: Image, entry: BitmapEntry) -> list[Reference]:
    """The clusters that a bitmap takes: those of its bits, and of its table.

    Suspends: for I/O. Raises: ImageError, for a table that lies; OSError.
    """
    bits = image.layout.cluster_bits
    found: list[Reference] = []
    async for _, value in _set_entries(image.name, image.header, image.file, entry):
        cluster = value >> bits
        if value == ALL_ONES:
            continue
        if found and found[-1].first + found[-1].clusters == cluster:
            found[-1] = Reference(found[-1].first, found[-1].clusters + 1)
        else:
            found.append(Reference(cluster, 1))
    clusters = div_up(entry.table_entries * ENTRY_BYTES, image.layout.cluster_size)
    return [*found, Reference(entry.table_offset >> bits, clusters, is_table=True)]


async def release(image: Image, references: list[Reference]) -> None:
    """Give clusters back that nothing names any more. Raises: nothing; see Refcounts.release."""
    for reference in references:
        await image.refcounts.release(reference)


def _used_clusters(bits: SparseBits, cluster_bytes: int) -> Iterator[int]:
    """The clusters of bits that hold any ones, ascending."""
    per_cluster = cluster_bytes * 8
    position = bits.next_set(0)
    while position < bits.length:
        index = position // per_cluster
        yield index
        start = (index + 1) * per_cluster
        position = bits.next_set(start) if start < bits.length else bits.length


async def _set_entries(
    name: str, header: Header, file: ImageFile, entry: BitmapEntry
) -> AsyncIterator[tuple[int, int]]:
    """The entries of a table that aren't 0, as (index, value). Raises: ImageError, OSError."""
    mask = header.cluster_size - 1
    for start in range(0, entry.table_entries, CHUNK_ENTRIES):
        count = min(CHUNK_ENTRIES, entry.table_entries - start)
        offset = entry.table_offset + start * ENTRY_BYTES
        data = bytearray(count * ENTRY_BYTES)
        await file.read(offset, memoryview(data))
        if not any(data):
            continue
        for index, value in enumerate(words_from("Q", data)):
            if not value:
                continue
            host = value & OFFSET_MASK
            if value & ENTRY_RESERVED or (host and value & (mask | 1)) or host >= file.length:
                raise ImageError(
                    name,
                    f"entry {start + index} of the table of bitmap '{entry.name}', at offset "
                    f"{offset + index * ENTRY_BYTES:#x}, is not possible: {value:#x}",
                )
            yield start + index, value
