# SPDX-License-Identifier: Apache-2.0
"""Making the virtual disk larger or smaller.

**Larger.** What is new must read as zeroes: the rest of the last cluster, which may hold anything,
what a longer backing file would show there, and a machine state of QEMU's behind the disk's end (it
lies there in L1 entries of its own, once QEMU has gone to a snapshot that has one). The L1 table
moves if it has too few entries, its new place complete before the header names it; then all are
zeroed, and preallocated if that is asked for (`preallocate.py`); the size comes last. A crash on
the way leaves the old disk.

**Smaller.** The clusters behind the new end are let go of, a machine state included, and so are L2
tables that map nothing else; the size changes when that is durable. So a disk that grows again
later finds nothing there, and after a crash on the way the disk has its old size and lacks some of
what was to be cut off. The L1 table keeps its place and its length.

An external data file is as long as the disk: longer before the disk is, shorter after it is. A raw
one has all that is new mapped, as all the rest.
"""

from __future__ import annotations

import contextlib
import errno
from array import array
from typing import TYPE_CHECKING

from blockemu.drivers.errors import io_error
from blockemu.drivers.qcow2.data_clusters import DataFileWriter
from blockemu.drivers.qcow2.layout import L1_BYTES_MAX, OFFSET_MASK, SECTOR, div_up
from blockemu.drivers.qcow2.metadata_writer import Reference
from blockemu.drivers.qcow2.preallocate import give_zeroes, preallocate
from blockemu.drivers.qcow2.root_table import ENTRY_BYTES
from blockemu.drivers.qcow2.table_cache import disk_bytes

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image import Image


async def resize(image: Image, length: int, *, preallocation: str) -> None:
    """Make the disk `length` bytes long. Nobody uses what is behind that.

    `preallocation`: of what is new (preallocate.py); "off" for a disk that doesn't grow.
    Raises: OSError (EINVAL: no whole sectors; ENOTSUP: preallocation for a smaller or an encrypted
    disk; EFBIG: the format's limit).
    """
    if length % SECTOR:
        raise io_error(errno.EINVAL, f"{image.name}: {length} is no multiple of {SECTOR}")
    if preallocation != "off" and image.header.crypt_method:
        # Host clusters of zeroes are none to its guest.
        raise io_error(errno.ENOTSUP, f"{image.name}: preallocation when an encrypted disk grows")
    if preallocation != "off" and length < image.guest_writer.disk_bytes:
        raise io_error(errno.ENOTSUP, f"{image.name}: preallocation for a smaller disk")
    if length == image.guest_writer.disk_bytes:
        return
    if image.header.version == 2 and image.header.nb_snapshots:
        # Their entries need not say which size the disk had.
        raise io_error(errno.ENOTSUP, f"{image.name}: resizing version 2 with snapshots")
    if length < image.guest_writer.disk_bytes:
        await _shrink(image, length)
    else:
        await _grow(image, length, preallocation)


async def _shrink(image: Image, length: int) -> None:
    size = image.layout.cluster_size
    end = max(div_up(image.guest_writer.disk_bytes, size), _mapped_end(image))
    held = await image.locks.exclusive(0, end - 1)
    try:
        await image.eraser.forget(div_up(length, size), end)
        async with image.mutex:
            _forget_l2_tables(image, image.layout.l1_entries(length))
        await image.flush()
        await image.header_file.set_size(length)
        image.guest_writer.disk_bytes = length
        if image.data_file is not None:
            await image.data_file.set_disk_bytes(length)
    finally:
        image.locks.release(held)


def _mapped_end(image: Image) -> int:
    """Behind the last guest cluster that an L2 table maps, which a machine state may have."""
    words = image.l1.words
    tables = len(words)
    while tables and not words[tables - 1]:
        tables -= 1
    return tables << image.layout.l2_bits


def _forget_l2_tables(image: Image, first: int) -> None:
    """Let go of the tables that L1 entries from `first` on name; none of their entries is in use.
    Suspends: never."""
    l1 = image.l1
    for index in range(first, len(l1)):
        table = l1.words[index] & OFFSET_MASK
        if table:
            l1.put(index, 0)
            image.writer.let_go(Reference(table >> image.layout.cluster_bits, 1, is_table=True))


async def _grow(image: Image, length: int, preallocation: str) -> None:
    old = image.guest_writer.disk_bytes
    last = div_up(length, image.layout.cluster_size) - 1
    held = await image.locks.exclusive(0, last)
    try:
        async with image.mutex:
            await _grow_l1(image, image.layout.l1_entries(length))
        try:
            if image.data_file is not None:
                await image.data_file.set_disk_bytes(length)
            image.guest_writer.disk_bytes = length
            try:
                await _zero_new(image, old, length, preallocation)
                await image.flush()
            except OSError:
                if preallocation != "off":
                    await _give_back(image, old, length)
                raise
            await image.header_file.set_size(length)
        except BaseException:
            image.guest_writer.disk_bytes = old
            image.header.size = old
            if image.data_file is not None:
                image.data_file.disk_bytes = old  # longer than that is no harm
            raise
    finally:
        image.locks.release(held)


async def _zero_new(image: Image, old: int, new: int, preallocation: str) -> None:
    """Zeroes where the old disk's last cluster, or the backing file, would show through, and
    host clusters where they are asked for."""
    cluster_end = min(div_up(old, image.layout.cluster_size) * image.layout.cluster_size, new)
    if cluster_end > old:
        await image.guest_writer.write(old, memoryview(bytes(cluster_end - old)))
    if image.data_file is not None and image.data_file.is_raw:
        assert isinstance(image.guest_writer, DataFileWriter)
        await give_zeroes(image.data_file, cluster_end, new, preallocation)
        size = image.layout.cluster_size
        await image.guest_writer.map_all(div_up(cluster_end, size), div_up(new, size))
    covered = 1 << (image.layout.cluster_bits + image.layout.l2_bits)
    for index in range(image.layout.l1_entries(old), image.layout.l1_entries(new)):
        if image.l1.words[index]:
            end = min((index + 1) * covered, new)
            await image.eraser.zero(index * covered, end - index * covered, may_unmap=True)
    if preallocation != "off":
        await preallocate(image, cluster_end, new, preallocation)
        if not image.layout.extended_l2:
            return  # host clusters hide the backing file; without a subcluster they don't
    backing = image.reader.backing
    if backing is not None and backing.length_bytes > cluster_end:
        end = min(new, backing.length_bytes)
        unmap = preallocation == "off"
        await image.eraser.zero(cluster_end, end - cluster_end, may_unmap=unmap)


async def _give_back(image: Image, old: int, new: int) -> None:
    """The space that a disk took which then couldn't grow, as far as can be."""
    size = image.layout.cluster_size
    with contextlib.suppress(OSError):  # what failed is of more interest
        await image.eraser.forget(div_up(old, size), div_up(new, size))


async def _grow_l1(image: Image, entries: int) -> None:
    l1 = image.l1
    if entries <= len(l1):
        return
    if entries * ENTRY_BYTES > L1_BYTES_MAX:
        raise io_error(errno.EFBIG, f"{image.name}: the L1 table would be larger than 32 MiB")
    size, bits = image.layout.cluster_size, image.layout.cluster_bits
    words = l1.words + array("Q", bytes((entries - len(l1)) * ENTRY_BYTES))
    await image.writer.flush()  # no dirty L1 entries from here on
    words[: len(l1)] = l1.words
    clusters = div_up(entries * ENTRY_BYTES, size)
    taken = await image.refcounts.allocate_contiguous(clusters)
    offset = taken.first << bits
    try:
        table = disk_bytes(words)
        await image.file.write(offset, table + bytes(clusters * size - len(table)))
        await image.writer.flush()
    except BaseException:
        await image.refcounts.release(Reference(taken.first, clusters))
        raise
    old_clusters = div_up(len(l1) * ENTRY_BYTES, size)
    freed = Reference(l1.offset >> bits, old_clusters, is_table=True)
    try:
        await image.header_file.move_l1(offset=offset, entries=entries)
    except BaseException:
        image.writer.stop("the L1 table's new place may not be in the header")
        raise
    l1.replace(words, offset=offset)
    if freed.clusters:
        await image.refcounts.release(freed)
