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

How a connection ends is told in connection.py.

Many replies (reply_queue.py has the numbers) leave at once instead of at the end of the round: the
client takes them and sends its next requests while we go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockemu.nbd.commands import READ, WITH_DATA, data_bytes
from blockemu.nbd.connection import BaseConnection, State
from blockemu.nbd.intake import Intake
from blockemu.nbd.reply_queue import EARLY_REPLY_BYTES, EARLY_REPLY_PARTS, ReplyQueue
from blockemu.nbd.request import Request

if TYPE_CHECKING:
    import socket

    from blockemu.limits import Limits
    from blockemu.loop.bottom_half import BH
    from blockemu.loop.stream_socket import StreamSocket
    from blockemu.nbd.memory_budget import MemoryBudget
    from blockemu.nbd.reply_style import Failure
    from blockemu.nbd.session import Session


class Connection(BaseConnection):
    """A connection whose data Python moves."""

    __slots__ = (
        "_asking",
        "_blocked",
        "_continue_bh",
        "_entitled",
        "_flush_deferred",
        "_granted_bytes",
        "_in_flight",
        "_in_flight_bytes",
        "_now_ns",
        "_paused",
        "_reclaim",
        "_statistics",
        "intake",
        "replies",
    )

    # What `start` makes, because it belongs to the home thread.
    replies: ReplyQueue
    intake: Intake
    _continue_bh: BH
    _now_ns: Callable[[], int]

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        *,
        limits: Limits,
        on_closed: Callable[[], None],
        peer: str = "",
        memory: MemoryBudget | None = None,
    ) -> None:
        super().__init__(
            sock, session, limits=limits, on_closed=on_closed, peer=peer, memory=memory
        )
        # What requests' data may take of the bound, and whether more was asked for.
        self._granted_bytes = (
            limits.in_flight_bytes_max if memory is None else limits.memory_reserve_bytes
        )
        self._asking = False
        # A request waits for its turn to use what was granted last.
        self._entitled = False
        # Others need memory: what isn't in use goes back.
        self._reclaim = False
        self._in_flight = 0
        self._in_flight_bytes = 0
        # The kernel's buffer is full: replies wait for EPOLLOUT, and no requests are read.
        self._blocked = False
        # Requests have arrived that wait for a bound to fall, their turn, or a drained section.
        self._paused = False
        self._flush_deferred = False
        self._statistics = session.export.statistics

    # --- its part of the life cycle ---

    def _begin_to_serve(self) -> None:
        self._now_ns = self.ctx.clock_reader()
        self.replies = ReplyQueue(self._stream(), self.pool)
        self.intake = Intake(self, self._stream())
        self._continue_bh = self.ctx.new_bh(self.go_on, name="nbd-continue")
        self._set_interest()

    def _stream(self) -> StreamSocket:
        """What requests come from and replies go to."""
        return self._sock

    def _stop_reading(self) -> None:
        self.intake.forget()
        self._set_interest()

    def _owes(self) -> bool:
        return self._in_flight > 0 or bool(self.replies.parts)

    def _let_go(self) -> None:
        self.ctx.set_fd_handler(self._fd, external=True)
        self._continue_bh.delete()
        self.intake.release()
        self.replies.clear()

    def _is_idle(self) -> bool:
        return not self._in_flight

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

    def pause(self) -> None:
        """A drained section begins: `export.quiet` says so to those who look."""

    def resume(self) -> None:
        """A bound fell or a drained section ended: go on, if we had to stop, in the next round."""
        if self._paused and self._state is State.OPEN:
            self._continue_bh.schedule()

    def _pause(self, paused: bool) -> None:
        if paused != self._paused:
            self._paused = paused
            self._set_interest()

    def _set_interest(self) -> None:
        """Tell the loop what this connection waits for, while its socket is ours."""
        if self._state is State.OPEN or self._state is State.FINISHING:
            reading = self._state is State.OPEN and not self._paused
            self.ctx.set_fd_handler(
                self._fd,
                read=self._on_readable if reading else None,
                write=self.send if self._blocked else None,
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
        if self._reclaim:
            self._give_back()
        if blocked:
            self._watch_unread()
        else:
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
        if self._in_flight >= self.limits.in_flight_requests_max or self._entitled:
            return -1
        return self._usable_bytes() - self._in_flight_bytes - self.replies.bytes_held

    def slots(self) -> int:
        """How many more requests may be in flight."""
        return self.limits.in_flight_requests_max - self._in_flight

    def _usable_bytes(self) -> int:
        """What requests may use without asking: while others wait, each asks for its own."""
        if self._reclaim and not self._entitled:
            return self.limits.memory_reserve_bytes
        return self._granted_bytes

    def must_wait(self, command: int, length: int) -> bool:
        """Whether a request must wait: for others of this connection to end, which one alone never
        has to, or for memory that other connections have. One that is too long to be served takes
        none."""
        limits = self.limits
        if self._in_flight >= limits.in_flight_requests_max:
            return True
        held = self._in_flight_bytes + self.replies.bytes_held
        wanted = data_bytes(command, length, limits)
        if command in WITH_DATA and length > limits.request_length_max:
            return held > 0
        if not wanted or held + wanted <= self._usable_bytes():
            self._entitled = False
            return False
        if held and held + wanted > limits.in_flight_bytes_max:
            return True
        if self._memory is None:
            return held > 0
        if not self._asking:
            self._asking = True
            if self._reclaim:
                self._give_back()
            self._ask_for_memory(held + wanted)
        return True

    def allow(self, more_bytes: int) -> None:
        self._granted_bytes += more_bytes
        self._asking = False
        self._entitled = True
        self.resume()

    def _begin_to_give_back(self, *, wanted: bool) -> None:
        self._reclaim = wanted
        if wanted:
            self._give_back()

    def _give_back(self) -> None:
        held = self._in_flight_bytes + self.replies.bytes_held
        needed = max(held, self.limits.memory_reserve_bytes)
        spare = self._granted_bytes - needed
        if spare > 0 and not self._entitled:
            self._granted_bytes = needed
            self._tell_given_back(spare)

    def _half_sent(self) -> int:
        return self.intake.half_sent()

    def _sent_while_blocked(self) -> int:
        return self.replies.sent_bytes if self._blocked else -1

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

    def finish_plain(self, request: Request) -> None:
        """What finish_request comes to for a READ or WRITE that went well, a third shorter."""
        buffer = request.buffer
        if self._state is State.CLOSED or buffer is None:
            self.finish_request(request, None)
            return
        length, replies, style = request.length, self.replies, self.style
        self._in_flight -= 1
        self._in_flight_bytes -= length
        took_ns = self._now_ns() - request.started_ns
        request.buffer = None
        if request.command == READ:
            self._statistics.reads.count_one(length, took_ns)
            head = style.read_head(request.cookie, request.offset, length)
            replies.add_data(head, buffer, length)
        else:
            self._statistics.writes.count_one(length, took_ns)
            replies.add(style.success(request.cookie, request.offset))
            self.pool.give(buffer)
        if not self._flush_deferred or len(replies.parts) >= EARLY_REPLY_PARTS:
            self.send_later()
        if self._paused:
            self.resume()

    def finish_request(self, request: Request, failure: Failure | None) -> None:
        """The request is over: queue its reply, and let go of what it held."""
        if self._state is State.CLOSED:
            self.forget_request(request)
            self._closed_if_idle()
            return
        command, length = request.command, request.length
        self._in_flight -= 1
        self._in_flight_bytes -= request.bytes_held
        error = failure.error if failure is not None else 0
        self.count(command, length, error, self.ctx.now_ns() - request.started_ns)
        self._queue_reply(request, failure)
        buffer = request.buffer
        if buffer is not None:
            request.buffer = None
            self.pool.give(buffer)
        if not self._flush_deferred or len(self.replies.parts) >= EARLY_REPLY_PARTS:
            self.send_later()
        if self._paused:
            self.resume()

    def _queue_reply(self, request: Request, failure: Failure | None) -> None:
        """The reply joins the queue, and takes the buffer with it if that is part of it."""
        replies, style, buffer = self.replies, self.style, request.buffer
        cookie, offset = request.cookie, request.offset
        if failure is not None:
            replies.add(style.failure(cookie, offset, failure))
        elif request.answer is not None:
            replies.add_parts(request.answer, buffer)
            request.buffer = None
        elif request.command == READ:
            if buffer is None:
                replies.add(style.nothing_read(cookie, offset))
                return
            head = style.read_head(cookie, offset, request.length)
            replies.add_data(head, buffer, request.length)
            request.buffer = None
        elif request.command == READ:
            replies.add(style.nothing_read(cookie, offset))
        else:
            replies.add(style.success(cookie, offset))
