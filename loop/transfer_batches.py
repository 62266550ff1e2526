# SPDX-License-Identifier: Apache-2.0
"""Reads and writes for worker threads, in batches.

A job of the thread pool costs 30 us, mostly in hand-offs of the GIL; a 4 KiB write to the page
cache is far shorter. So what a dispatch round has staged goes to a worker at the round's end as one
job: one call into C without the GIL, one completion. A batch that is full leaves at once. It is
full in bytes early, so that large requests still spread over the workers.

The price: the first of a batch is answered with the last.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from blockemu.loop._libaio import ffi, lib
from blockemu.loop.buffers import address_of
from blockemu.loop.file_engine import Done

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

# As long as copying it takes, waking a worker takes as well.
BYTES_MAX: Final = 128 << 10

_TRANSFER: Final = struct.Struct("@QQqqii")
_TRANSFERS: Final = ffi.typeof("struct transfer[]")
_WORDS: Final = _TRANSFER.size // 8
_MOVED: Final = 3  # the word that comes back
assert ffi.sizeof("struct transfer") == _TRANSFER.size == _WORDS * 8


class TransferBatches:
    """The reads, or the writes, of one file. Context: home thread of the file's context.

    `in_turn`: one batch at a time; what is staged meanwhile is the next one, however long.
    """

    __slots__ = (
        "_bytes", "_deferred", "_in_turn", "_is_write", "_packed", "_requests", "_requests_max",
        "_under_way",
    )  # fmt: skip

    def __init__(self, *, is_write: bool, requests_max: int, in_turn: bool = False) -> None:
        self._is_write = int(is_write)
        self._requests_max = requests_max
        self._in_turn = in_turn
        self._under_way = 0
        self._bytes = 0
        self._deferred = False
        self._packed = bytearray()
        # The views keep the memory alive.
        self._requests: list[tuple[memoryview, Done]] = []

    def stage(
        self, ctx: AioContext, fd: int, offset: int, view: memoryview, moved: int, done: Done
    ) -> None:
        """Moves what is missing behind the first `moved` bytes; done(all bytes or -errno) follows
        in a later round."""
        length = len(view)
        self._packed += _TRANSFER.pack(address_of(view), length, offset, moved, fd, self._is_write)
        self._requests.append((view, done))
        self._bytes += length
        if len(self._requests) >= self._requests_max or self._bytes >= BYTES_MAX:
            self._hand_over(ctx)
        elif not self._deferred:
            self._deferred = True
            ctx.defer(lambda: self._end_round(ctx))

    def _end_round(self, ctx: AioContext) -> None:
        self._deferred = False
        if self._requests:
            self._hand_over(ctx)

    def _hand_over(self, ctx: AioContext) -> None:
        if self._in_turn and self._under_way:
            return
        self._under_way += 1
        requests, self._requests = self._requests, []
        packed, self._packed = self._packed, bytearray()
        self._bytes = 0

        def finished(outcome: Any) -> None:
            self._under_way -= 1
            if self._in_turn and self._requests:
                self._hand_over(ctx)
            if isinstance(outcome, BaseException):
                raise outcome  # a defect: C answers with -errno
            _tell(ctx, zip(requests, outcome, strict=True))

        ctx.thread_pool.submit(transfer_all, (packed, len(requests)), finished)


def _tell(ctx: AioContext, finished: Iterator[tuple[tuple[memoryview, Done], int]]) -> None:
    """Runs `done` of all. An exception handler that raises leaves the rest to the next round."""
    try:
        for (_, done), result in finished:
            try:
                done(result)
            except Exception as error:
                ctx.exception_handler(f"completion {done!r}", error)
    except BaseException:
        ctx.schedule_oneshot(lambda: _tell(ctx, finished))
        raise


def transfer_all(packed: bytearray, count: int) -> list[int]:
    """Does `count` packed requests; the result of each, bytes or -errno. For a worker."""
    lib.transfer_all(ffi.from_buffer(_TRANSFERS, packed), count)
    moved: list[int] = memoryview(packed).cast("q")[_MOVED::_WORDS].tolist()
    return moved
