# SPDX-License-Identifier: Apache-2.0
"""A context to run in, and drivers whose requests a test holds in its hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import pytest

from blockemu.drivers.driver import BlockDriver, RequestFlags
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import DriverTable, Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Future
from blockemu.loop.host_file import PosixFiles


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    context = AioContext("test")
    context.adopt()
    yield context
    context.close()


@pytest.fixture
def opener(ctx: AioContext) -> Opener:
    return Opener(files=PosixFiles(), ctx=ctx, drivers=DriverTable())


class ScriptedDriver(BlockDriver):
    """A bytearray with a block size. `gate` set: every call waits for its turn in `waiting`."""

    name = "scripted"

    def __init__(self, node: BlockDriverState, size: int, alignment: int) -> None:
        super().__init__(node)
        self.content = bytearray(size)
        self.alignment = alignment
        self.calls: list[tuple[Any, ...]] = []
        self.gated = False
        self.waiting: list[Future[None]] = []

    @classmethod
    async def open(cls, node: BlockDriverState, options: dict[str, Any], opener: Opener) -> Self:
        return cls(node, options.pop("size", 1 << 20), options.pop("alignment", 1))

    @property
    def request_alignment(self) -> int:
        return self.alignment

    @property
    def length_bytes(self) -> int:
        return len(self.content)

    async def _turn(self, *call: Any) -> None:
        self.calls.append(call)
        if self.gated:
            turn: Future[None] = Future()
            self.waiting.append(turn)
            await turn

    async def preadv(self, offset: int, view: memoryview) -> None:
        await self._turn("read", offset, len(view))
        found = self.content[offset : offset + len(view)]
        view[:] = found + bytes(len(view) - len(found))

    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        await self._turn("write", offset, len(view))
        self.content[offset : offset + len(view)] = view

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._turn("discard", offset, length)

    async def flush(self) -> None:
        await self._turn("flush")


def scripted_node(
    ctx: AioContext, *, size: int = 1 << 20, alignment: int = 1, read_only: bool = False
) -> tuple[BlockDriverState, ScriptedDriver]:
    node = BlockDriverState("scripted0", ctx=ctx, read_only=read_only)
    driver = ScriptedDriver(node, size, alignment)
    node.driver = driver
    return node, driver
