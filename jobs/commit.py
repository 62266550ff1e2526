# SPDX-License-Identifier: Apache-2.0
"""The commit job: what the images above a base hold goes into the base.

Order is all there is to safety here. While the base is written, the images above it hold what is
being copied, so nobody who looks through them sees the base's bytes there. The base is durable
before the first byte of the top is let go. So whoever looks through the top sees the same disk
after a crash at any point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from blockemu.drivers.chain_status import backing_node
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.zeroes import is_zero
from blockemu.jobs.job import Job

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.node import BlockDriverState

COPY_BYTES = 1024 * 1024
"""Copied at once: the buffer's size, and the most between two pause points."""


class Held(NamedTuple):
    """What a chain that is cut off above the base holds in the next `length` bytes."""

    length: int
    here: bool
    """Some image of the chain has it; else the base shows through."""
    zero: bool = False


async def held(top: BlockDriverState, offset: int, length: int) -> Held:
    """Ask the chain from `top` down to where it is cut off.

    Behind the end of an image between, whatever is above it shows zeroes, and not the base.
    Suspends: while metadata is read. Raises: OSError.
    """
    node = top
    while True:
        if offset >= node.length_bytes:
            return Held(length, here=True, zero=True)
        status = await node.block_status(offset, min(length, node.length_bytes - offset))
        if status.allocated:
            return Held(status.length, here=True, zero=status.zero)
        below = backing_node(node)
        if below is None:
            return Held(status.length, here=False)
        node, length = below, status.length


class CommitJob(Job):
    """Context: that of both graphs. It neither opens nor closes them.

    `top`: its backing chain must be cut off above the base; writable if it is to be emptied.
    `base`: writable and resizable. `empty`: let go of what the top holds, at the end.
    `on_progress` is told (bytes that are done, bytes in all).
    """

    kind: ClassVar[str] = "commit"

    def __init__(
        self,
        job_id: str,
        *,
        top: BlockBackend,
        base: BlockBackend,
        empty: bool,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(job_id, ctx=top.ctx, **kwargs)
        self._top = top
        self._base = base
        self._empty = empty
        self._on_progress = on_progress

    async def work(self) -> None:
        """Copy, make it durable, empty the top. Raises: ImageError, which names the image."""
        await self._grow_base()
        total = self._top.length_bytes
        self.add_work(total)
        offset = 0
        while offset < total:
            await self.pause_point()
            length = await self._step(offset, total - offset)
            self.work_done(length)
            self._on_progress(self.progress_current, self.progress_total)
            offset += length
        try:
            await self._base.flush()
        except OSError as error:
            raise ImageError.from_os_error(self._base.name, error) from error
        if self._empty:
            await self._empty_top()

    async def _grow_base(self) -> None:
        length = self._top.length_bytes
        if self._base.length_bytes >= length:
            return
        try:
            await self._base.truncate(length)
        except OSError as error:
            reason = f"can't grow to {length} bytes: {error.strerror}"
            raise ImageError(self._base.name, reason) from error

    async def _step(self, offset: int, length: int) -> int:
        """See to the bytes from `offset`. Returns how many that were."""
        try:
            found = await held(self._top.node, offset, length)
        except OSError as error:
            raise ImageError.from_os_error(self._top.name, error) from error
        if not found.here:
            return found.length
        if found.zero:
            await self._zero(offset, found.length)
            return found.length
        length = min(found.length, COPY_BYTES - offset % COPY_BYTES)
        await self._copy(offset, length)
        return length

    async def _copy(self, offset: int, length: int) -> None:
        ctx = self._top.ctx
        buffer = ctx.buffers.take(length)
        try:
            view = buffer.view[:length]
            try:
                await self._top.preadv(offset, view)
            except OSError as error:
                raise ImageError.from_os_error(self._top.name, error) from error
            if is_zero(view):
                await self._zero(offset, length)
                return
            try:
                await self._base.pwritev(offset, view)
            except OSError as error:
                raise ImageError.from_os_error(self._base.name, error) from error
        finally:
            ctx.buffers.give(buffer)

    async def _zero(self, offset: int, length: int) -> None:
        try:
            await self._base.pwrite_zeroes(offset, length, RequestFlags.MAY_UNMAP)
        except OSError as error:
            raise ImageError.from_os_error(self._base.name, error) from error

    async def _empty_top(self) -> None:
        try:
            await self._top.node.driver.make_empty()
        except OSError as error:
            raise ImageError.from_os_error(self._top.name, error) from error
