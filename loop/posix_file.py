# SPDX-License-Identifier: Apache-2.0
"""What all real files share: everything but the hot path.

Calls that may block run in the context's thread pool; subclasses decide which never do. Errors from
there get the file's name on the way out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any, Final, TypeVar

from blockemu.loop import ofd_lock
from blockemu.loop.blocking_io import (
    allocate_range,
    discard_device_range,
    discard_file_range,
    extent_at,
    extents_at,
    read_fully,
    write_fully,
    zero_device_range,
    zero_file_range,
)
from blockemu.loop.file_engine import Done, HostFile
from blockemu.loop.group_flush import GroupFlush

T = TypeVar("T")

STAT_BLOCK_BYTES: Final = 512
"""What stat(2) counts a file's blocks in, whatever the filesystem's are."""


class PosixFile(HostFile):
    """An open descriptor, which it owns."""

    def __init__(self, fd: int, path: str, *, read_only: bool, direct: bool) -> None:
        self.path = path
        self.read_only = read_only
        self.direct = direct
        self.is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._fd = fd
        self._flushes = GroupFlush(fd, path, sticky=not direct)

    def size_bytes(self) -> int:
        if self.is_block_device:
            return os.lseek(self._fd, 0, os.SEEK_END)
        return os.fstat(self._fd).st_size

    def allocated_bytes(self) -> int:
        if self.is_block_device:
            return self.size_bytes()
        return os.fstat(self._fd).st_blocks * STAT_BLOCK_BYTES

    async def flush(self) -> None:
        if not self.read_only:
            await self._flushes.flush(self.ctx.thread_pool.submit)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        work = zero_device_range if self.is_block_device else zero_file_range
        await self._call(length, work, self._fd, offset, length, unmap)

    async def discard(self, offset: int, length: int) -> None:
        work = discard_device_range if self.is_block_device else discard_file_range
        await self._call(length, work, self._fd, offset, length)

    async def truncate(self, length: int) -> None:
        if self.is_block_device:
            raise OSError(errno.ENOTSUP, "a block device keeps its size", self.path)
        await self._in_worker(os.ftruncate, self._fd, length)

    async def allocate(self, offset: int, length: int) -> None:
        if self.is_block_device:
            return  # all of it is there
        await self._in_worker(allocate_range, self._buffered_fd(), offset, length)

    async def extent_at(self, offset: int) -> tuple[bool, int]:
        return await self._call(0, extent_at, self._fd, offset, self.size_bytes())

    async def extents(self, offset: int, end: int, *, count_max: int) -> list[tuple[bool, int]]:
        size = self.size_bytes()
        return await self._call(0, extents_at, self._fd, offset, end, size, count_max)

    async def write_tail(self, offset: int, view: memoryview) -> None:
        self._flushes.sticky = True  # now the page cache has a part in this file
        self._check(await self._in_worker(write_fully, self._buffered_fd(), view, offset))

    def lock_byte(self, position: int, *, exclusive: bool = False) -> None:
        self._named(lambda: ofd_lock.lock_byte(self._fd, position, exclusive=exclusive))

    def unlock_byte(self, position: int) -> None:
        self._named(lambda: ofd_lock.unlock_byte(self._fd, position))

    def byte_is_locked(self, position: int, *, exclusive: bool) -> bool:
        return self._named(lambda: ofd_lock.byte_is_locked(self._fd, position, exclusive=exclusive))

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self.detach()
            os.close(fd)

    def _buffered_fd(self) -> int:
        """A descriptor of this file that takes any alignment."""
        return self._fd

    async def _call(self, length: int, work: Callable[..., T], *args: Any) -> T:
        """Runs a call that is about `length` bytes long; where is the subclass's choice."""
        return await self._in_worker(work, *args)

    async def _in_worker(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return await self.ctx.thread_pool.run(work, *args)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error

    def _named(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error

    def _read_in_worker(self, offset: int, view: memoryview, got: int, done: Done) -> None:
        """Reads what is missing behind the first `got` bytes; done(all bytes or -errno)."""

        def finished(outcome: Any) -> None:
            if isinstance(outcome, BaseException):
                raise outcome  # a defect: read_fully answers with -errno
            done(outcome if outcome < 0 else got + outcome)

        rest = view[got:] if got else view
        args = (self._fd, rest, offset + got, self.request_alignment)
        self.ctx.thread_pool.submit(read_fully, args, finished)

    def _write_in_worker(self, offset: int, view: memoryview, put: int, done: Done) -> None:
        """Writes what is missing behind the first `put` bytes; done(all bytes or -errno)."""

        def finished(outcome: Any) -> None:
            if isinstance(outcome, BaseException):
                raise outcome  # a defect: write_fully answers with -errno
            done(outcome if outcome < 0 else put + outcome)

        rest = view[put:] if put else view
        self.ctx.thread_pool.submit(write_fully, (self._fd, rest, offset + put), finished)
