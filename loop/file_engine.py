# SPDX-License-Identifier: Apache-2.0
"""The file-I/O engine seam: what a host file can do, whoever does it.

Two ways in. `start_read` and `start_write` are the hot path: no coroutine, and no callback where
the request finishes on the spot. `read`, `write` and the rest are coroutines for everybody else;
they bounce memory that the engine can't take.

Engines: PosixFiles (posix_files.py) opens real files: through the page cache (page_cache_file.py)
or past it (direct_file.py). MemoryFiles (memory_file.py) is for tests and simulation. All pass the
same contract suite, tests/contract/test_host_file.py.

`native_io` is how C code that has no Python (drivers/native) reaches the same file.

A file may be used by one AioContext at a time, from its home thread; `attach` says which. Opening,
`size_bytes`, locks and `close` are free of that: they don't touch the context, but for close, which
wants the file quiet.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blockemu.loop.buffers import address_of
from blockemu.loop.coroutine import Future

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

Done = Callable[[int], None]


class NativeKind(IntEnum):
    """How C code reads and writes a file; the numbers of enum map_io in direct_map.h."""

    INLINE = 1
    """On the spot: a memory filesystem, which never waits."""
    NOWAIT = 2
    """Reads on the spot by RWF_NOWAIT, what remains is Python's: the page cache."""
    AIO = 3
    """Linux AIO: O_DIRECT."""


class NativeIo(NamedTuple):
    """What C code needs to know of a file."""

    fd: int
    kind: NativeKind
    memory_alignment: int
    durable: bool
    """An fdatasync and RWF_DSYNC say all there is to say of what was written. Not where an earlier
    flush's failure has to be remembered (group_flush.py)."""


class HostFile(ABC):
    """One open file. Positions and lengths are in bytes.

    Context: home thread of the context it is attached to, unless a method says otherwise.
    """

    path: str
    read_only: bool
    direct: bool
    is_block_device: bool
    request_alignment: int = 1
    """A power of two: what offsets and lengths of reads and writes are multiples of."""
    memory_alignment: int = 1
    """A power of two: where the memory of start_read and start_write begins."""
    writes_inline: bool = False
    """start_write never stays pending: the caller may use the view again at once."""

    _ctx: AioContext | None = None

    @property
    def ctx(self) -> AioContext:
        """The context that the file is attached to."""
        assert self._ctx is not None, f"{self.path}: not attached to an AioContext"
        return self._ctx

    def attach(self, ctx: AioContext) -> None:
        """Binds a quiet file to the context that will use it. Context: any thread."""
        self._ctx = ctx

    def detach(self) -> None:
        """Lets go of the context. The file must be quiet. Context: any thread."""
        self._ctx = None

    def native_io(self) -> NativeIo | None:
        """How C code may do what start_read and start_write do; None if only Python may.

        Holds while the file is open.
        """
        return None

    @abstractmethod
    def size_bytes(self) -> int:
        """How long the file is at this moment. Context: any thread."""

    def allocated_bytes(self) -> int:
        """What the file takes of its filesystem, if that can be told; else its length.

        Context: any thread.
        """
        return self.size_bytes()

    @abstractmethod
    def start_read(self, offset: int, view: memoryview, done: Done, address: int = 0) -> int | None:
        """Reads into `view`; offset, length and memory are aligned. `address` is where the memory
        of `view` begins, for callers that know it: finding out takes a quarter of a microsecond.

        Returns the bytes read or -errno when it finished at once; `done` isn't called then. Else
        None, and done(result) follows in a later round; until then the view is the engine's. Only
        the end of the file makes a read short.

        Suspends: never.
        """

    @abstractmethod
    def start_write(
        self, offset: int, view: memoryview, done: Done, address: int = 0
    ) -> int | None:
        """Writes all of `view`, or fails. Otherwise as start_read."""

    async def read(self, offset: int, view: memoryview) -> int:
        """Reads into `view`, wherever its memory lies; returns less than its length only at the end
        of the file.

        Suspends: until done. A cancelled task gets the cancellation after that.
        Raises: OSError.
        """
        if self._fits(view):
            return await self._read(offset, view)
        ctx = self.ctx
        bounce = ctx.buffers.take(len(view))
        try:
            count = await self._read(offset, bounce.view[: len(view)])
            view[:count] = bounce.view[:count]
        finally:
            ctx.buffers.give(bounce)
        return count

    async def write(self, offset: int, view: memoryview) -> None:
        """Writes all of `view`, wherever its memory lies. Suspends, raises: as read."""
        if self._fits(view):
            await self._write(offset, view)
            return
        ctx = self.ctx
        bounce = ctx.buffers.take(len(view))
        try:
            bounce.view[: len(view)] = view
            await self._write(offset, bounce.view[: len(view)])
        finally:
            ctx.buffers.give(bounce)

    @abstractmethod
    async def flush(self) -> None:
        """What was written before this call is on stable storage when it returns.

        An error means that data may be gone, whether or not a later flush succeeds; engines whose
        cache forgets failed pages go on failing (see page_cache_file.py).
        """

    @abstractmethod
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Makes a range read as zeroes without writing them; the file grows to hold the range.

        With `unmap` the space may be given back. Raises: OSError, ENOTSUP where it can't be done
        cheaply.
        """

    @abstractmethod
    async def discard(self, offset: int, length: int) -> None:
        """Says that a range isn't needed any more: a hint, so ENOTSUP is no error. The file keeps
        its length; what the range reads as afterwards isn't promised."""

    @abstractmethod
    async def truncate(self, length: int) -> None:
        """Sets the length. Raises: OSError, ENOTSUP for a block device."""

    @abstractmethod
    async def allocate(self, offset: int, length: int) -> None:
        """Reserves space for a range; the file grows to hold it, and content doesn't change."""

    @abstractmethod
    async def extent_at(self, offset: int) -> tuple[bool, int]:
        """(is data, bytes until that changes or the file ends). (False, 0) at the end."""

    async def extents(self, offset: int, end: int, *, count_max: int) -> list[tuple[bool, int]]:
        """What `extent_at` says, one after the other, from `offset` until `end`, the file's end, or
        `count_max` answers; the last one may reach past `end`."""
        found: list[tuple[bool, int]] = []
        while offset < end and len(found) < count_max:
            is_data, length = await self.extent_at(offset)
            if not length:
                break
            found.append((is_data, length))
            offset += length
        return found

    @abstractmethod
    async def write_tail(self, offset: int, view: memoryview) -> None:
        """Writes bytes of any offset, length and memory: for an end of file that isn't aligned."""

    @abstractmethod
    def lock_byte(self, position: int, *, exclusive: bool = False) -> None:
        """Locks one byte against other opens of the file. Never waits. Context: any thread.

        Raises: OSError, EAGAIN or EACCES where another open is in the way.
        """

    @abstractmethod
    def unlock_byte(self, position: int) -> None:
        """Gives a lock back. Context: any thread."""

    @abstractmethod
    def byte_is_locked(self, position: int, *, exclusive: bool) -> bool:
        """Whether another open's lock is in the way of one of this kind. Context: any thread."""

    @abstractmethod
    def close(self) -> None:
        """Closes a quiet file, and gives its locks back. A second call does nothing."""

    def _fits(self, view: memoryview) -> bool:
        """Whether the engine can take the view's memory as it is."""
        return self.memory_alignment == 1 or address_of(view) & (self.memory_alignment - 1) == 0

    async def _read(self, offset: int, view: memoryview) -> int:
        future: Future[int] = Future(shielded=True)
        result = self.start_read(offset, view, future.set_result)
        return self._check(await future if result is None else result)

    async def _write(self, offset: int, view: memoryview) -> None:
        future: Future[int] = Future(shielded=True)
        result = self.start_write(offset, view, future.set_result)
        count = self._check(await future if result is None else result)
        assert count == len(view), f"{self.path}: a short write got out"

    def _check(self, result: int) -> int:
        if result < 0:
            raise OSError(-result, os.strerror(-result), self.path)
        return result


class FileEngine(Protocol):
    """Opens host files."""

    def open(
        self, path: str, *, read_only: bool, direct: bool, aio: str, create: bool = False
    ) -> HostFile:
        """Opens, and with `create` makes, a file; it isn't attached to a context yet.

        `direct` goes past the page cache; `aio` is "native" or "threads". Context: any thread; it
        may block. Raises: OSError with the file's name; EINVAL where `direct` can't be had.
        """
        ...
