# SPDX-License-Identifier: Apache-2.0
"""A client's connection in the transmission phase: many requests in flight, replies in any order.

Requests that are made in one round leave at its end in one `sendmsg`, payloads from where they lie.
Replies are read as they come, data right into the view that the request brought. A connection ends
once, by `drop`: at the end of the stream, when a system call fails, when the server breaks a rule.
All that was in flight then fails with ConnectionLost, and whether that may be tried again on a new
connection is for link.py to say.

The socket isn't an external one: a drained section waits for our requests, so it must not silence
their replies.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import TYPE_CHECKING, Final

from blockemu.drivers.nbd.protocol import REQUEST, Command, request_word
from blockemu.drivers.nbd.replies import InFlight, ProtocolViolation, ReplyParser
from blockemu.loop.coroutine import Cancelled
from blockemu.loop.stream_socket import has_buffered
from blockemu.loop.sync import Semaphore

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockemu.drivers.nbd.client_handshake import ExportFacts
    from blockemu.loop.aio_context import AioContext
    from blockemu.loop.stream_socket import StreamSocket

REQUESTS_MAX: Final = 64
"""In flight on one connection; those beyond wait. More than servers work on at once."""

SEND_PARTS_MAX: Final = 64
"""Parts (headers, payloads) that one `sendmsg` is handed; IOV_MAX is 1024."""

FILLS_PER_ROUND: Final = 16
"""Reads of the socket in one round of the loop, after which others have their turn."""


class ConnectionLost(OSError):
    """The connection is gone. `final`: by a fault that a new one would show again."""

    def __init__(self, reason: str, *, final: bool) -> None:
        super().__init__(errno.EIO, f"{os.strerror(errno.EIO)} ({reason})")
        self.reason = reason
        self.final = final


class ClientConnection:
    """Context: home thread of the AioContext that it is attached to."""

    def __init__(
        self,
        sock: StreamSocket,
        facts: ExportFacts,
        *,
        name: str,
        on_lost: Callable[[ConnectionLost], None],
    ) -> None:
        """Takes `sock`, on which `facts` were agreed. `on_lost` is called once, unless `close` is
        called before. Call `attach` next."""
        self.facts = facts
        self._sock = sock
        self._fd = sock.fileno()
        self._name = name
        self._on_lost = on_lost
        self._ctx: AioContext | None = None
        self._lost: ConnectionLost | None = None
        self._in_flight: dict[int, InFlight] = {}
        self._parser = ReplyParser(
            self._in_flight,
            structured=facts.structured,
            allocation_context=facts.allocation_context,
        )
        self._next_cookie = 1
        self._room = Semaphore(REQUESTS_MAX)
        self._out: deque[memoryview] = deque()
        self._blocked = False
        self._send_deferred = False

    # --- whose loop serves it ---

    def attach(self, ctx: AioContext) -> None:
        """Serve it in `ctx` from now on. Nothing is in flight."""
        self._ctx = ctx
        self._watch()
        self._read_buffered_later()

    def detach(self) -> None:
        """Leave the context. Nothing is in flight."""
        assert self._ctx is not None
        assert not self._in_flight
        self._ctx.set_fd_handler(self._fd)
        self._ctx = None

    def _watch(self) -> None:
        assert self._ctx is not None
        write = self._send if self._blocked else None
        self._ctx.set_fd_handler(self._fd, read=self._on_readable, write=write)

    # --- requests ---

    async def request(
        self,
        command: Command,
        flags: int = 0,
        *,
        offset: int = 0,
        length: int = 0,
        view: memoryview | None = None,
    ) -> InFlight:
        """Send a request and wait for its reply. `view`: a READ's data goes there, a WRITE's comes
        from there.

        Suspends: until the reply is there. When cancelled, it returns `view` at once and leaves
        the request to itself.
        Raises: OSError, the server's answer; ConnectionLost.
        """
        async with self._room:
            if self._lost is not None:
                raise self._lost
            request = self._begin(command, flags, offset, length, view)
            try:
                await request.done
            except Cancelled:
                self._give_up(request, view)
                raise
            if request.error is not None:
                raise request.error
            return request

    def _begin(
        self, command: Command, flags: int, offset: int, length: int, view: memoryview | None
    ) -> InFlight:
        cookie = self._next_cookie
        self._next_cookie += 1
        is_read = command is Command.NBD_CMD_READ
        request = InFlight(
            cookie, command, offset=offset, length=length, view=view if is_read else None
        )
        self._in_flight[cookie] = request
        head = REQUEST.pack(request_word(command, flags), cookie.to_bytes(8, "big"), offset, length)
        self._out.append(memoryview(head))
        if view is not None and not is_read:
            self._out.append(view)
        self._send_later()
        return request

    def _give_up(self, request: InFlight, view: memoryview | None) -> None:
        """The caller leaves, and takes `view` along."""
        if request.cookie not in self._in_flight:
            return
        self._parser.give_up(request)
        if view is not None and request.command == Command.NBD_CMD_WRITE:
            for index, part in enumerate(self._out):
                if part.obj is view.obj:
                    self._out[index] = memoryview(bytes(part))

    # --- the socket ---

    def _send_later(self) -> None:
        if not self._blocked and not self._send_deferred:
            assert self._ctx is not None
            self._send_deferred = True
            self._ctx.defer(self._end_of_round)

    def _end_of_round(self) -> None:
        self._send_deferred = False
        if self._lost is None and not self._blocked:
            self._send()

    def _send(self) -> None:
        out = self._out
        blocked = False
        try:
            while out and not blocked:
                parts = [out[index] for index in range(min(len(out), SEND_PARTS_MAX))]
                sent = self._sock.sendmsg(parts)
                blocked = sent < sum(len(part) for part in parts)
                self._forget_sent(sent)
        except (BlockingIOError, InterruptedError):
            blocked = True
        except OSError as error:
            self.drop(f"sending to the server failed: {error.strerror}")
            return
        if blocked != self._blocked:
            self._blocked = blocked
            self._watch()

    def _forget_sent(self, count: int) -> None:
        out = self._out
        while out and count >= len(out[0]):
            count -= len(out.popleft())
        if count:
            out[0] = out[0][count:]

    def _on_readable(self) -> None:
        try:
            for _ in range(FILLS_PER_ROUND):
                if not self._parser.fill(self._sock):
                    self.drop("the server hung up")
                    return
                self._parser.parse()
        except (BlockingIOError, InterruptedError):
            pass
        except ProtocolViolation as violation:
            self.drop(f"the server {violation}", final=True)
        except OSError as error:
            self.drop(f"receiving from the server failed: {error.strerror}")
        self._read_buffered_later()

    def _read_buffered_later(self) -> None:
        """TLS may have more for us, of which no poll would tell."""
        ctx = self._ctx
        if ctx is not None and self._lost is None and has_buffered(self._sock):
            ctx.schedule_oneshot(lambda: self._read_buffered(ctx))

    def _read_buffered(self, ctx: AioContext) -> None:
        if self._ctx is ctx and self._lost is None and has_buffered(self._sock):
            self._on_readable()

    # --- the end ---

    def drop(self, reason: str, *, final: bool = False) -> None:
        """Close the socket, and fail what is in flight. More than once is once."""
        if self._lost is not None:
            return
        lost = ConnectionLost(f"{self._name}: {reason}", final=final)
        self._end(lost)
        requests = list(self._in_flight.values())
        self._in_flight.clear()
        for request in requests:
            request.error = lost
            if not request.done.done():
                request.done.set_result(None)
        self._on_lost(lost)

    def close(self) -> None:
        """Tell the server that we go, if it listens, and go. Nothing is in flight."""
        if self._lost is not None:
            return
        if not self._out:
            word = request_word(Command.NBD_CMD_DISC)
            try:
                self._sock.send(REQUEST.pack(word, bytes(8), 0, 0))
            except OSError:
                pass  # it has gone first
        self._end(ConnectionLost(f"{self._name}: closed", final=True))

    def _end(self, lost: ConnectionLost) -> None:
        self._lost = lost
        if self._ctx is not None:
            self._ctx.set_fd_handler(self._fd)
        self._sock.close()
        self._out.clear()
        self._parser.release()
