# SPDX-License-Identifier: Apache-2.0
"""Files through the kernel's page cache.

A hit in the cache costs a system call and a copy, about a microsecond; waking a worker costs forty.
So whatever can't block is done on the spot:

- reads with RWF_NOWAIT, which returns what the cache has and else EAGAIN; only the rest goes to a
  worker. A short answer isn't trusted to be the end of the file (some kernels have answered so for
  pages on their way), a worker finds that out.
- on tmpfs and ramfs, which refuse the flag and never wait for a disk, everything, writes included.

Writes on other filesystems always go to a worker: they may wait for a journal or for dirty pages to
be written back, and no filesystem measured takes RWF_NOWAIT for buffered writes everywhere. What a
round has for workers leaves at its end in batches (transfer_batches.py).

Linux AIO isn't used here: with a file in the page cache io_submit itself does the waiting.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any, Final, TypeVar

from blockemu.loop._libaio import lib
from blockemu.loop.blocking_io import read_fully, write_fully
from blockemu.loop.file_engine import Done, NativeIo, NativeKind
from blockemu.loop.posix_file import PosixFile
from blockemu.loop.transfer_batches import TransferBatches

T = TypeVar("T")

TMPFS_MAGIC: Final = 0x01021994
RAMFS_MAGIC: Final = 0x858458F6

# Zeroing or freeing a MiB of tmpfs takes some 50 us, as long as waking a worker.
INLINE_BYTES_MAX: Final = 1 << 20

# Requests that one worker does in one call. Writes to one file take turns in the kernel anyway (the
# inode's lock). A batch of reads is announced to the disk as a whole, yet is answered as a whole.
WRITES_MAX: Final = 32
READS_MAX: Final = 16


class PageCacheFile(PosixFile):
    """Reads on the spot from the cache, where the filesystem knows RWF_NOWAIT; else in a worker."""

    def __init__(self, fd: int, path: str, *, read_only: bool, inline: bool = True) -> None:
        """`inline=False` sends everything to workers."""
        super().__init__(fd, path, read_only=read_only, direct=False)
        self._reads_nowait = inline and _takes_nowait(fd)
        self._reads = TransferBatches(is_write=False, requests_max=READS_MAX)
        self._writes = TransferBatches(is_write=True, requests_max=WRITES_MAX)

    def native_io(self) -> NativeIo | None:
        if not self._reads_nowait:
            return None
        return NativeIo(self._fd, NativeKind.NOWAIT, self.memory_alignment, durable=False)

    def start_read(self, offset: int, view: memoryview, done: Done, address: int = 0) -> int | None:
        got = 0
        if self._reads_nowait:
            try:
                got = os.preadv(self._fd, (view,), offset, os.RWF_NOWAIT)
                if got == len(view):
                    return got
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    return -(error.errno or errno.EIO)
                self._reads_nowait = False
        self._reads.stage(self.ctx, self._fd, offset, view, got, done)
        return None

    def try_read(self, offset: int, view: memoryview) -> bool:
        if not self._reads_nowait:
            return False
        try:
            return os.preadv(self._fd, (view,), offset, os.RWF_NOWAIT) == len(view)
        except OSError:
            return False

    def start_write(
        self, offset: int, view: memoryview, done: Done, address: int = 0
    ) -> int | None:
        self._writes.stage(self.ctx, self._fd, offset, view, 0, done)
        return None


class MemoryFilesystemFile(PosixFile):
    """A file on tmpfs or ramfs: nothing but very long calls ever leaves the loop.

    Swapped-out pages are the exception; who swaps a disk image has asked for the wait.
    """

    writes_inline = True

    def __init__(self, fd: int, path: str, *, read_only: bool) -> None:
        super().__init__(fd, path, read_only=read_only, direct=False)

    def native_io(self) -> NativeIo | None:
        return NativeIo(self._fd, NativeKind.INLINE, self.memory_alignment, durable=True)

    def start_read(self, offset: int, view: memoryview, done: Done, address: int = 0) -> int | None:
        try:
            count = os.preadv(self._fd, (view,), offset)
        except OSError as error:
            return -(error.errno or errno.EIO)
        return count if count == len(view) else read_fully(self._fd, view, offset)

    def start_write(
        self, offset: int, view: memoryview, done: Done, address: int = 0
    ) -> int | None:
        try:
            count = os.pwrite(self._fd, view, offset)
        except OSError as error:
            return -(error.errno or errno.EIO)
        return count if count == len(view) else write_fully(self._fd, view, offset)

    def try_read(self, offset: int, view: memoryview) -> bool:
        try:
            return os.preadv(self._fd, (view,), offset) == len(view)
        except OSError:
            return False

    async def flush(self) -> None:
        """Nothing to do: there is no storage behind the cache."""

    async def _call(self, length: int, work: Callable[..., T], *args: Any) -> T:
        if length <= INLINE_BYTES_MAX:
            return self._named(lambda: work(*args))
        return await super()._call(length, work, *args)


def is_memory_filesystem(fd: int) -> bool:
    """Whether this is a file on tmpfs or ramfs.

    A block device isn't, though its node in /dev is: statfs speaks of the node's filesystem.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    return lib.file_system_magic(fd) in (TMPFS_MAGIC, RAMFS_MAGIC)


def _takes_nowait(fd: int) -> bool:
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True
