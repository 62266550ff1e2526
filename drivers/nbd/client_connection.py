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

from blockemu.drivers.nbd.protocol import (
    EXTENDED_REQUEST,
    NBD_EXTENDED_REQUEST_MAGIC,
    REQUEST,
    Command,
    CommandFlag,
    request_word,
)
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


_REQ_ONE: Final = int(CommandFlag.NBD_CMD_FLAG_REQ_ONE)
_PAYLOAD_LEN: Final = int(CommandFlag.NBD_CMD_FLAG_PAYLOAD_LEN)


class ConnectionLost(OSError):
    """The connection is gone. `final`: by a fault that a new one would show again. `unsent`: the
    request that this is the answer to had not been begun."""

    def __init__(self, reason: str, *, final: bool, unsent: bool = False) -> None:
        super().__init__(errno.EIO, f"{os.strerror(errno.EIO)} ({reason})")
        self.reason = reason
        self.final = final
        self.unsent = unsent


class ClientConnection:
    """Context: home thread of the AioContext that it is attached to."""

    def __init__(
        self,
        sock: StreamSocket,
        facts: ExportFacts,
        *,
        name: str,
        on_lost: Callable[[ClientConnection, ConnectionLost], None],
    ) -> None:
        """Takes `sock`, on which `facts` were agreed. `on_lost` is called once, unless `close` is
        called before. Call `attach` next."""
        self.facts = facts
        self.load = 0
        """Requests that wait here, sent or not."""
        self._leaving = False
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
            extended=facts.extended,
            context=facts.context,
        )
        self._next_cookie = 1
        self._room = Semaphore(REQUESTS_MAX)
        self._out: deque[memoryview] = deque()
        self._blocked = False
        self._send_deferred = False

    # --- whose loop serves it ---

    def attach(self, ctx: AioContext) -> None:
        """Serve it in `ctx` from now on. What was given up before may still have to be sent."""
        self._ctx = ctx
        self._watch()
        self._send_deferred = False
        if self._out:
            self._send_later()
        self._read_buffered_later()

    def detach(self) -> None:
        """Leave the context. Nobody waits for a request; some may be left that were given up."""
        assert self._ctx is not None
        assert not self.load
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
        self.load += 1
        try:
            room = self._room
            if not room.try_acquire():
                await room.acquire()
            try:
                lost = self._lost
                if lost is not None:
                    raise ConnectionLost(lost.reason, final=lost.final, unsent=True)
                request = self._begin(command, flags, offset, length, view)
                try:
                    await request.done
                except Cancelled:
                    self._give_up(request, view)
                    raise
            finally:
                room.release()
        finally:
            self.load -= 1
            if self._leaving and not self.load:
                self.close()
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
        if flags & _REQ_ONE:
            request.extents_max = 1
        self._in_flight[cookie] = request
        has_payload = view is not None and not is_read
        self._out.append(
            memoryview(self._head(command, flags, cookie, offset, length, has_payload=has_payload))
        )
        if view is not None and has_payload:
            self._out.append(view)
        self._send_later()
        return request

    def _head(
        self,
        command: Command,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        *,
        has_payload: bool,
    ) -> bytes:
        name = cookie.to_bytes(8, "big")
        if not self.facts.extended:
            return REQUEST.pack(request_word(command, flags), name, offset, length)
        if has_payload:
            flags |= _PAYLOAD_LEN
        word = request_word(command, flags, NBD_EXTENDED_REQUEST_MAGIC)
        return EXTENDED_REQUEST.pack(word, name, offset, length)

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
        ctx = self._ctx
        if ctx is None or not ctx.is_home():
            return  # it has left in this very round
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
        self._on_lost(self, lost)

    def close_when_idle(self) -> None:
        """`close`, as soon as what is under way here is over."""
        self._leaving = True
        if not self.load:
            self.close()

    def close(self) -> None:
        """Tell the server that we go, if it listens, and go. Nobody waits for a request."""
        if self._lost is not None:
            return
        if not self._out:
            try:
                self._sock.send(self._head(Command.NBD_CMD_DISC, 0, 0, 0, 0, has_payload=False))
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
