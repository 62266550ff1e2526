# SPDX-License-Identifier: Apache-2.0
"""One request in flight: the slow path through the block graph, and completion.

`Request` exists only for requests that don't finish where they were parsed: it is what a pending
host I/O calls back, and its `serve` is the coroutine that asks the backend, for everything that the
direct map can't do. commands.py has judged the request before.

When a host I/O of the fast path fails or comes back short, the request is served again by the slow
one: it alone decides what errors mean, so both fail the same way. Reads and writes may be repeated.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.nbd.protocol import NbdError, error_of_errno
from blockemu.loop.coroutine import Cancelled
from blockemu.nbd import block_status, long_range
from blockemu.nbd.commands import (
    BLOCK_STATUS,
    FAST_ZERO,
    FLUSH,
    FUA,
    READ,
    RESIZE,
    WRITE,
    data_bytes,
)
from blockemu.nbd.reply_style import Failure
from blockemu.nbd.resize import resize_export
from blockemu.nbd.sparse_read import PieceError, may_have_holes, read_around_holes

if TYPE_CHECKING:
    from blockemu.drivers.direct_map import DirectMap, Pin
    from blockemu.loop.buffers import Buffer
    from blockemu.nbd.connection import BaseConnection

log = logging.getLogger(__name__)


class Request:
    """Context: home thread of the connection.

    `started_ns` is when it was parsed. `buffer` holds the data of a WRITE, and takes that of a
    READ; the connection owns it again when the request is over. `payload` is what a client of
    extended headers sent with another command. `map` and `pin` are set while a host I/O of the fast
    path is pending.

    `answer`, where `serve` sets it, is the whole reply in parts: bytes made by the connection's
    ReplyStyle, and views of `buffer`, in the order of their addresses. Without one, a READ is
    answered with its buffer and all else with a bare success.
    """

    __slots__ = (
        "answer",
        "buffer",
        "command",
        "connection",
        "cookie",
        "done",
        "flags",
        "length",
        "map",
        "offset",
        "payload",
        "pin",
        "started_ns",
    )

    def __init__(self, connection: BaseConnection) -> None:
        self.connection = connection
        self.command = READ
        self.flags = 0
        self.cookie = b""
        self.offset = 0
        self.length = 0
        self.started_ns = 0
        self.buffer: Buffer | None = None
        self.payload = b""
        self.answer: list[bytes | memoryview] | None = None
        self.map: DirectMap | None = None
        self.pin: Pin | None = None
        # Made once, not for each request that ends up not needing it.
        self.done = self.host_done

    @property
    def bytes_held(self) -> int:
        """Memory that this request's data takes while it is in flight."""
        return data_bytes(self.command, self.length, self.connection.limits)

    def describe(
        self, command: int, flags: int, cookie: bytes, *, offset: int, length: int
    ) -> None:
        """Fill in what the client asked."""
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length

    def host_done(self, result: int) -> None:
        """The pending host I/O of the fast path is over: answer, or ask the graph."""
        pin = self.pin
        assert pin is not None
        pin.count -= 1  # DirectMap.unpin, without two calls
        if not pin.count and pin.waiters is not None:
            pin.waiters.wake_all()
        self.map = self.pin = None
        if result == self.length:
            self.connection.finish_plain(self)
            self.connection.done_with.append(self)
        else:
            self.connection.ctx.spawn(self.serve())

    async def serve(self) -> None:
        """The slow path: whatever it is, the backend does it. Suspends: inside the backend.

        Never raises: what goes wrong is the request's answer.
        """
        failure: Failure | None = None
        try:
            await self._ask_backend()
        except OSError as error:
            at = error.at if isinstance(error, PieceError) else None
            failure = Failure(self._error_of(error), error.strerror or "", at)
            log.debug("%r: request failed: %s", self.connection, error)
        except Cancelled:
            failure = Failure(NbdError.NBD_ESHUTDOWN, "the server is shutting down")
        except Exception:
            failure = Failure(NbdError.NBD_EIO, "internal error: the server's log has it")
            log.exception("%r: request failed for a reason of our own", self.connection)
        self.connection.finish_request(self, failure)

    def _error_of(self, failure: OSError) -> NbdError:
        """What the graph's error is to a client. Two values have a meaning for clients that isn't
        the graph's: ENOTSUP, of FAST_ZERO, and EOVERFLOW, of lengths ("Error values")."""
        error = error_of_errno(failure.errno)
        if error == NbdError.NBD_ENOTSUP and self.flags & FAST_ZERO:
            return error
        if error in (NbdError.NBD_ENOTSUP, NbdError.NBD_EOVERFLOW):
            return NbdError.NBD_EINVAL
        return error

    async def _ask_backend(self) -> None:
        backend = self.connection.export.backend
        command, offset, length = self.command, self.offset, self.length
        flags = RequestFlags.FUA if self.flags & FUA else RequestFlags.NONE
        if command == FLUSH:
            await backend.flush()
        elif command == RESIZE:
            await resize_export(self.connection.export, offset)
        elif not length:
            return
        elif command == READ:
            if may_have_holes(self):
                self.answer = await read_around_holes(self)
                if self.answer is not None:
                    return
            if self.buffer is None:
                self.buffer = self.connection.pool.take(length)
            await backend.preadv(offset, self.buffer.view[:length])
        elif command == WRITE:
            assert self.buffer is not None
            await backend.pwritev(offset, self.buffer.view[:length], flags)
        elif command == BLOCK_STATUS:
            self.answer = await block_status.answer(self)
        else:
            await long_range.carry_out(self)
