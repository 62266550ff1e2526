# SPDX-License-Identifier: Apache-2.0
"""Calls on file descriptors that may block: what worker threads run.

The transfers return bytes or -errno, as a completion does. The rest return nothing and raise
OSError without a file name, which the caller adds. Nothing here knows of contexts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from blockemu.loop._libaio import lib

FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10

# _IO(0x12, n) of <linux/fs.h>
BLKSSZGET: Final = 0x1268
BLKDISCARD: Final = 0x1277
BLKZEROOUT: Final = 0x127F
# Discards and zeroes of block devices are in these units at least.
SECTOR_BYTES: Final = 512

UNSUPPORTED: Final = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV}
)


def read_fully(fd: int, view: memoryview, offset: int, alignment: int = 1) -> int:
    """Reads until `view` is full or the file ends. Bytes or -errno.

    Under O_DIRECT a count that isn't a multiple of `alignment` is the end of the file.
    """
    done = 0
    length = len(view)
    try:
        while done < length:
            count = os.preadv(fd, [view[done:] if done else view], offset + done)
            done += count
            if count == 0 or done & (alignment - 1):
                break
    except OSError as error:
        return -(error.errno or errno.EIO)
    return done


def write_fully(fd: int, view: memoryview, offset: int) -> int:
    """Writes all of `view`. Its length or -errno."""
    done = 0
    length = len(view)
    try:
        while done < length:
            count = os.pwrite(fd, view[done:] if done else view, offset + done)
            if count == 0:
                return -errno.EIO  # POSIX leaves it open; going on could be for ever
            done += count
    except OSError as error:
        return -(error.errno or errno.EIO)
    return done


def file_allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises: OSError, always ENOTSUP where the filesystem can't."""
    result = lib.file_allocate(fd, mode, offset, length)
    if result < 0:
        code = errno.ENOTSUP if -result in UNSUPPORTED else -result
        raise OSError(code, os.strerror(code))


def zero_file_range(fd: int, offset: int, length: int, unmap: bool) -> None:
    """Zeroes in a regular file, which grows to hold them. Raises: ENOTSUP.

    Without ZERO_RANGE (tmpfs has none) a hole that is allocated again is the same thing.
    """
    if not unmap:
        try:
            file_allocate(fd, FALLOC_ZERO_RANGE, offset, length)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    punch_hole(fd, offset, length)
    if not unmap:
        file_allocate(fd, 0, offset, length)
    elif os.fstat(fd).st_size < offset + length:
        os.ftruncate(fd, offset + length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Gives a range of a regular file, or of a device that can, back; it reads as zeroes then."""
    file_allocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)


def zero_device_range(fd: int, offset: int, length: int, unmap: bool) -> None:
    """Zeroes on a block device. Raises: ENOTSUP, for parts of sectors too."""
    if (offset | length) % SECTOR_BYTES:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    if unmap:
        try:
            punch_hole(fd, offset, length)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED | {errno.EINVAL}:
                raise
    try:
        fcntl.ioctl(fd, BLKZEROOUT, struct.pack("@QQ", offset, length))
    except OSError as error:
        if error.errno in UNSUPPORTED:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)) from error
        raise


def discard_file_range(fd: int, offset: int, length: int) -> None:
    """A discard in a regular file; nothing where the filesystem has no holes."""
    try:
        punch_hole(fd, offset, length)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def discard_device_range(fd: int, offset: int, length: int) -> None:
    """A discard of the whole sectors in a range; nothing where the device has no such thing."""
    start = -(-offset // SECTOR_BYTES) * SECTOR_BYTES
    end = (offset + length) // SECTOR_BYTES * SECTOR_BYTES
    if start >= end:
        return
    try:
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("@QQ", start, end - start))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def allocate_range(fd: int, offset: int, length: int) -> None:
    """Reserves space; where the filesystem can't, libc does it by touching every block."""
    try:
        file_allocate(fd, 0, offset, length)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        os.posix_fallocate(fd, offset, length)


def extents_at(fd: int, offset: int, end: int, size: int, count_max: int) -> list[tuple[bool, int]]:
    """`extent_at` again and again, from `offset` until `end` or the file's end at `size`."""
    found: list[tuple[bool, int]] = []
    end = min(end, size)
    while offset < end and len(found) < count_max:
        is_data, length = extent_at(fd, offset, size)
        found.append((is_data, length))
        offset += length
    return found


def extent_at(fd: int, offset: int, size: int) -> tuple[bool, int]:
    """(is data, bytes until that changes), by SEEK_DATA and SEEK_HOLE; data where they fail."""
    if offset >= size:
        return False, 0
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
        if data > offset:
            return False, min(data, size) - offset
        # Never 0: the file may have changed between the two calls.
        return True, max(1, min(os.lseek(fd, offset, os.SEEK_HOLE), size) - offset)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data from here to the end
            return False, size - offset
        return True, size - offset
