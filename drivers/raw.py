# SPDX-License-Identifier: Apache-2.0
"""raw: the bytes of the file below, as they are, or a window of them."""

from __future__ import annotations

import errno
from typing import Any, Self

from blockemu.drivers.child import BdrvChild, Role
from blockemu.drivers.direct_map import WHOLE_DEVICE_BITS, DirectMap
from blockemu.drivers.driver import BlockDriver, BlockStatus, RequestFlags
from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.map_slot import MapSlot
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.options import take_size
from blockemu.drivers.registry import Opener
from blockemu.drivers.status_runs import StatusRuns


class RawDriver(BlockDriver):
    """Options: `file`; `offset` and `size` in bytes: where the window begins, how long it is."""

    name = "raw"
    supports_fua = True

    def __init__(self, node: BlockDriverState, file: BdrvChild, offset: int, size: int | None):
        super().__init__(node)
        self._file = file
        self._offset = offset
        self._size = size
        self._map_slot = MapSlot(self._make_map)

    @classmethod
    async def open(cls, node: BlockDriverState, options: dict[str, Any], opener: Opener) -> Self:
        perm, shared = opener.file_permissions(node)
        file = await opener.open_child(
            node, "file", options.pop("file", None), role=Role.DATA, perm=perm, shared=shared
        )
        name = node.filename or node.node_name
        offset = take_size(name, options, "offset", 0)
        size = take_size(name, options, "size", None)
        available = file.length_bytes - offset
        if available < 0 or (size is not None and size > available):
            raise ImageError(
                name,
                f"offset {offset} and size {size} reach past its end at {file.length_bytes}",
            )
        if offset and size is None:
            size = available
        return cls(node, file, offset, size)

    @property
    def length_bytes(self) -> int:
        return self._file.length_bytes if self._size is None else self._size

    async def preadv(self, offset: int, view: memoryview) -> None:
        await self._file.preadv(self._offset + offset, view)

    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        await self._file.pwritev(self._offset + offset, view, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: RequestFlags) -> None:
        await self._file.pwrite_zeroes(self._offset + offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._file.pdiscard(self._offset + offset, length)

    async def flush(self) -> None:
        await self._file.flush()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return await self._file.block_status(self._offset + offset, length)

    async def status_runs(self, offset: int, length: int, *, runs_max: int) -> StatusRuns:
        return await self._file.status_runs(self._offset + offset, length, runs_max=runs_max)

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        if self._size is not None:
            raise io_error(errno.ENOTSUP, "a window of a file (offset, size) can't be resized")
        async with self._map_slot.shut():
            await self._file.truncate(length, preallocation=preallocation)

    async def close(self) -> None:
        await self._map_slot.drop()

    def direct_map(self) -> DirectMap | None:
        return self._map_slot.get()

    async def drop_direct_map(self) -> None:
        await self._map_slot.drop()

    def _make_map(self) -> tuple[DirectMap, BlockDriverState] | None:
        below = self._file.node.driver.host_file
        if below is None or self._offset & (below.request_alignment - 1):
            return None
        made = DirectMap(below, page_bits=WHOLE_DEVICE_BITS, length=self.length_bytes, durable=True)
        writable = self.node.maps_writes and self._file.node.maps_writes
        made.publish(0, self._offset, writable=writable)
        return made, self._file.node
