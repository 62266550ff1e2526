# SPDX-License-Identifier: Apache-2.0
"""Backends for the server's tests: a disk in memory whose requests wait, fail or finish on command.

`FakeBackend` has BlockBackend's face, and no graph behind it. Its `file` is what its direct map (a
real one) leads to, if it has one. Both keep a diary (`calls`), so that a test can tell by which way
a request came.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.direct_map import WHOLE_DEVICE_BITS, DirectMap
from blockemu.drivers.driver import RequestFlags
from blockemu.loop.coroutine import Future

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

Done = Callable[[int], None]


class FakeFile:
    """What the direct map leads to. `behaviour` says how a request ends:

    "inline" at once; "pending" when the test calls `complete`; "error" at once with EIO; "short"
    at once with one byte too few.
    """

    request_alignment = 1
    memory_alignment = 1

    def __init__(self, disk: bytearray) -> None:
        self.disk = disk
        self.behaviour = "inline"
        self.writes_inline = True
        self.calls: list[tuple[str, int, int]] = []
        self.pending: list[tuple[Callable[[], int], Done]] = []

    def start_read(self, offset: int, view: memoryview, done: Done, address: int = 0) -> int | None:
        def move() -> int:
            view[:] = self.disk[offset : offset + len(view)]
            return len(view)

        return self._start("read", offset, view, move, done)

    def start_write(
        self, offset: int, view: memoryview, done: Done, address: int = 0
    ) -> int | None:
        def move() -> int:
            self.disk[offset : offset + len(view)] = view
            return len(view)

        return self._start("write", offset, view, move, done)

    def native_io(self) -> None:
        """C can't reach a file in memory."""

    def complete(self, index: int = 0, result: int | None = None) -> None:
        """End a pending request: well, or with `result`."""
        move, done = self.pending.pop(index)
        done(move() if result is None else result)

    def _start(
        self, name: str, offset: int, view: memoryview, move: Callable[[], int], done: Done
    ) -> int | None:
        self.calls.append((name, offset, len(view)))
        if self.behaviour == "pending":
            self.pending.append((move, done))
            return None
        if self.behaviour == "error":
            return -errno.EIO
        if self.behaviour == "short":
            return len(view) - 1
        return move()


class FakeBackend:
    """A disk of `length_bytes` in memory. With `mapped`, plain requests can go to `file`.

    While `held`, requests to the backend itself wait in `waiting` until a test ends them there.
    """

    def __init__(
        self, ctx: AioContext, length_bytes: int, *, writable: bool = True, mapped: bool = False
    ) -> None:
        self.ctx = ctx
        self.writable = writable
        self.disk = bytearray(length_bytes)
        self.file = FakeFile(self.disk)
        self.direct_map: DirectMap | None = None
        if mapped:
            self.direct_map = DirectMap(
                cast("Any", self.file), page_bits=WHOLE_DEVICE_BITS, length=length_bytes
            )
            self.direct_map.publish(0, 0, writable=writable)
        self.calls: list[tuple[Any, ...]] = []
        self.errors: dict[str, BaseException] = {}
        self.zeroes: list[tuple[int, int]] | None = None
        """Where the graph knows of zeroes; None: it isn't worth asking."""
        self.held = False
        self.waiting: list[Future[None]] = []
        self.drained_begin: Callable[[], None] = lambda: None
        self.drained_end: Callable[[], None] = lambda: None

    @property
    def as_backend(self) -> BlockBackend:
        """Ourselves, to those who ask for the real thing."""
        return cast("BlockBackend", self)

    def may_tell_zeroes(self, offset: int, length: int) -> bool:
        return self.zeroes is not None

    async def known_zeroes(self, offset: int, length: int, *, worth: int) -> list[tuple[int, int]]:
        await self._enter("known_zeroes", offset, length)
        assert self.zeroes is not None
        pieces = [(max(at, offset), min(at + size, offset + length)) for at, size in self.zeroes]
        return [(at, end - at) for at, end in pieces if end - at >= worth]

    @property
    def length_bytes(self) -> int:
        return len(self.disk)

    def set_dev_ops(
        self, on_drained_begin: Callable[[], None], on_drained_end: Callable[[], None]
    ) -> None:
        self.drained_begin, self.drained_end = on_drained_begin, on_drained_end

    def fail(self, call: str, code: int) -> None:
        """From now on `call` ends with errno `code`."""
        self.errors[call] = OSError(code, os.strerror(code))

    def end(self, index: int = 0) -> None:
        """Let a waiting request go on; the reply leaves in a later round."""
        self.waiting.pop(index).set_result(None)

    def pinned(self) -> int:
        """How many requests of the fast path are pending, by the map's own count."""
        if self.direct_map is None:
            return 0
        pin = self.direct_map.pin()
        self.direct_map.unpin(pin)
        return pin.count

    async def preadv(self, offset: int, view: memoryview) -> None:
        await self._enter("preadv", offset, len(view))
        view[:] = self.disk[offset : offset + len(view)]

    async def pwritev(
        self, offset: int, view: memoryview, flags: RequestFlags = RequestFlags.NONE
    ) -> None:
        await self._enter("pwritev", offset, len(view), flags)
        self.disk[offset : offset + len(view)] = view

    async def pwrite_zeroes(
        self, offset: int, length: int, flags: RequestFlags = RequestFlags.NONE
    ) -> None:
        await self._enter("pwrite_zeroes", offset, length, flags)
        self.disk[offset : offset + length] = bytes(length)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._enter("pdiscard", offset, length)

    async def flush(self) -> None:
        await self._enter("flush")

    async def _enter(self, call: str, *arguments: Any) -> None:
        self.calls.append((call, *arguments))
        if self.held:
            future: Future[None] = Future()
            self.waiting.append(future)
            await future
        if call in self.errors:
            raise self.errors[call]
