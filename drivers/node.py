# SPDX-License-Identifier: Apache-2.0
"""BlockDriverState: a node of the block graph, and the one way to call a driver.

Every request on every driver goes through here. What a driver may rely on is made true in this
file and nowhere else: the caller is in the node's home thread, the range is inside the device, the
node may be written, offsets and lengths are multiples of the driver's `request_alignment`, an
unaligned write is a read-modify-write that no other write overlaps, write-zeroes that the driver
can't do become written zeroes, written zeroes become write-zeroes where the node was asked to look
for them, discards reach it only if they may, FUA becomes a flush where the driver knows none, what
changes the disk is marked in the dirty bitmaps that record (dirty_bitmap.py), and `in_flight` says
how many requests are under way, so that a drained section (drain.py) can wait for none.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.driver import BlockDriver, BlockStatus, RequestFlags
from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.request import RequestTracker
from blockemu.drivers.zeroes import is_zero
from blockemu.loop.sync import WaitQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockemu.drivers.direct_map import DirectMap
    from blockemu.drivers.dirty_bitmap import DirtyBitmap
    from blockemu.drivers.status_runs import StatusRuns
    from blockemu.loop.aio_context import AioContext

OFFSET_MAX = 2**63 - 1
"""Largest byte offset of a host file (off_t)."""

ZERO_WRITE_MAX = 1024 * 1024
"""Bytes of zeroes written at once where a driver can't write zeroes: bounds the buffer."""

NESTED_IMAGES_MAX = 16
"""Images of a backing chain whose calls nest in one stack. A read takes up to nine frames in each
image, and the interpreter allows 1000."""

DETECT_ZEROES = ("off", "on", "unmap")
"""What a node may do with writes of nothing but zeroes: write them as they are; make them
write-zeroes; and let the driver give the space back for them."""

TAIL_PAGE_BYTES = 64 * 1024
"""Alone in this much when the ragged end of a device is written. A file's last bytes go through the
page cache, whole pages at a time, next to which O_DIRECT writes to the same page aren't safe. The
largest page of the architectures that we run on."""


class BlockDriverState:
    """A node: a driver, its children, its parents, and the AioContext all their requests run in."""

    def __init__(self, node_name: str, *, ctx: AioContext, read_only: bool) -> None:
        self.node_name = node_name
        self.ctx = ctx
        self.read_only = read_only
        self.driver: BlockDriver
        self.children: dict[str, BdrvChild] = {}
        self.parents: list[BdrvChild] = []
        self.filename: str | None = None
        """The host path of a file, or of the file below a format: what messages name."""
        self.backing_names: frozenset[str] = frozenset()
        """Host files at or above this node in its backing chain, against cycles."""
        self.backing_depth = 0
        """How many images the longest backing chain below this node has."""
        self.file_options: dict[str, Any] = {}
        """How this node's file was opened (aio, cache), for backing files to inherit."""
        self._refusal: str | None = None
        """Why writes fail with EIO, on a node that has become read-only."""
        self.force_share = False
        """Opened without image locks: others may write meanwhile (`img info -U`)."""
        self.no_io = False
        """Opened to be described: the guest's bytes are neither read nor written (option `no-io`),
        and an encrypted image needs no secret."""
        self.unmap = True
        """Discards are passed on to the driver, and MAY_UNMAP (option `discard`)."""
        self.detect_zeroes = "off"
        """off, on or unmap; changed by `set_detect_zeroes`."""
        self._zeroes_as: RequestFlags | None = None
        """How writes of zeroes are passed on as write-zeroes; None: as they are."""
        self.on_closed: Callable[[], object] = lambda: None
        self.in_flight = 0
        self.mapped_by: list[DirectMap] = []
        """Direct maps that point into this node's host file, past this node. Changed by `add_map`
        and `remove_map`."""
        self.dirty_bitmaps: dict[str, DirtyBitmap] = {}
        """By name. Changed by `add_bitmap`, `remove_bitmap` and `set_recording`."""
        self._recording: list[DirtyBitmap] = []
        self._map_holds = 0
        self._tracker = RequestTracker()
        self._idle = WaitQueue()

    def __repr__(self) -> str:
        return f"<BlockDriverState {self.node_name} in {self.ctx.name}>"

    @property
    def length_bytes(self) -> int:
        return self.driver.length_bytes

    @property
    def maps_writes(self) -> bool:
        """Whether a direct map may lead writes past this node, which then doesn't see them."""
        return not self.read_only and self._zeroes_as is None and not self._recording

    def refuse_writes(self, reason: str) -> None:
        """What is below is damaged: from now on every write fails with EIO, and reads go on."""
        self.read_only = True
        self._refusal = reason

    def set_detect_zeroes(self, mode: str) -> None:
        """Before the first request; "unmap" only together with `unmap`."""
        assert mode in DETECT_ZEROES
        assert self.unmap or mode != "unmap"
        self.detect_zeroes = mode
        self._zeroes_as = None if mode == "off" else RequestFlags.NONE
        if mode == "unmap":
            self._zeroes_as = RequestFlags.MAY_UNMAP

    # --- requests; all in the home thread of `ctx` ---

    async def preadv(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset`. Any alignment.

        Suspends: while I/O is under way. Raises: OSError (EIO past the end of a format node).
        """
        length = len(view)
        self._check_range(offset, length)
        if not length:
            return
        self.in_flight += 1
        try:
            mask = self.driver.request_alignment - 1
            if (offset | length) & mask:
                await self._read_unaligned(offset, view, mask)
            else:
                await self.driver.preadv(offset, view)
        finally:
            self._leave()

    async def pwritev(
        self, offset: int, view: memoryview, flags: RequestFlags = RequestFlags.NONE
    ) -> None:
        """Write `view` at `offset`. Any alignment. Past the end of a protocol node it grows.

        Suspends: while I/O is under way, or older writes must finish first.
        Raises: OSError (EPERM on a read-only node, ENOSPC, EIO; ENOTSUP for WRITE_COMPRESSED on
        a driver that can't).
        """
        length = len(view)
        self._check_write(offset, length)
        if flags and flags & RequestFlags.WRITE_COMPRESSED:
            self._check_compressed()
        if self._zeroes_as is not None and is_zero(view):
            flags = flags & ~RequestFlags.WRITE_COMPRESSED | self._zeroes_as
            await self.pwrite_zeroes(offset, length, flags)
            return
        self.in_flight += 1
        try:
            mask = self.driver.request_alignment - 1
            if not length:
                pass
            elif not mask:
                await self._write_aligned(offset, view, flags)
            else:
                await self._write_blocks(offset, view, flags, mask)
            if flags and flags & RequestFlags.FUA and not self.driver.supports_fua:
                await self.driver.flush()
        finally:
            if self._recording:
                self._record(offset, length)
            self._leave()

    async def pwrite_zeroes(
        self, offset: int, length: int, flags: RequestFlags = RequestFlags.NONE
    ) -> None:
        """Make `length` bytes at `offset` read as zeroes, by the cheapest way the driver has.

        Suspends: while I/O is under way.
        Raises: OSError (ENOTSUP with NO_FALLBACK where zero bytes would have to be written).
        """
        self._check_write(offset, length)
        if not self.unmap:
            flags &= ~RequestFlags.MAY_UNMAP
        self.in_flight += 1
        try:
            if length:
                await self._zero_range(offset, length, flags)
            if flags and flags & RequestFlags.FUA and not self.driver.supports_fua:
                await self.driver.flush()
        finally:
            if self._recording:
                self._record(offset, length)
            self._leave()

    async def pdiscard(self, offset: int, length: int) -> None:
        """Nobody needs these bytes any more. Only whole blocks of the driver are passed on."""
        self._check_write(offset, length)
        if not self.unmap:
            return
        mask = self.driver.request_alignment - 1
        start = (offset + mask) & ~mask
        end = (offset + length) & ~mask
        if start >= end:
            return
        self.in_flight += 1
        try:
            if mask:
                request = await self._tracker.begin(start, end)
                try:
                    await self.driver.pdiscard(start, end - start)
                finally:
                    self._tracker.end(request)
            else:
                await self.driver.pdiscard(start, end - start)
        finally:
            if self._recording:
                self._record(start, end - start)
            self._leave()

    async def flush(self) -> None:
        """Every write acknowledged before this call is on stable storage when it returns."""
        assert self.ctx.is_home(), self
        if self.read_only and self._refusal is None:
            return
        self.in_flight += 1
        try:
            await self.driver.flush()
        finally:
            self._leave()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """What the bytes from `offset` are in this node's layer: at least one byte of them."""
        self._check_range(offset, length)
        assert length > 0
        self.in_flight += 1
        try:
            return await self.driver.block_status(offset, length)
        finally:
            self._leave()

    async def status_runs(self, offset: int, length: int, *, runs_max: int) -> StatusRuns:
        """As `block_status`, in bulk: status_runs.py, which also follows the backing chain."""
        self._check_range(offset, length)
        assert length > 0
        with self.busy():
            return await self.driver.status_runs(offset, length, runs_max=runs_max)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Something is in flight inside: a drained section waits for its end."""
        self.in_flight += 1
        try:
            yield
        finally:
            self._leave()

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        """Change the device's size to `length` bytes."""
        self._check_write(0, 0)
        self.in_flight += 1
        try:
            await self.driver.truncate(length, preallocation=preallocation)
            for bitmap in self.dirty_bitmaps.values():
                bitmap.resize(self.length_bytes)
        finally:
            self._leave()

    # --- what the driver may rely on ---

    def _check_range(self, offset: int, length: int) -> None:
        assert self.ctx.is_home(), self
        end = offset + length
        if offset < 0 or end > OFFSET_MAX:
            raise io_error(errno.EINVAL, f"{self.node_name}: bytes {offset}+{length}")
        if end > self.driver.length_bytes and not self.driver.is_protocol:
            raise io_error(errno.EIO, f"{self.node_name}: bytes {offset}+{length} past the end")

    def _check_write(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        if self.read_only:
            if self._refusal is not None:
                raise io_error(errno.EIO, f"{self.node_name}: {self._refusal}")
            raise io_error(errno.EPERM, f"{self.node_name} is read-only")

    def _check_compressed(self) -> None:
        if not self.driver.supports_compressed_writes:
            reason = f"{self.node_name}: driver {self.driver.name} writes nothing compressed"
            raise io_error(errno.ENOTSUP, reason)

    def _leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.wake_all()

    def _record(self, offset: int, length: int) -> None:
        for bitmap in self._recording:
            if offset + length > bitmap.length_bytes:
                bitmap.resize(max(self.length_bytes, bitmap.length_bytes))
            bitmap.set(offset, length)

    async def wait_idle(self) -> None:
        """Suspends: until no request is in flight. Keeping new ones out is the caller's part."""
        while self.in_flight:
            await self._idle.wait()

    async def _write_aligned(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        if flags and not self.driver.supports_fua:
            flags &= ~RequestFlags.FUA
        await self.driver.pwritev(offset, view, flags)

    async def _write_blocks(
        self, offset: int, view: memoryview, flags: RequestFlags, mask: int
    ) -> None:
        """Write for a driver with blocks."""
        length = len(view)
        if (offset | length) & mask:
            await self._write_unaligned(offset, view, flags, mask)
            return
        request = await self._tracker.begin(offset, offset + length)
        try:
            await self._write_aligned(offset, view, flags)
        finally:
            self._tracker.end(request)

    async def _read_unaligned(self, offset: int, view: memoryview, mask: int) -> None:
        start = offset & ~mask
        end = (offset + len(view) + mask) & ~mask
        buffer = self.ctx.buffers.take(end - start)
        try:
            await self.driver.preadv(start, buffer.view[: end - start])
            view[:] = buffer.view[offset - start : offset - start + len(view)]
        finally:
            self.ctx.buffers.give(buffer)

    async def _write_unaligned(
        self, offset: int, view: memoryview, flags: RequestFlags, mask: int
    ) -> None:
        """Read, modify, write: alone on the blocks that it touches, direct maps included."""
        start = offset & ~mask
        end = (offset + len(view) + mask) & ~mask
        alone_from = start
        if end > self.driver.length_bytes:
            alone_from = start & ~(TAIL_PAGE_BYTES - 1)
        request = await self._tracker.begin(alone_from, end, serialising=True)
        self._hold_maps()
        try:
            for direct_map in list(self.mapped_by):
                await direct_map.wait_idle()
            await self._read_modify_write(start, end, offset, view, flags, mask)
        finally:
            self._release_maps()
            self._tracker.end(request)

    def add_map(self, direct_map: DirectMap) -> None:
        """A new direct map points into this node's host file. It is held, if the others are."""
        self.mapped_by.append(direct_map)
        for _ in range(self._map_holds):
            direct_map.hold()

    def remove_map(self, direct_map: DirectMap) -> None:
        """The map is closed."""
        self.mapped_by.remove(direct_map)

    def _hold_maps(self) -> None:
        self._map_holds += 1
        for direct_map in self.mapped_by:
            direct_map.hold()

    def _release_maps(self) -> None:
        self._map_holds -= 1
        for direct_map in self.mapped_by:
            direct_map.release()

    async def _read_modify_write(
        self, start: int, end: int, offset: int, view: memoryview, flags: RequestFlags, mask: int
    ) -> None:
        true_end = offset + len(view)
        buffer = self.ctx.buffers.take(end - start)
        try:
            bounce = buffer.view[: end - start]
            last_block = end - mask - 1
            if offset > start:
                await self.driver.preadv(start, bounce[: mask + 1])
            is_read = offset > start and last_block == start
            if true_end < min(end, self.driver.length_bytes) and not is_read:
                await self.driver.preadv(last_block, bounce[last_block - start :])
            bounce[offset - start : true_end - start] = view
            # Behind the device's end, which may be inside the last block, there is nothing to keep.
            end = min(end, max(true_end, self.driver.length_bytes))
            await self._write_aligned(start, bounce[: end - start], flags)
        finally:
            self.ctx.buffers.give(buffer)

    async def _zero_range(self, offset: int, length: int, flags: RequestFlags) -> None:
        """Whole blocks by the driver's write zeroes, the ragged ends by writing zero bytes."""
        mask = self.driver.request_alignment - 1
        end = offset + length
        start_whole = min((offset + mask) & ~mask, end)
        end_whole = max(end & ~mask, start_whole)
        if offset < start_whole:
            await self._write_zero_bytes(offset, start_whole, flags)
        if start_whole < end_whole:
            request = await self._tracker.begin(start_whole, end_whole) if mask else None
            try:
                done = await self._try_driver_zeroes(start_whole, end_whole, flags)
            finally:
                if request is not None:
                    self._tracker.end(request)
            if not done:
                await self._write_zero_bytes(start_whole, end_whole, flags)
        if end_whole < end:
            await self._write_zero_bytes(end_whole, end, flags)

    async def _try_driver_zeroes(self, start: int, end: int, flags: RequestFlags) -> bool:
        driver_flags = flags if self.driver.supports_fua else flags & ~RequestFlags.FUA
        try:
            await self.driver.pwrite_zeroes(start, end - start, driver_flags)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            if flags & RequestFlags.NO_FALLBACK:
                raise
            return False
        return True

    async def _write_zero_bytes(self, start: int, end: int, flags: RequestFlags) -> None:
        """Past what detects zeroes, which would bring them here again."""
        mask = self.driver.request_alignment - 1
        size = min(end - start, ZERO_WRITE_MAX)
        buffer = self.ctx.buffers.take(size)
        try:
            buffer.view[:size] = bytes(size)
            while start < end:
                part = buffer.view[: min(size, end - start)]
                if mask:
                    await self._write_blocks(start, part, flags, mask)
                else:
                    await self._write_aligned(start, part, flags)
                start += len(part)
        finally:
            self.ctx.buffers.give(buffer)

    # --- dirty bitmaps; home thread of ctx ---

    async def add_bitmap(self, bitmap: DirtyBitmap) -> None:
        """Have the node keep this bitmap; its name is new here. Suspends: as `set_recording`."""
        assert bitmap.name not in self.dirty_bitmaps, bitmap
        assert bitmap.length_bytes == self.length_bytes, bitmap
        self.dirty_bitmaps[bitmap.name] = bitmap
        await self.set_recording(bitmap, enabled=bitmap.enabled)

    def adopt_bitmap(self, bitmap: DirtyBitmap) -> None:
        """As `add_bitmap`, while the node is being opened: no request has come by yet."""
        self.dirty_bitmaps[bitmap.name] = bitmap
        if bitmap.records:
            self._recording.append(bitmap)

    async def remove_bitmap(self, bitmap: DirtyBitmap) -> None:
        """The node knows the bitmap no more. Suspends: as `set_recording`."""
        del self.dirty_bitmaps[bitmap.name]
        await self.set_recording(bitmap, enabled=False)

    async def set_recording(self, bitmap: DirtyBitmap, *, enabled: bool) -> None:
        """From the return on, the bitmap records every write, or none.

        Suspends: until writes that a direct map has led past this node are done; new ones come by
        here. Cancelled meanwhile, it doesn't record.
        """
        bitmap.enabled = enabled
        if bitmap.records == (bitmap in self._recording):
            return
        maps_writes = self.maps_writes
        if bitmap.records:
            self._recording.append(bitmap)
        else:
            self._recording.remove(bitmap)
        if self.maps_writes == maps_writes:
            return
        try:
            for node in ancestors(self):
                await node.driver.drop_direct_map()
        except BaseException:
            if enabled:
                bitmap.enabled = False
                self._recording.remove(bitmap)
            raise

    # --- the graph; main context, node quiet or not yet in use ---

    def attach_child(self, child: BdrvChild) -> None:
        """Make `child` an edge of this node. Raises: ImageError, if permissions forbid it."""
        assert child.parent is self
        assert child.name not in self.children, child.describe()
        child.node.add_parent(child)
        self.children[child.name] = child
        below = child.node.backing_depth + bool(child.role & Role.BACKING)
        self.backing_depth = max(self.backing_depth, below)

    def add_parent(self, edge: BdrvChild) -> None:
        """Enter `edge` as one more parent, if what it does and forbids suits the others."""
        for other in self.parents:
            for mine, theirs in ((edge, other), (other, edge)):
                clash = mine.perm & ~theirs.shared
                if clash:
                    raise ImageError(
                        self.node_name,
                        f"{mine.describe()} needs {clash!r}, which {theirs.describe()} forbids",
                    )
        self.parents.append(edge)
        try:
            self._refresh_permissions()
        except BaseException:
            self.parents.remove(edge)
            raise

    def remove_parent(self, edge: BdrvChild) -> None:
        """`edge` is gone. The node isn't closed by this; see `close`."""
        self.parents.remove(edge)
        if self.parents:
            self._refresh_permissions()

    def _refresh_permissions(self) -> None:
        perm, shared = Permission.NONE, Permission.ALL
        for edge in self.parents:
            perm |= edge.perm
            shared &= edge.shared
        self.driver.set_permissions(perm, shared)

    async def close(self) -> None:
        """Close the node and every child that no other parent holds. Quiet, flushed or read-only.

        Raises: nothing; a failing close of the host is of no use to anybody.
        """
        assert not self.parents, self
        assert not self.in_flight, self
        await self.driver.close()
        await self.close_children()
        self.on_closed()

    async def close_children(self) -> None:
        """Let go of all children, and close those that nobody else holds."""
        for edge in list(self.children.values()):
            edge.node.remove_parent(edge)
            if not edge.node.parents:
                await edge.node.close()
        self.children.clear()

    def subtree(self) -> list[BlockDriverState]:
        """This node and all below it, parents before children, each once."""
        found: dict[int, BlockDriverState] = {}
        pending = [self]
        while pending:
            node = pending.pop(0)
            if id(node) not in found:
                found[id(node)] = node
                pending.extend(edge.node for edge in node.children.values())
        return list(found.values())


def ancestors(node: BlockDriverState) -> list[BlockDriverState]:
    """`node` and everything above it, children before parents, each once."""
    found: dict[int, BlockDriverState] = {}
    pending = [node]
    while pending:
        current = pending.pop(0)
        if id(current) in found:
            found.pop(id(current))  # seen again, from higher up: it belongs later
        found[id(current)] = current
        pending.extend(edge.parent for edge in current.parents if edge.parent is not None)
    return list(found.values())
