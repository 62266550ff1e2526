# SPDX-License-Identifier: Apache-2.0
"""null-co: a disk that swallows writes and reads as zeroes. For measuring what is above it."""

from __future__ import annotations

from typing import Any, Self

from blockemu.drivers.driver import BlockDriver, BlockStatus, RequestFlags
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.options import take_bool, take_size
from blockemu.drivers.registry import Opener

DEFAULT_SIZE_BYTES = 1 << 30


class NullDriver(BlockDriver):
    """Options: `size` in bytes (default 1 GiB); `read-zeroes` (default on; off leaves the caller's
    buffer as it is: memory speed without the memory, for those who only count requests)."""

    name = "null-co"
    supports_fua = True

    def __init__(self, node: BlockDriverState, size_bytes: int, *, read_zeroes: bool) -> None:
        super().__init__(node)
        self._size_bytes = size_bytes
        self._read_zeroes = read_zeroes

    @classmethod
    async def open(cls, node: BlockDriverState, options: dict[str, Any], opener: Opener) -> Self:
        size_bytes = take_size(node.node_name, options, "size", DEFAULT_SIZE_BYTES)
        read_zeroes = take_bool(node.node_name, options, "read-zeroes", default=True)
        return cls(node, size_bytes, read_zeroes=read_zeroes)

    @property
    def length_bytes(self) -> int:
        return self._size_bytes

    async def preadv(self, offset: int, view: memoryview) -> None:
        if self._read_zeroes:
            view[:] = bytes(len(view))

    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        return

    async def pwrite_zeroes(self, offset: int, length: int, flags: RequestFlags) -> None:
        return

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(length, data=False, zero=True)
