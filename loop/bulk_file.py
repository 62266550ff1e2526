# SPDX-License-Identifier: Apache-2.0
"""Files through the page cache, for programs that do nothing but copy: `img convert` and its like.

A daemon's loop must not wait, and has many requests at once. A copy has one caller, large requests,
and a loop with nothing else to do, so here

- reads are on the spot, as in page_cache_file.py;
- writes go to a worker, on tmpfs too, so that the next read goes on beside them; short ones on
  tmpfs excepted, which take less time than waking a worker does;
- one worker at a time writes to a file, all that has gathered meanwhile in one call: the kernel
  lets one in anyway, and who waits for its lock spins on a processor that the reader could use;
- short calls (where is data? truncate) are made on the spot, though a disk may be waited for.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

from blockemu.loop.blocking_io import read_fully, write_fully
from blockemu.loop.file_engine import Done
from blockemu.loop.page_cache_file import INLINE_BYTES_MAX, WRITES_MAX, PageCacheFile
from blockemu.loop.transfer_batches import TransferBatches

T = TypeVar("T")

INLINE_WRITE_BYTES_MAX: Final = 32 << 10
"""Copied to tmpfs in some 10 us."""


class BulkFile(PageCacheFile):
    """`in_memory`: the file is on tmpfs or ramfs."""

    def __init__(self, fd: int, path: str, *, read_only: bool, in_memory: bool) -> None:
        super().__init__(fd, path, read_only=read_only)
        self._in_memory = in_memory
        self._writes = TransferBatches(is_write=True, requests_max=WRITES_MAX, in_turn=True)

    def start_read(self, offset: int, view: memoryview, done: Done, address: int = 0) -> int | None:
        if not self._in_memory:
            return super().start_read(offset, view, done, address)
        return read_fully(self._fd, view, offset)

    def start_write(
        self, offset: int, view: memoryview, done: Done, address: int = 0
    ) -> int | None:
        if self._in_memory and len(view) <= INLINE_WRITE_BYTES_MAX:
            return write_fully(self._fd, view, offset)
        return super().start_write(offset, view, done, address)

    async def truncate(self, length: int) -> None:
        if self.is_block_device:
            raise OSError(errno.ENOTSUP, "a block device keeps its size", self.path)
        self._named(lambda: os.ftruncate(self._fd, length))

    async def flush(self) -> None:
        if not self._in_memory:  # there is no storage behind it
            await super().flush()

    async def _call(self, length: int, work: Callable[..., T], *args: Any) -> T:
        if length <= INLINE_BYTES_MAX:
            return self._named(lambda: work(*args))
        return await super()._call(length, work, *args)
