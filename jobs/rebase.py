# SPDX-License-Identifier: Apache-2.0
"""The rebase job: another backing file below an image, and the guest sees no difference.

Where the image holds nothing itself, the old chain shows through, and soon the new one will. Where
the two differ, the image takes what the old one shows; then its header names the new backing file.
Until that moment the image is as right as before, so the job may end anywhere.

What is asked first is block status: what both chains have from the same layer, or both as zeroes,
is equal without being read. The rest is read and compared cluster by cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from blockemu.drivers.chain_status import backing_node, chain_status
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.zeroes import is_zero
from blockemu.jobs.job import Job

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.node import BlockDriverState

COMPARED_BYTES_MAX = 1024 * 1024
"""Compared at once: two buffers of this size are what the job takes of memory."""

STATUS_BYTES_MAX = 1 << 30
"""Asked about at once: bounds the time between two pause points."""


class Shown(NamedTuple):
    """What a chain shows in the next `length` bytes: zeroes, or what `layer` holds there."""

    length: int
    zero: bool
    layer: tuple[str, str] | None = None
    """Format and real path."""


async def shown(node: BlockDriverState | None, offset: int, length: int) -> Shown:
    """Ask the chain that begins with `node`; None is an empty one. Raises: OSError."""
    if node is None or offset >= node.length_bytes:
        return Shown(length, zero=True)
    length = min(length, node.length_bytes - offset)
    status = await chain_status(node, offset, length)
    if status.zero or not status.allocated:
        return Shown(status.length, zero=True)
    layer: BlockDriverState | None = node
    for _ in range(status.depth):
        layer = backing_node(layer) if layer is not None else None
    if layer is None or layer.filename is None:
        return Shown(status.length, zero=False)
    name = (layer.driver.name, os.path.realpath(layer.filename))
    return Shown(status.length, zero=False, layer=name)


class RebaseJob(Job):
    """Context: that of both chains. It neither opens nor closes them.

    `image`: writable, with its old backing chain; one without any has a node of zeroes in its
    place, so that its clusters can be made to read as zeroes. `new_backing` is None for no backing
    file. `granule`: the image's cluster size.
    """

    kind: ClassVar[str] = "rebase"

    def __init__(
        self,
        job_id: str,
        image: BlockBackend,
        *,
        new_backing: BlockDriverState | None,
        filename: str | None,
        fmt: str | None,
        granule: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(job_id, ctx=image.ctx, **kwargs)
        self._image = image
        self._new = new_backing
        self._names = (filename, fmt)
        self._granule = min(granule, COMPARED_BYTES_MAX)
        self._on_progress = on_progress

    async def work(self) -> None:
        """Copy what would change, then switch. Raises: ImageError, that names the image."""
        try:
            await self._copy_differences()
            await self._image.node.driver.change_backing_file(*self._names)
        except OSError as error:
            raise ImageError.from_os_error(self._image.name, error) from error

    async def _copy_differences(self) -> None:
        total = self._image.length_bytes
        self.add_work(total)
        offset = 0
        while offset < total:
            await self.pause_point()
            length = await self._step(offset, min(total - offset, STATUS_BYTES_MAX))
            self.work_done(length)
            self._on_progress(self.progress_current, self.progress_total)
            offset += length

    async def _step(self, offset: int, length: int) -> int:
        """See to the bytes from `offset`. Returns how many that were."""
        status = await self._image.block_status(offset, length)
        if status.allocated:
            return status.length
        old = Shown(status.length, zero=True)
        if not status.zero:
            old = await shown(backing_node(self._image.node), offset, status.length)
        new = await shown(self._new, offset, old.length)
        if (old.zero and new.zero) or (old.layer is not None and old.layer == new.layer):
            return new.length
        length = min(new.length, COMPARED_BYTES_MAX - offset % COMPARED_BYTES_MAX)
        await self._compare(offset, length)
        return length

    async def _compare(self, offset: int, length: int) -> None:
        """Write what the old chain shows where the new one shows something else."""
        ctx = self._image.ctx
        mine, theirs = ctx.buffers.take(length), ctx.buffers.take(length)
        try:
            await self._image.preadv(offset, mine.view[:length])
            await self._read_new(offset, theirs.view[:length])
            pieces = self._pieces(offset, mine.view[:length], theirs.view[:length])
            for kind, run in groupby(pieces, key=lambda piece: piece[0]):
                bounds = [piece[1:] for piece in run]
                start, end = bounds[0][0], bounds[-1][1]
                if kind == "zero":
                    await self._image.pwrite_zeroes(
                        offset + start, end - start, RequestFlags.MAY_UNMAP
                    )
                elif kind == "data":
                    await self._image.pwritev(offset + start, mine.view[start:end])
        finally:
            ctx.buffers.give(mine)
            ctx.buffers.give(theirs)

    async def _read_new(self, offset: int, view: memoryview) -> None:
        inside = 0
        if self._new is not None:
            inside = max(min(self._new.length_bytes - offset, len(view)), 0)
        if self._new is not None and inside:
            await self._new.preadv(offset, view[:inside])
        view[inside:] = bytes(len(view) - inside)

    def _pieces(
        self, offset: int, mine: memoryview, theirs: memoryview
    ) -> Iterator[tuple[str, int, int]]:
        """Cluster by cluster: (same, zero or data, start and end in the view)."""
        start = 0
        while start < len(mine):
            end = min(start + self._granule - (offset + start) % self._granule, len(mine))
            if bytes(mine[start:end]) == bytes(theirs[start:end]):
                yield "same", start, end
            else:
                yield ("zero" if is_zero(mine[start:end]) else "data"), start, end
            start = end
