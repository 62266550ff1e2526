# SPDX-License-Identifier: Apache-2.0
"""The life of a connection in the transmission phase, whoever moves its data.

What ends one, and how. *Finishing* (DISC, the client's end of stream, a broken rule, the server's
shutdown): nothing more is begun; what is in flight is answered; then the socket is closed, and at
the latest when the linger time is over. A client that didn't ask for the end may still be sending.
Closing a socket with unread input resets the connection, which destroys the replies that are on
their way; so we then only *hang up* our half, and throw away what comes until the client has seen
it and closes, or falls silent. *Dropping* (the peer is gone, or that time is over): the socket is
closed now, and requests in flight finish in the background. Either way `on_closed` comes last, when
nothing of the connection is left.

Two classes move data: `Connection` in Python (transmission.py), `NativeConnection` in C
(native_connection.py). They fill in the hooks at the end of the class.
"""

from __future__ import annotations

import enum
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from socket import SHUT_WR
from typing import TYPE_CHECKING

from blockemu.loop.socket_options import may_lose_data

if TYPE_CHECKING:
    import socket

    from blockemu.limits import Limits
    from blockemu.loop.buffers import BufferPool
    from blockemu.loop.timer import Timer
    from blockemu.nbd.reply_style import Failure
    from blockemu.nbd.request import Request
    from blockemu.nbd.session import Session

log = logging.getLogger(__name__)

THROW_AWAY_BYTES = 64 * 1024
"""Unwanted input that is read in one call."""


class State(enum.Enum):
    """Where a connection is in its life."""

    OPEN = "open"
    FINISHING = "finishing"
    HUNG_UP = "hung up"
    CLOSED = "closed"


class BaseConnection(ABC):
    """One client in the transmission phase.

    Context: the home thread of `export.backend.ctx`, for everything but making one.
    """

    __slots__ = (
        "_client_may_send",
        "_deadline_ns",
        "_fd",
        "_linger",
        "_on_closed",
        "_peer",
        "_sock",
        "_state",
        "_unwanted",
        "count",
        "ctx",
        "done_with",
        "export",
        "limits",
        "pool",
        "session",
        "style",
    )

    # What `start` makes, because it belongs to the home thread.
    pool: BufferPool
    _linger: Timer
    # What hanging up makes.
    _unwanted: bytearray

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        *,
        limits: Limits,
        on_closed: Callable[[], None],
        peer: str = "",
    ) -> None:
        """Takes `sock`, which is connected and non-blocking. `on_closed` is called in the home
        thread, once, when the socket is closed and no request is in flight any more.

        Context: any thread; then have the home thread call `start`.
        """
        self.session = session
        self.export = export = session.export
        self.style = session.style
        self.ctx = export.backend.ctx
        self.limits = limits
        self.count = export.statistics.count
        """For each request that is answered."""
        self.done_with: list[Request] = []
        """Requests of pending host I/O that are over, to be used again."""
        self._sock = sock
        self._fd = sock.fileno()
        self._on_closed: Callable[[], None] | None = on_closed
        self._peer = peer
        self._state = State.OPEN
        # While finishing: it hasn't said that it is done, and something is on its way.
        self._client_may_send = False
        self._deadline_ns = 0

    def __repr__(self) -> str:
        return f"nbd client {self._peer or self._fd} of '{self.export.name}'"

    @property
    def wants_answers(self) -> bool:
        """Somebody may still take a reply."""
        return self._state is State.OPEN or self._state is State.FINISHING

    def start(self) -> None:
        """Serve from now on."""
        self.ctx.assert_home()
        self.pool = self.ctx.buffers
        self._linger = self.ctx.new_timer(self._linger_over)
        self.export.connections.add(self)
        self._begin_to_serve()

    def close(self) -> None:
        """Answer what is in flight, then close: `on_closed` tells when. May be called again."""
        self.finish("closed by the server")

    def finish(self, reason: str, *, by_client: bool = False) -> None:
        """Begin no more; go when everything that is owed has been sent.

        `by_client`: it has said that it won't send any more.
        """
        self.ctx.assert_home()
        if self._state is not State.OPEN:
            return
        log.debug("%r: finishing: %s", self, reason)
        self._state = State.FINISHING
        self._stop_reading()
        # Something is owed, or on its way in either direction, as far as one can tell.
        self._client_may_send = not by_client and (self._owes() or may_lose_data(self._sock))
        self._deadline_ns = self.ctx.now_ns() + self.limits.close_linger_ns
        self._linger.arm(self._deadline_ns)
        self._leave_if_answered()

    def drop(self, reason: str) -> None:
        """Close the socket now. What is in flight ends in the background."""
        if self._state is State.CLOSED:
            return
        log.debug("%r: closed: %s", self, reason)
        if self._state is State.HUNG_UP:
            self.ctx.set_fd_handler(self._fd, external=True)
            self._unwanted = bytearray()
        else:
            self._let_go()
        self._state = State.CLOSED
        self._linger.cancel()
        self._sock.close()
        self.export.connections.discard(self)
        self._closed_if_idle()

    def _linger_over(self) -> None:
        self.drop("linger time is over")

    def _leave_if_answered(self) -> None:
        if self._state is State.FINISHING and not self._owes():
            if self._client_may_send:
                self._hang_up()
            else:
                self.drop("all answered")

    def _hang_up(self) -> None:
        """The client gets an end of stream behind its replies; until it closes, we listen."""
        self._let_go()
        self._state = State.HUNG_UP
        try:
            self._sock.shutdown(SHUT_WR)
        except OSError as error:
            self.drop(f"hanging up failed: {error.strerror}")
            return
        self._unwanted = bytearray(THROW_AWAY_BYTES)
        self.ctx.set_fd_handler(self._fd, read=self._throw_away, external=True)
        self._wait_for_silence()

    def _wait_for_silence(self) -> None:
        silent_ns = self.ctx.now_ns() + self.limits.close_silence_ns
        self._linger.arm(min(silent_ns, self._deadline_ns))

    def _throw_away(self) -> None:
        """The socket is readable though we have hung up: nobody will answer what has arrived."""
        try:
            client_sends = self._sock.recv_into(self._unwanted) > 0
        except (BlockingIOError, InterruptedError):
            client_sends = True
        except OSError:
            client_sends = False
        if client_sends:
            self._wait_for_silence()
        else:
            self.drop("hung up")

    def _closed_if_idle(self) -> None:
        if self._state is State.CLOSED and self._on_closed is not None and self._is_idle():
            on_closed, self._on_closed = self._on_closed, None
            on_closed()

    # --- what the two kinds do differently ---

    @abstractmethod
    def pause(self) -> None:
        """A drained section begins: begin no request."""

    @abstractmethod
    def resume(self) -> None:
        """It has ended: go on."""

    @abstractmethod
    def finish_request(self, request: Request, failure: Failure | None) -> None:
        """The request is over: queue its reply, and let go of what it held. None: it went well."""

    def finish_plain(self, request: Request) -> None:
        """The same for a READ or WRITE by the direct map that went well."""
        self.finish_request(request, None)

    @abstractmethod
    def _begin_to_serve(self) -> None:
        """Set up what belongs to the home thread, and watch the socket."""

    @abstractmethod
    def _stop_reading(self) -> None:
        """Begin no request any more, and forget one that is half there."""

    @abstractmethod
    def _owes(self) -> bool:
        """Whether a request is in flight or a reply unsent."""

    @abstractmethod
    def _let_go(self) -> None:
        """Leave the socket to its life's end, and forget unsent replies. Called once."""

    @abstractmethod
    def _is_idle(self) -> bool:
        """Whether no request is in flight any more, after `_let_go`."""
