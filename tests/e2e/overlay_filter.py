# SPDX-License-Identifier: Apache-2.0
"""A filter for tests that shows whether requests go around it.

From the moment at which it is inserted it keeps everything that is written, and gives it to the
node below only when it is removed. So a write that goes past it is lost, and a read that goes past
it is stale. It publishes no direct map. Inserting and removing are for a drained section.
"""

from __future__ import annotations

import random
from typing import Any, Self

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.driver import BlockDriver, BlockStatus, RequestFlags
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.loop.sync import yield_now

BLOCK_BYTES = 4096


class OverlayFilter(BlockDriver):
    """A disk in memory over a disk."""

    name = "overlay-filter"
    supports_fua = True

    def __init__(self, node: BlockDriverState, below: BdrvChild, rng: random.Random) -> None:
        super().__init__(node)
        self._below = below
        self._rng = rng
        self._content = bytearray(below.length_bytes)
        self._written: set[int] = set()
        self._removed = False

    @classmethod
    async def open(cls, node: BlockDriverState, options: dict[str, Any], opener: Opener) -> Self:
        raise NotImplementedError("made by insert()")

    @property
    def length_bytes(self) -> int:
        return len(self._content)

    async def load(self) -> None:
        """Begin with what is below."""
        with memoryview(self._content) as view:
            await self._below.preadv(0, view)

    async def store(self) -> None:
        """Write what was kept; nothing may come after."""
        self._removed = True
        with memoryview(self._content) as view:
            for block in sorted(self._written):
                start = block * BLOCK_BYTES
                await self._below.pwritev(start, view[start : start + BLOCK_BYTES])

    async def _take_time(self) -> None:
        assert not self._removed, "a request came to a filter that has been removed"
        for _ in range(self._rng.choice([0, 0, 1, 3])):
            await yield_now()

    async def preadv(self, offset: int, view: memoryview) -> None:
        await self._take_time()
        view[:] = self._content[offset : offset + len(view)]

    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        await self._take_time()
        end = offset + len(view)
        self._content[offset:end] = view
        self._written.update(range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)))

    async def pwrite_zeroes(self, offset: int, length: int, flags: RequestFlags) -> None:
        await self.pwritev(offset, memoryview(bytes(length)), flags)

    async def flush(self) -> None:
        await self._take_time()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(length, data=True, zero=False)


async def insert(backend: BlockBackend, rng: random.Random) -> None:
    """Put a filter between a backend and its node. The node is drained."""
    below = backend.node
    node = BlockDriverState("filter", ctx=below.ctx, read_only=False)
    edge = BdrvChild(
        "file",
        below,
        parent=node,
        role=Role.DATA | Role.FILTERED,
        perm=backend.root.perm,
        shared=Permission.ALL,
    )
    node.driver = driver = OverlayFilter(node, edge, rng)
    below.remove_parent(backend.root)
    node.attach_child(edge)
    backend.root.node = node
    node.add_parent(backend.root)
    await driver.load()


async def remove(backend: BlockBackend) -> None:
    """Take the filter out that `insert` put in. Its node is drained."""
    node = backend.node
    assert isinstance(node.driver, OverlayFilter)
    await node.driver.store()
    edge = node.children.pop("file")
    node.remove_parent(backend.root)
    edge.node.remove_parent(edge)
    backend.root.node = edge.node
    edge.node.add_parent(backend.root)
