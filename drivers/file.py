# SPDX-License-Identifier: Apache-2.0
"""file and host_device: a host file or block device as a node, the bottom of most graphs.

The engine below (loop/host_file.py) does the I/O; this driver turns it into a device: bytes past
the end of the file read as zeroes, writes there make it grow, a file whose size isn't a multiple of
the O_DIRECT block is served to its last byte, zeroes and discards become holes where the filesystem
has them, and the image lock is held for as long as the node is open.
"""

from __future__ import annotations

import errno
from typing import Any, Self

from blockemu.drivers.child import Permission
from blockemu.drivers.direct_map import WHOLE_DEVICE_BITS, DirectMap
from blockemu.drivers.driver import BlockDriver, BlockStatus, RequestFlags
from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.image_lock import ImageLock
from blockemu.drivers.map_slot import MapSlot
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.options import take_bool, take_choice, take_dict, take_str
from blockemu.drivers.registry import Opener
from blockemu.drivers.status_runs import ALLOCATED, DATA, ZERO, StatusRuns
from blockemu.loop.aio_context import AioContext
from blockemu.loop.host_file import HostFile

FULL_WRITE_BYTES = 1024 * 1024
"""Zeroes written at once by preallocation=full."""

EXTENTS_AT_ONCE = 512
"""Holes and stretches of data asked for at once: two system calls each, so half a millisecond."""


class FileDriver(BlockDriver):
    """Options: `filename`; `aio` native (default) or threads; `cache.direct` on or off (default);
    `cache.no-flush` (flushes are acknowledged and forgotten: for throw-away images only);
    `locking` auto (default) or off."""

    name = "file"
    is_protocol = True

    def __init__(
        self,
        node: BlockDriverState,
        file: HostFile,
        *,
        lock: ImageLock | None,
        no_flush: bool,
    ) -> None:
        super().__init__(node)
        self.host_file: HostFile = file
        self._lock = lock
        self._no_flush = no_flush
        self._length_bytes = file.size_bytes()
        self._map_slot = MapSlot(self._make_map)

    @classmethod
    async def open(cls, node: BlockDriverState, options: dict[str, Any], opener: Opener) -> Self:
        filename = take_str(node.node_name, options, "filename")
        aio = take_choice(filename, options, "aio", ("native", "threads"), "native")
        locking = take_choice(filename, options, "locking", ("auto", "off"), "auto")
        cache = take_dict(filename, options, "cache")
        direct = take_bool(filename, cache, "direct", default=False)
        no_flush = take_bool(filename, cache, "no-flush", default=False)
        if cache:
            raise ImageError(filename, f"option 'cache' has no '{next(iter(cache))}'")
        node.filename = filename
        node.file_options = {"aio": aio, "cache": {"direct": direct, "no-flush": no_flush}}
        file = _open_host_file(opener, filename, read_only=node.read_only, direct=direct, aio=aio)
        file.attach(node.ctx)
        lock = ImageLock(file) if locking == "auto" and not node.force_share else None
        try:
            return cls(node, file, lock=lock, no_flush=no_flush)
        except OSError as error:
            file.close()
            raise ImageError.from_os_error(filename, error) from error

    @property
    def request_alignment(self) -> int:
        return self.host_file.request_alignment

    @property
    def length_bytes(self) -> int:
        return self._length_bytes

    async def preadv(self, offset: int, view: memoryview) -> None:
        got = await self.host_file.read(offset, view)
        if got < len(view):
            view[got:] = bytes(len(view) - got)

    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        end = offset + len(view)
        if end > self._length_bytes:
            self._refuse_growth_of_device(end)
        ragged = end & (self.host_file.request_alignment - 1)
        whole = len(view) - ragged
        if whole:
            await self.host_file.write(offset, view[:whole])
        if ragged:
            await self.host_file.write_tail(end - ragged, view[whole:])
        self._length_bytes = max(self._length_bytes, end)

    async def pwrite_zeroes(self, offset: int, length: int, flags: RequestFlags) -> None:
        if offset + length > self._length_bytes:
            raise io_error(errno.ENOTSUP, "zeroes past the end are written")
        unmap = bool(flags & RequestFlags.MAY_UNMAP)
        await self.host_file.write_zeroes(offset, length, unmap=unmap)

    async def pdiscard(self, offset: int, length: int) -> None:
        length = min(length, self._length_bytes - offset)
        if length > 0:
            await self.host_file.discard(offset, length)

    async def flush(self) -> None:
        if not self._no_flush:
            await self.host_file.flush()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        if offset >= self._length_bytes:
            return BlockStatus(length, data=False, zero=True)
        is_data, count = await self.host_file.extent_at(offset)
        count = max(1, min(count, length, self._length_bytes - offset))
        return BlockStatus(
            count, data=is_data, zero=not is_data, host_offset=offset, file=self.node.filename
        )

    async def status_runs(self, offset: int, length: int, *, runs_max: int) -> StatusRuns:
        end = min(offset + length, self._length_bytes)
        runs = StatusRuns()
        if offset < end:
            found = await self.host_file.extents(
                offset, end, count_max=min(runs_max, EXTENTS_AT_ONCE)
            )
            for is_data, count in found:
                runs.add(count, ALLOCATED | DATA if is_data else ALLOCATED | ZERO)
        if not runs:  # behind the end, which may have come nearer
            runs.add(length, ALLOCATED | ZERO)
        runs.cut(length)
        return runs

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        if self.host_file.is_block_device:
            await self._take_device_of(length)
            return
        old = self._length_bytes
        async with self._map_slot.shut():
            if preallocation == "falloc" and length > old:
                await self.host_file.allocate(old, length - old)
            await self.host_file.truncate(length)
            self._length_bytes = length
        if preallocation == "full" and length > old:
            await self._write_zeroes_in_full(old, length)

    async def _take_device_of(self, length: int) -> None:
        """A device has the size that its host gave it, which may have changed since it was opened
        (a logical volume): that one is taken, with whatever the device has there."""
        size = self.host_file.size_bytes()
        if length > size:
            raise io_error(errno.ENOSPC, f"the device ends at {size}")
        if length < size:
            raise io_error(errno.ENOTSUP, f"the device has {size} bytes, and keeps them")
        async with self._map_slot.shut():
            self._length_bytes = size

    async def _write_zeroes_in_full(self, start: int, end: int) -> None:
        buffer = self.node.ctx.buffers.take(FULL_WRITE_BYTES)
        try:
            buffer.view[:FULL_WRITE_BYTES] = bytes(FULL_WRITE_BYTES)
            while start < end:
                part = min(FULL_WRITE_BYTES - start % FULL_WRITE_BYTES, end - start)
                await self.node.pwritev(start, buffer.view[:part])
                start += part
        finally:
            self.node.ctx.buffers.give(buffer)

    def _refuse_growth_of_device(self, end: int) -> None:
        if self.host_file.is_block_device and end > self._length_bytes:
            raise io_error(errno.ENOSPC, f"the device ends at {self._length_bytes}")

    async def close(self) -> None:
        for direct_map in list(self.node.mapped_by):
            await direct_map.close()  # the descriptor's number may soon be another file's
        self.host_file.close()

    def set_permissions(self, perm: Permission, shared: Permission) -> None:
        if self._lock is not None:
            self._lock.update(perm, shared)

    def attach_aio_context(self, ctx: AioContext) -> None:
        self.host_file.attach(ctx)

    def detach_aio_context(self) -> None:
        for direct_map in self.node.mapped_by:
            direct_map.detach()
        self.host_file.detach()

    def direct_map(self) -> DirectMap | None:
        return self._map_slot.get()

    async def drop_direct_map(self) -> None:
        await self._map_slot.drop()

    def _make_map(self) -> tuple[DirectMap, BlockDriverState]:
        made = DirectMap(
            self.host_file,
            page_bits=WHOLE_DEVICE_BITS,
            length=self._length_bytes,
            durable=not self._no_flush,
        )
        made.publish(0, 0, writable=self.node.maps_writes)
        return made, self.node


class HostDeviceDriver(FileDriver):
    """A host block device, under QEMU's name for it."""

    name = "host_device"


def _open_host_file(
    opener: Opener, filename: str, *, read_only: bool, direct: bool, aio: str
) -> HostFile:
    try:
        return opener.files.open(filename, read_only=read_only, direct=direct, aio=aio)
    except OSError as error:
        raise ImageError.from_os_error(filename, error) from error
