# SPDX-License-Identifier: Apache-2.0
"""One request in flight: what is allowed, the slow path through the block graph, and completion.

`check` is the protocol's own judgement of a request, before any backend sees it. `Request` exists
only for requests that don't finish where they were parsed: it is what a pending host I/O calls
back, and its `serve` is the coroutine that asks the backend, for everything that the direct map
can't do.

When a host I/O of the fast path fails or comes back short, the request is served again by the slow
one: it alone decides what errors mean, so both fail the same way. Reads and writes may be repeated.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.nbd.protocol import Command, CommandFlag, NbdError, error_of_errno
from blockemu.loop.coroutine import Cancelled

if TYPE_CHECKING:
    from blockemu.drivers.direct_map import DirectMap, Pin
    from blockemu.exports import Export
    from blockemu.limits import Limits
    from blockemu.loop.buffers import Buffer
    from blockemu.nbd.connection import BaseConnection

log = logging.getLogger(__name__)

READ = int(Command.NBD_CMD_READ)
WRITE = int(Command.NBD_CMD_WRITE)
DISC = int(Command.NBD_CMD_DISC)
FLUSH = int(Command.NBD_CMD_FLUSH)
TRIM = int(Command.NBD_CMD_TRIM)
WRITE_ZEROES = int(Command.NBD_CMD_WRITE_ZEROES)
FUA = int(CommandFlag.NBD_CMD_FLAG_FUA)
NO_HOLE = int(CommandFlag.NBD_CMD_FLAG_NO_HOLE)

# FUA is valid for all commands, and means nothing to those that don't write.
_FLAGS_ALLOWED = {
    READ: FUA,
    WRITE: FUA,
    DISC: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    WRITE_ZEROES: FUA | NO_HOLE,
}
_WRITING = frozenset((WRITE, TRIM, WRITE_ZEROES))

WITH_DATA = frozenset((READ, WRITE))
"""Commands whose length is data that travels; that of others is only a range."""


def check(
    export: Export, limits: Limits, command: int, flags: int, *, offset: int, length: int
) -> NbdError:
    """What the protocol has to say against this request; NBD_SUCCESS when it has nothing.

    Source: "Error values", "Request types". A request of no length is fine and does nothing.
    """
    allowed = _FLAGS_ALLOWED.get(command)
    if allowed is None or flags & ~allowed:
        return NbdError.NBD_EINVAL
    if command == FLUSH:
        return NbdError.NBD_EINVAL if offset or length else NbdError.NBD_SUCCESS
    if command in _WRITING and export.read_only:
        return NbdError.NBD_EPERM
    if command in WITH_DATA and length > limits.request_length_max:
        return NbdError.NBD_EINVAL
    if offset + length > export.backend.length_bytes:
        return NbdError.NBD_ENOSPC if command in (WRITE, WRITE_ZEROES) else NbdError.NBD_EINVAL
    return NbdError.NBD_SUCCESS


class Request:
    """Context: home thread of the connection.

    `started_ns` is when it was parsed. `buffer` holds the data of a WRITE, and takes that of a
    READ; the connection owns it again when the request is over. `map` and `pin` are set while a
    host I/O of the fast path is pending.
    """

    __slots__ = (
        "buffer",
        "command",
        "connection",
        "cookie",
        "done",
        "flags",
        "length",
        "map",
        "offset",
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
        self.map: DirectMap | None = None
        self.pin: Pin | None = None
        # Made once, not for each request that ends up not needing it.
        self.done = self.host_done

    @property
    def bytes_held(self) -> int:
        """Memory that this request's data takes while it is in flight."""
        return self.length if self.command in WITH_DATA else 0

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
        assert self.map is not None
        assert self.pin is not None
        self.map.unpin(self.pin)
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
        error = NbdError.NBD_SUCCESS
        try:
            await self._ask_backend()
        except OSError as failure:
            error = error_of_errno(failure.errno)
            log.debug("%r: request failed: %s", self.connection, failure)
        except Cancelled:
            error = NbdError.NBD_ESHUTDOWN
        except Exception:
            error = NbdError.NBD_EIO
            log.exception("%r: request failed for a reason of our own", self.connection)
        self.connection.finish_request(self, error)

    async def _ask_backend(self) -> None:
        backend = self.connection.export.backend
        command, offset, length = self.command, self.offset, self.length
        flags = RequestFlags.FUA if self.flags & FUA else RequestFlags.NONE
        if command == FLUSH:
            await backend.flush()
        elif not length:
            return
        elif command == READ:
            if self.buffer is None:
                self.buffer = self.connection.pool.take(length)
            await backend.preadv(offset, self.buffer.view[:length])
        elif command == WRITE:
            assert self.buffer is not None
            await backend.pwritev(offset, self.buffer.view[:length], flags)
        elif command == WRITE_ZEROES:
            if not self.flags & NO_HOLE:
                flags |= RequestFlags.MAY_UNMAP
            await backend.pwrite_zeroes(offset, length, flags)
        else:
            assert command == TRIM, command
            await backend.pdiscard(offset, length)
            if flags & RequestFlags.FUA:
                await backend.flush()
