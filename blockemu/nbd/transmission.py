# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one connection: requests in, replies out, many in flight between.

The life of a plain request (the fast path, intake.py). One `recv` brings many headers. A header is
unpacked; one comparison says that it is a READ or WRITE without flags; the export's direct map
knows where in the host file the bytes are; the host file moves them at once; the reply joins the
queue, which leaves at the end of the round in one `sendmsg`. No object is made for such a request,
and nothing waits. What isn't so plain becomes a `Request` (request.py): when the host I/O is
pending, or when the block graph has to be asked, by a coroutine. Replies leave in the order in
which requests end.

What bounds a client (limits.py has the numbers):

- Requests in flight, and the bytes of theirs that are in memory. At the bound the socket isn't read
  until they fall; the client waits in its own `send`.
- A client that doesn't read its replies: when a few MiB of them wait, no more requests are begun.
- Work in one round of the loop, after which the loop's other connections get their turn.

What ends a connection, and how. *Finishing* (DISC, the client's end of stream, a broken rule, the
server's shutdown): nothing more is begun; what is in flight is answered; then the socket is closed,
and at the latest when the linger time is over. A client that didn't ask for the end may still be
sending. Closing a socket with unread input resets the connection, which destroys the replies that
are on their way; so we then only *hang up* our half, and throw away what comes until the client
has seen it and closes, or falls silent. *Dropping* (the peer is gone, or that time is over): the
socket is closed now, and requests in flight finish in the background. Either way `on_closed` comes
last, when nothing of the connection is left.

Many replies (reply_queue.py has the numbers) leave at once instead of at the end of the round: the
client takes them and sends its next requests while we go on.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from socket import SHUT_WR
from typing import TYPE_CHECKING

from blockemu.nbd.intake import Intake
from blockemu.nbd.protocol import (
    NBD_SIMPLE_REPLY_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_OK,
    NbdError,
)
from blockemu.nbd.reply_queue import EARLY_REPLY_BYTES, EARLY_REPLY_PARTS, ReplyQueue
from blockemu.nbd.request import READ, WITH_DATA, Request
from blockemu.nbd.socket_options import may_lose_data

if TYPE_CHECKING:
    import socket

    from blockemu.exports import Export
    from blockemu.limits import Limits
    from blockemu.loop.bottom_half import BH
    from blockemu.loop.buffers import BufferPool
    from blockemu.loop.timer import Timer

log = logging.getLogger(__name__)


class State(enum.Enum):
    """Where a connection is in its life."""

    OPEN = "open"
    FINISHING = "finishing"
    HUNG_UP = "hung up"
    CLOSED = "closed"


class Connection:
    """One client in the transmission phase.

    Context: the home thread of `export.backend.ctx`, for everything but making one.
    """

    __slots__ = (
        "_blocked",
        "_client_may_send",
        "_continue_bh",
        "_deadline_ns",
        "_fd",
        "_flush_deferred",
        "_in_flight",
        "_in_flight_bytes",
        "_linger",
        "_on_closed",
        "_paused",
        "_peer",
        "_sock",
        "_state",
        "ctx",
        "export",
        "intake",
        "limits",
        "pool",
        "replies",
    )

    # What `start` makes, because it belongs to the home thread.
    pool: BufferPool
    replies: ReplyQueue
    intake: Intake
    _continue_bh: BH
    _linger: Timer

    def __init__(
        self,
        sock: socket.socket,
        export: Export,
        *,
        limits: Limits,
        on_closed: Callable[[], None],
        peer: str = "",
    ) -> None:
        """Takes `sock`, which is connected and non-blocking. `on_closed` is called in the home
        thread, once, when the socket is closed and no request is in flight any more.

        Context: any thread; then have the home thread call `start`.
        """
        self.export = export
        self.ctx = export.backend.ctx
        self.limits = limits
        self._sock = sock
        self._fd = sock.fileno()
        self._on_closed: Callable[[], None] | None = on_closed
        self._peer = peer
        self._state = State.OPEN
        self._in_flight = 0
        self._in_flight_bytes = 0
        # The kernel's buffer is full: replies wait for EPOLLOUT, and no requests are read.
        self._blocked = False
        # Requests have arrived that wait for a bound to fall, their turn, or a drained section.
        self._paused = False
        self._flush_deferred = False
        # While finishing: it hasn't said that it is done, and something is on its way.
        self._client_may_send = False
        self._deadline_ns = 0

    def __repr__(self) -> str:
        return f"nbd client {self._peer or self._fd} of '{self.export.name}'"

    # --- life cycle ---

    def start(self) -> None:
        """Serve from now on."""
        self.ctx.assert_home()
        self.pool = self.ctx.buffers
        self.replies = ReplyQueue(self._sock, self.pool)
        self.intake = Intake(self, self._sock)
        self._continue_bh = self.ctx.new_bh(self.go_on, name="nbd-continue")
        self._linger = self.ctx.new_timer(self._linger_over)
        self.export.connections.add(self)
        self._set_interest()

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
        self.intake.forget()
        self._client_may_send = not by_client and self._is_busy()
        self._set_interest()
        self._deadline_ns = self.ctx.now_ns() + self.limits.close_linger_ns
        self._linger.arm(self._deadline_ns)
        self._leave_if_answered()

    def _is_busy(self) -> bool:
        """Something is owed, or on its way in either direction, as far as one can tell."""
        return self._in_flight > 0 or bool(self.replies.parts) or may_lose_data(self._sock)

    def drop(self, reason: str) -> None:
        """Close the socket now. What is in flight ends in the background."""
        if self._state is State.CLOSED:
            return
        log.debug("%r: closed: %s", self, reason)
        self._state = State.CLOSED
        self._set_interest()
        self._linger.cancel()
        self._continue_bh.delete()
        self.intake.forget()
        self.replies.clear()
        self._sock.close()
        self.export.connections.discard(self)
        self._closed_if_idle()

    def _linger_over(self) -> None:
        self.drop("linger time is over")

    def _leave_if_answered(self) -> None:
        if self._state is State.FINISHING and not self._in_flight and not self.replies.parts:
            if self._client_may_send:
                self._hang_up()
            else:
                self.drop("all answered")

    def _hang_up(self) -> None:
        """The client gets an end of stream behind its replies; until it closes, we listen."""
        self._state = State.HUNG_UP
        try:
            self._sock.shutdown(SHUT_WR)
        except OSError as error:
            self.drop(f"hanging up failed: {error.strerror}")
            return
        self._set_interest()
        self._wait_for_silence()

    def _wait_for_silence(self) -> None:
        silent_ns = self.ctx.now_ns() + self.limits.close_silence_ns
        self._linger.arm(min(silent_ns, self._deadline_ns))

    def _throw_away(self) -> None:
        """The socket is readable though we have hung up."""
        if self.intake.throw_away():
            self._wait_for_silence()
        else:
            self.drop("hung up")

    def _closed_if_idle(self) -> None:
        if self._state is State.CLOSED and not self._in_flight and self._on_closed is not None:
            on_closed, self._on_closed = self._on_closed, None
            on_closed()

    # --- when to read and write ---

    @property
    def stopped(self) -> bool:
        """No request may begin: too many replies can't leave, or the connection is over."""
        return self._backed_up() or self._state is not State.OPEN

    def _backed_up(self) -> bool:
        """The client doesn't take its replies, and what waits for it has reached its bound."""
        if not self._blocked:
            return False
        replies, limits = self.replies, self.limits
        return (
            replies.bytes_held >= limits.unsent_bytes_max
            or len(replies.parts) >= limits.unsent_parts_max
        )

    def go_on(self) -> None:
        """Begin the requests that have arrived, as far as the bounds let us."""
        if self._state is State.OPEN:
            self._pause(self._backed_up() or self.export.quiet or self.intake.parse())
            if self.replies.parts:
                self.send_later()

    def go_on_later(self) -> None:
        """Our time in this round is up: go on in the next."""
        self._continue_bh.schedule()

    def resume(self) -> None:
        """A bound fell or a drained section ended: go on, if we had to stop, in the next round."""
        if self._paused and self._state is State.OPEN:
            self._continue_bh.schedule()

    def _pause(self, paused: bool) -> None:
        if paused != self._paused and self._state is not State.CLOSED:
            self._paused = paused
            self._set_interest()

    def _set_interest(self) -> None:
        """Tell the loop what this connection waits for."""
        on_readable: Callable[[], None] | None = None
        if self._state is State.OPEN and not self._paused:
            on_readable = self._on_readable
        elif self._state is State.HUNG_UP:
            on_readable = self._throw_away
        writing = self._blocked and self._state is not State.CLOSED
        self.ctx.set_fd_handler(
            self._fd,
            read=on_readable,
            write=self.send if writing else None,
            external=True,
        )

    def _on_readable(self) -> None:
        if self.intake.receive():
            self.go_on()

    # --- replies ---

    def send(self) -> None:
        """Hand the kernel the queued replies, as many as it takes. May `drop` the connection."""
        if self._state is State.CLOSED:
            return
        try:
            blocked = not self.replies.send()
        except OSError as error:
            self.drop(f"send failed: {error.strerror}")
            return
        if blocked != self._blocked:
            self._blocked = blocked
            self._set_interest()
        if not blocked:
            self.resume()
            self._leave_if_answered()

    def send_later(self) -> None:
        """Replies were queued: see that they leave; at once, if they are many."""
        if self._blocked:
            return
        replies = self.replies
        if replies.bytes_held >= EARLY_REPLY_BYTES or len(replies.parts) >= EARLY_REPLY_PARTS:
            self.send()
        elif not self._flush_deferred:
            self._flush_deferred = True
            self.ctx.defer(self._end_of_round)

    def _end_of_round(self) -> None:
        self._flush_deferred = False
        if not self._blocked:
            self.send()

    # --- requests in flight ---

    def room(self) -> int:
        """The length that a request may have without a second thought; -1 for none at all."""
        if self._in_flight >= self.limits.in_flight_requests_max:
            return -1
        return self.limits.in_flight_bytes_max - self._in_flight_bytes - self.replies.bytes_held

    def must_wait(self, command: int, length: int) -> bool:
        """Whether a request must wait for others to end. One alone never has to."""
        if self._in_flight >= self.limits.in_flight_requests_max:
            return True
        held = self._in_flight_bytes + self.replies.bytes_held
        if not held or command not in WITH_DATA:
            return False
        return held + length > self.limits.in_flight_bytes_max

    def admit(self, request: Request) -> None:
        """`request` is in flight from now on, until `finish_request` or `forget_request`."""
        self._in_flight += 1
        self._in_flight_bytes += request.bytes_held

    def admit_data(self, length: int) -> None:
        """The same for a plain READ or WRITE of `length` bytes."""
        self._in_flight += 1
        self._in_flight_bytes += length

    def forget_request(self, request: Request) -> None:
        """`request` is in flight no more, and gets no answer; its buffer goes back."""
        assert self._in_flight > 0
        self._in_flight -= 1
        self._in_flight_bytes -= request.bytes_held
        buffer, request.buffer = request.buffer, None
        if buffer is not None:
            self.pool.give(buffer)

    def finish_request(self, request: Request, error: NbdError) -> None:
        """The request is over: queue its reply, and let go of what it held."""
        if self._state is State.CLOSED:
            self.forget_request(request)
            self._closed_if_idle()
            return
        length, buffer, replies = request.length, request.buffer, self.replies
        self._in_flight -= 1
        if request.command in WITH_DATA:
            self._in_flight_bytes -= length
        if error:
            replies.add(SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, error, request.cookie))
        elif request.command == READ and buffer is not None:
            request.buffer = None
            replies.add_data(SIMPLE_REPLY_OK + request.cookie, buffer, length)
            buffer = None
        else:
            replies.add(SIMPLE_REPLY_OK + request.cookie)
        if buffer is not None:
            request.buffer = None
            self.pool.give(buffer)
        if not self._flush_deferred or len(replies.parts) >= EARLY_REPLY_PARTS:
            self.send_later()
        if self._paused:
            self.resume()
