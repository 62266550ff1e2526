# SPDX-License-Identifier: Apache-2.0
"""The NBD server: listening sockets, and each connection's way from accept to its end.

A connection is accepted and negotiated in the main loop. When the client has chosen an export, its
socket moves to the AioContext of that export's backend, and from then on only that context's thread
touches it (transmission.py). At the end that thread reports back, and the server forgets it.

Nobody waits for a slow client: negotiation has a time-out, transmission runs elsewhere, and at the
limit of connections the server stops accepting until one leaves.

Context: everything here is the home thread's of the server's `ctx`, the iohandler context.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockemu.drivers.nbd.negotiation_stream import NegotiationError, NegotiationStream
from blockemu.loop.socket_options import tune
from blockemu.loop.sync import WaitQueue
from blockemu.nbd.handshake import Negotiation
from blockemu.nbd.memory_budget import MemoryBudget
from blockemu.nbd.transmission import Connection

if TYPE_CHECKING:
    from blockemu.exports import Export, ExportTable
    from blockemu.limits import Limits
    from blockemu.loop.aio_context import AioContext
    from blockemu.nbd.connection import BaseConnection
    from blockemu.nbd.session import Session
    from blockemu.nbd.tls import TlsPolicy

log = logging.getLogger(__name__)

ACCEPT_RETRY_NS = 100_000_000
"""How long accepting rests when the host is out of file descriptors or memory."""

_HOST_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class NbdServer:
    """Serves the exports of a table to whoever connects."""

    def __init__(
        self,
        ctx: AioContext,
        exports: ExportTable,
        *,
        limits: Limits,
        tls: TlsPolicy | None = None,
    ) -> None:
        self._ctx = ctx
        self._exports = exports
        self._limits = limits
        self.memory = MemoryBudget(ctx, limits)
        self._tls = tls
        self._listeners: dict[socket.socket, bool] = {}
        self._negotiating: set[NegotiationStream] = set()
        self._connections: set[BaseConnection] = set()
        self._accepting = False
        # The host is out of descriptors or memory, and the timer runs.
        self._exhausted = False
        # Since when that is so, as was logged; None when the last client was accepted.
        self._exhausted_since_ns: int | None = None
        self._closing = False
        self._on_last_gone: Callable[[], None] | None = None
        self._has_served = False
        self._left = WaitQueue()
        self._retry = ctx.new_timer(self._try_again)

    @property
    def connection_count(self) -> int:
        """Clients that are connected, in whichever phase."""
        return len(self._negotiating) + len(self._connections)

    def listen(self, sock: socket.socket, *, lists: bool = True) -> None:
        """Accept clients on `sock`, which is bound, listening and non-blocking, and ours now.
        `lists`: they are told what there is, if they ask."""
        assert not self._closing
        self._listeners[sock] = lists
        self._watch(sock, self._accepting)
        self._update_accepting()

    def end_with_last_client(self, on_last_gone: Callable[[], None]) -> None:
        """Accept nobody any more when the last client has left and at least one was served;
        `on_last_gone` is called then."""
        self._on_last_gone = on_last_gone

    async def close(self) -> None:
        """Stop listening, answer what is in flight, close all connections.

        A client in negotiation that has begun an option gets the answer to that (ERR_SHUTDOWN).
        Suspends: until the last one is closed; a client that doesn't take its replies can hold it
        up for `close_linger_ns`, one that doesn't finish its option for `close_silence_ns`.
        """
        self._closing = True
        self._update_accepting()
        for sock in self._listeners:
            sock.close()
        self._listeners.clear()
        self._retry.cancel()
        for stream in [*self._negotiating]:
            stream.end_at_rest("the server is shutting down")
        patience = self._ctx.new_timer(self._end_negotiations)
        patience.arm(self._ctx.now_ns() + self._limits.close_silence_ns)
        for connection in [*self._connections]:
            connection.ctx.schedule_oneshot(connection.close)
        while self.connection_count:
            await self._left.wait()
        patience.cancel()

    def _end_negotiations(self) -> None:
        for stream in [*self._negotiating]:
            stream.abort("the server is shutting down")

    async def disconnect(self, export: Export) -> None:
        """Answer what is in flight, close the connections of one export, which is being removed.

        Suspends: as `close`.
        """
        for connection in self._connections:
            if connection.export is export:
                connection.ctx.schedule_oneshot(connection.close)
        await self.left_by_all(export)

    async def left_by_all(self, export: Export) -> None:
        """Wait until nothing is left of an export's clients. Suspends: until then."""
        while export.clients:
            await self._left.wait()

    # --- accepting ---

    def _update_accepting(self) -> None:
        """Watch the listening sockets, or don't."""
        accepting = (
            not self._closing
            and not self._exhausted
            and self.connection_count < self._limits.connections_max
        )
        if accepting != self._accepting:
            self._accepting = accepting
            for sock in self._listeners:
                self._watch(sock, accepting)

    def _watch(self, sock: socket.socket, accepting: bool) -> None:
        def accept() -> None:
            self._accept(sock)

        self._ctx.set_fd_handler(sock.fileno(), read=accept if accepting else None, external=True)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(self._limits.accepts_per_round_max):
            if not self._accepting:
                return
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._accept_failed(error)
                return
            if self._exhausted_since_ns is not None:
                self._accepts_again()
            sock.setblocking(False)
            self._begin(sock, peer_name(sock, address), lists=self._listeners[listener])

    def _accept_failed(self, error: OSError) -> None:
        if error.errno not in _HOST_EXHAUSTED:
            log.warning("can't accept a client: %s", error.strerror)
            return
        if self._exhausted_since_ns is None:
            self._exhausted_since_ns = self._ctx.now_ns()
            log.warning(
                "can't accept clients: %s; %d are connected, the others wait",
                error.strerror,
                self.connection_count,
            )
        self._exhausted = True
        self._update_accepting()
        self._retry.arm(self._ctx.now_ns() + ACCEPT_RETRY_NS)

    def _try_again(self) -> None:
        """Some time has passed, or a descriptor of ours is free."""
        self._exhausted = False
        self._retry.cancel()
        self._update_accepting()

    def _accepts_again(self) -> None:
        assert self._exhausted_since_ns is not None
        waited_ns = self._ctx.now_ns() - self._exhausted_since_ns
        self._exhausted_since_ns = None
        log.warning("clients are accepted again, after %.1f s", waited_ns / 10**9)

    # --- a connection's way ---

    def _begin(self, sock: socket.socket, peer: str, *, lists: bool) -> None:
        tune(sock, self._limits.keepalive)
        bytes_max = self._limits.negotiation_bytes_max
        stream = NegotiationStream(sock, self._ctx, bytes_max=bytes_max)
        self._negotiating.add(stream)
        self._update_accepting()
        negotiation = Negotiation(stream, self._exports, self._limits, lists=lists, tls=self._tls)
        self._ctx.spawn(self._negotiate(sock, stream, negotiation, peer), name="nbd-negotiation")

    async def _negotiate(
        self, sock: socket.socket, stream: NegotiationStream, negotiation: Negotiation, peer: str
    ) -> None:
        timer = self._ctx.new_timer(lambda: stream.abort("negotiation took too long"))
        timer.arm(self._ctx.now_ns() + self._limits.negotiation_time_max_ns)
        session = None
        try:
            session = await negotiation.run()
        except NegotiationError as error:
            log.info("nbd client %s: %s", peer, error)
        except Exception:
            log.exception("nbd client %s: negotiation failed for a reason of our own", peer)
        finally:
            timer.cancel()
            self._negotiating.discard(stream)
            if session is not None and not self._closing and not session.export.shutting_down:
                self._hand_over(sock, session, peer)
            else:
                if session is not None:
                    session.export.clients -= 1
                stream.close()
                self._gone()

    def _hand_over(self, sock: socket.socket, session: Session, peer: str) -> None:
        """From here on the socket belongs to the export's context."""

        def closed() -> None:
            self._ctx.schedule_oneshot(lambda: self._closed(connection))

        connection = make_connection(
            sock, session, limits=self._limits, on_closed=closed, peer=peer, memory=self.memory
        )
        self._connections.add(connection)
        self._has_served = True
        connection.ctx.schedule_oneshot(connection.start)

    def _closed(self, connection: BaseConnection) -> None:
        self._connections.discard(connection)
        self.memory.forget(connection)
        connection.export.clients -= 1
        self._gone()

    def _gone(self) -> None:
        if self._on_last_gone is not None and self._has_served and not self.connection_count:
            on_last_gone, self._on_last_gone = self._on_last_gone, None
            self._closing = True
            on_last_gone()
        self._try_again()
        self._left.wake_all()


def make_connection(
    sock: socket.socket,
    session: Session,
    *,
    limits: Limits,
    on_closed: Callable[[], None],
    peer: str = "",
    memory: MemoryBudget | None = None,
) -> BaseConnection:
    """A connection in transmission: C moves its data where the export's context has a native poll,
    unless it goes through TLS.

    Context: any thread; then have the home thread call `start`.
    """
    if session.tls is not None:
        # Here, since most servers have no TLS.
        from blockemu.nbd.tls_connection import TlsConnection

        return TlsConnection(
            sock, session, limits=limits, on_closed=on_closed, peer=peer, memory=memory
        )
    if session.export.backend.ctx.native is None:
        return Connection(
            sock, session, limits=limits, on_closed=on_closed, peer=peer, memory=memory
        )
    # Here, since without a native poll the extension isn't needed.
    from blockemu.nbd.native_connection import NativeConnection

    return NativeConnection(
        sock, session, limits=limits, on_closed=on_closed, peer=peer, memory=memory
    )


def peer_name(sock: socket.socket, address: object) -> str:
    """Who connected, for the log."""
    if sock.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
        return f"{address[0]}:{address[1]}"
    return f"on a local socket (fd {sock.fileno()})"
