# SPDX-License-Identifier: Apache-2.0
"""Files in memory, for tests and simulation: the disk that can be asked what happened to it.

A MemoryImage is the content, with its size and locks; several opens of one path share it, as on a
disk. Each operation is recorded in `log`, in the order in which it took effect, so that a test can
say "data before the table that names it", and a checker can replay any prefix as a crash would have
left it. Two hooks make the disk worse than memory is: `fault` answers an operation with an errno,
`latency_ns` makes it take time on the context's clock, so that with a virtual clock requests
overlap and overtake each other, and nothing sleeps. An operation takes effect when its latency is
over.

Content is a bytearray, as long as the file; which 4 KiB blocks are holes is remembered beside it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, NamedTuple

from blockemu.loop.coroutine import Future
from blockemu.loop.file_engine import Done, HostFile

BLOCK_BYTES: Final = 4096

# Asked before an operation takes effect, and before it begins: (kind, offset, length).
Fault = Callable[[str, int, int], int]
Latency = Callable[[str, int, int], int]


class Operation(NamedTuple):
    """What happened to an image. Kinds: read, write, zero, discard, flush, truncate, allocate."""

    kind: str
    offset: int
    length: int
    data: bytes = b""
    """Of a write; empty for the other kinds."""


class MemoryImage:
    """What all opens of one path share. A test may read and set everything in it at any time."""

    def __init__(self, content: bytes | bytearray = b"") -> None:
        self.content = bytearray(content)
        self.holes: set[int] = set()
        """Numbers of the 4 KiB blocks without data."""
        self.log: list[Operation] = []
        self.fault: Fault | None = None
        """Returns the errno that an operation fails with, or 0."""
        self.locks: set[tuple[MemoryFile, int, bool]] = set()
        """(who, which byte, exclusive)"""
        self.opens: list[MemoryFile] = []
        self._latency_ns: Latency | None = None

    @property
    def latency_ns(self) -> Latency | None:
        """Returns how long an operation takes; None: everything finishes inside the call."""
        return self._latency_ns

    @latency_ns.setter
    def latency_ns(self, latency_ns: Latency | None) -> None:
        self._latency_ns = latency_ns
        for file in self.opens:
            file.writes_inline = latency_ns is None

    def operations(self, *kinds: str) -> list[Operation]:
        """The log, without operations of other kinds."""
        return [operation for operation in self.log if operation.kind in kinds]

    def apply(self, kind: str, offset: int, length: int, view: memoryview | None = None) -> int:
        """Does and records an operation on `view`, if it has one. Bytes or -errno."""
        code = self.fault(kind, offset, length) if self.fault is not None else 0
        if code:
            return -code
        assert view is None or len(view) == length
        data = bytes(view) if kind == "write" and view is not None else b""
        self.log.append(Operation(kind, offset, length, data))
        end = offset + length
        if kind == "read" and view is not None:
            part = self.content[offset:end]
            view[: len(part)] = part
            return len(part)
        if kind == "truncate":
            self._set_length(length)
        elif kind == "discard":
            self._punch(offset, min(end, len(self.content)))
        elif kind == "zero":
            self._set_length(max(len(self.content), end))
            self._punch(offset, end)
        elif kind in ("write", "allocate"):
            self._set_length(max(len(self.content), end))
            if kind == "write":
                self.content[offset:end] = data
            self.holes.difference_update(range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)))
        return length

    def _set_length(self, length: int) -> None:
        old = len(self.content)
        if length <= old:
            del self.content[length:]
            self.holes = {block for block in self.holes if block * BLOCK_BYTES < length}
        else:
            self.content.extend(bytes(length - old))
            self.holes.update(range(-(-old // BLOCK_BYTES), -(-length // BLOCK_BYTES)))

    def _punch(self, start: int, end: int) -> None:
        """Zeroes; blocks that lie in the range as a whole become holes."""
        if start >= end:
            return
        self.content[start:end] = bytes(end - start)
        last = end if end < len(self.content) else end + BLOCK_BYTES - 1
        self.holes.update(range(-(-start // BLOCK_BYTES), last // BLOCK_BYTES))


class MemoryFile(HostFile):
    """One open of a MemoryImage. Context: as HostFile's; without latency none is needed."""

    is_block_device = False

    def __init__(
        self, image: MemoryImage, path: str, *, read_only: bool, direct: bool, alignment: int
    ) -> None:
        self.image = image
        self.path = path
        self.read_only = read_only
        self.direct = direct
        self.request_alignment = self.memory_alignment = alignment
        self.writes_inline = image.latency_ns is None
        self._closed = False
        image.opens.append(self)

    def size_bytes(self) -> int:
        return len(self.image.content)

    def start_read(self, offset: int, view: memoryview, done: Done, address: int = 0) -> int | None:
        assert not (offset | len(view)) & (self.request_alignment - 1)
        return self._start("read", offset, len(view), view, done)

    def start_write(
        self, offset: int, view: memoryview, done: Done, address: int = 0
    ) -> int | None:
        assert not (offset | len(view)) & (self.request_alignment - 1)
        return self._start("write", offset, len(view), view, done)

    async def flush(self) -> None:
        if not self.read_only:
            await self._perform("flush", 0, 0)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self._perform("zero", offset, length)

    async def discard(self, offset: int, length: int) -> None:
        try:
            await self._perform("discard", offset, length)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise

    async def truncate(self, length: int) -> None:
        await self._perform("truncate", 0, length)

    async def allocate(self, offset: int, length: int) -> None:
        await self._perform("allocate", offset, length)

    async def extent_at(self, offset: int) -> tuple[bool, int]:
        size = len(self.image.content)
        if offset >= size:
            return False, 0
        holes = self.image.holes
        first = block = offset // BLOCK_BYTES
        is_hole = first in holes
        while block * BLOCK_BYTES < size and (block in holes) == is_hole:
            block += 1
        return not is_hole, min(block * BLOCK_BYTES, size) - offset

    async def write_tail(self, offset: int, view: memoryview) -> None:
        await self._perform("write", offset, len(view), view)

    def lock_byte(self, position: int, *, exclusive: bool = False) -> None:
        if self.byte_is_locked(position, exclusive=exclusive):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), self.path)
        self.unlock_byte(position)
        self.image.locks.add((self, position, exclusive))

    def unlock_byte(self, position: int) -> None:
        self.image.locks -= {(self, position, True), (self, position, False)}

    def byte_is_locked(self, position: int, *, exclusive: bool) -> bool:
        return any(
            owner is not self and byte == position and (exclusive or theirs)
            for owner, byte, theirs in self.image.locks
        )

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.image.locks = {lock for lock in self.image.locks if lock[0] is not self}
            self.image.opens.remove(self)

    async def _perform(
        self, kind: str, offset: int, length: int, view: memoryview | None = None
    ) -> None:
        future: Future[int] = Future(shielded=True)
        result = self._start(kind, offset, length, view, future.set_result)
        self._check(await future if result is None else result)

    def _start(
        self, kind: str, offset: int, length: int, view: memoryview | None, done: Done
    ) -> int | None:
        assert not self._closed, f"{self.path}: used after close"
        image = self.image
        if self.read_only and kind != "read":
            return -errno.EBADF
        if image.latency_ns is None:
            return image.apply(kind, offset, length, view)
        deadline_ns = self.ctx.now_ns() + image.latency_ns(kind, offset, length)
        timer = self.ctx.new_timer(lambda: done(image.apply(kind, offset, length, view)))
        timer.arm(deadline_ns)
        return None


class MemoryFiles:
    """FileEngine over a dictionary of images."""

    def __init__(self, *, direct_alignment: int = 512) -> None:
        """`direct_alignment` is what opens with `direct` ask of requests and memory."""
        self.images: dict[str, MemoryImage] = {}
        self._direct_alignment = direct_alignment

    def add(self, path: str, content: bytes | bytearray = b"") -> MemoryImage:
        """Makes a file, in the place of one that was there."""
        image = self.images[path] = MemoryImage(content)
        return image

    def open(
        self, path: str, *, read_only: bool, direct: bool, aio: str, create: bool = False
    ) -> MemoryFile:
        """See FileEngine.open; `aio` makes no difference."""
        if path not in self.images:
            if not create:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            self.add(path)
        alignment = self._direct_alignment if direct else 1
        return MemoryFile(
            self.images[path], path, read_only=read_only, direct=direct, alignment=alignment
        )
