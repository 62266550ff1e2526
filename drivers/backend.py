# SPDX-License-Identifier: Apache-2.0
"""BlockBackend: what a user of the graph holds, such as an export or a job.

It is the root edge of a graph, and the door of it: requests enter here, are checked against the
device's size, wait at the door while a drained section runs, and are counted. A user that wants the
short cut asks `direct_map`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.drain import DrainedSection
from blockemu.drivers.driver import BlockStatus, RequestFlags
from blockemu.drivers.errors import io_error
from blockemu.drivers.status_runs import StatusRuns, chain_runs
from blockemu.loop.coroutine import run_in_context
from blockemu.loop.sync import WaitQueue

if TYPE_CHECKING:
    from blockemu.drivers.direct_map import DirectMap
    from blockemu.drivers.node import BlockDriverState
    from blockemu.loop.aio_context import AioContext


class BlockBackend:
    """A named hold on `node`. Created and closed in the main context; used in `ctx`.

    Raises: ImageError, when another parent of the node forbids this one.
    """

    def __init__(
        self, name: str, node: BlockDriverState, *, writable: bool, resizable: bool = False
    ) -> None:
        perm = Permission.CONSISTENT_READ
        shared = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
        if writable:
            perm |= Permission.WRITE
        if resizable:
            perm |= Permission.RESIZE
        self.name = name
        self.writable = writable
        self.root = BdrvChild(
            "root", node, parent=None, role=Role.ROOT, perm=perm, shared=shared, owner=self
        )
        node.add_parent(self.root)
        self._quiesced = 0
        self._resumed = WaitQueue()
        self._on_drained_begin: Callable[[], None] | None = None
        self._on_drained_end: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"block backend '{self.name}'"

    @property
    def node(self) -> BlockDriverState:
        return self.root.node

    @property
    def ctx(self) -> AioContext:
        """The AioContext in whose home thread requests are made."""
        return self.root.node.ctx

    @property
    def length_bytes(self) -> int:
        return self.root.node.length_bytes

    @property
    def direct_map(self) -> DirectMap | None:
        """The short cut, if there is one now. Ask again for every batch: graphs change.

        There is none in a drained section: a map that is made inside isn't one of those it holds.
        """
        return None if self._quiesced else self.root.node.driver.direct_map()

    def set_dev_ops(
        self, on_drained_begin: Callable[[], None], on_drained_end: Callable[[], None]
    ) -> None:
        """Be told when a drained section begins and ends, in the home thread."""
        self._on_drained_begin = on_drained_begin
        self._on_drained_end = on_drained_end

    # --- requests; home thread of ctx ---

    async def preadv(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`. Raises: OSError."""
        await self._enter(offset, len(view))
        await self.node.preadv(offset, view)

    async def pwritev(
        self, offset: int, view: memoryview, flags: RequestFlags = RequestFlags.NONE
    ) -> None:
        """Write `view` at `offset`. Raises: OSError."""
        await self._enter(offset, len(view), write=True)
        await self.node.pwritev(offset, view, flags)

    async def pwrite_zeroes(
        self, offset: int, length: int, flags: RequestFlags = RequestFlags.NONE
    ) -> None:
        """Make the range read as zeroes. Raises: OSError."""
        await self._enter(offset, length, write=True)
        await self.node.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Give the range up. Raises: OSError."""
        await self._enter(offset, length, write=True)
        await self.node.pdiscard(offset, length)

    async def flush(self) -> None:
        """All acknowledged writes reach stable storage. Raises: OSError."""
        await self._enter(0, 0)
        await self.node.flush()

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        """Change the device's size; only of a backend that was made `resizable`. Raises: OSError.

        Nothing may be in flight behind the new end.
        """
        assert self.root.perm & Permission.RESIZE, self
        await self._enter(0, 0, write=True)
        await self.node.truncate(length, preallocation=preallocation)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """What the bytes from `offset` are, in the root node's own layer."""
        await self._enter(offset, length)
        return await self.node.block_status(offset, length)

    async def status_runs(self, offset: int, length: int, *, runs_max: int) -> StatusRuns:
        """What the bytes from `offset` are in the whole chain, in bulk: status_runs.py."""
        await self._enter(offset, length)
        return await chain_runs(self.node, offset, length, runs_max=runs_max)

    async def _enter(self, offset: int, length: int, *, write: bool = False) -> None:
        """The door: wait while quiesced, then check against the size and the right to write."""
        while self._quiesced:
            await self._resumed.wait()
        if offset < 0 or length < 0 or offset + length > self.length_bytes:
            raise io_error(
                errno.ENOSPC if write else errno.EINVAL,
                f"{self.name}: bytes {offset}+{length} past the end, {self.length_bytes}",
            )
        if write and not self.writable:
            raise io_error(errno.EPERM, f"{self.name} is read-only")

    # --- drain and moves ---

    def drained_begin(self) -> None:
        """Called by a drained section only: from now on requests wait at the door."""
        self._quiesced += 1
        if self._quiesced == 1 and self._on_drained_begin is not None:
            self._on_drained_begin()

    def drained_end(self) -> None:
        """Called by a drained section only: open the door."""
        self._quiesced -= 1
        if not self._quiesced:
            self._resumed.wake_all()
            if self._on_drained_end is not None:
                self._on_drained_end()

    async def drain(self) -> None:
        """Wait until nothing is in flight. Suspends: until then. Context: home thread of ctx."""
        async with DrainedSection(self.node):
            pass

    async def move_to(self, ctx: AioContext) -> None:
        """Bind the whole graph below to `ctx`, whose home thread must be running or ours.

        Context: main context. Suspends: until the graph is quiet in its old context and attached
        in the new one.
        """
        if ctx is self.ctx:
            return
        section = DrainedSection(self.node)
        nodes = self.node.subtree()

        async def leave() -> None:
            await section.begin()
            for node in nodes:
                node.driver.detach_aio_context()
            section.leave_context()

        async def enter() -> None:
            for node in reversed(nodes):
                node.ctx = ctx
                node.driver.attach_aio_context(ctx)
            section.end()

        await run_in_context(self.ctx, leave)
        await run_in_context(ctx, enter)

    async def close(self) -> None:
        """Flush, let go of the node, and close what nobody else holds.

        Context: home thread of ctx, after the last request. Raises: OSError, if the last flush
        fails; everything is closed all the same.
        """
        await self.drain()
        node = self.node
        try:
            await node.flush()
        finally:
            node.remove_parent(self.root)
            if not node.parents:
                await node.close()
