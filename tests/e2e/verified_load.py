# SPDX-License-Identifier: Apache-2.0
"""Random load from several NBD clients at once, where every reply is judged.

Each client owns parts of the disk and knows what its reads must find (disk_model.py). It has many
requests in flight, under random cookies, and it holds the server to this:

- one reply to each cookie, and none to a cookie that isn't in flight;
- a read finds the last write that was answered before it was sent, or one that was in flight
  beside it; and once somebody has seen that trimmed bytes became zeroes, they stay zeroes;
- bad requests get their error, good ones none;
- a client that disconnects or closes its half gets all answers, then the stream ends; one that
  vanishes changes nothing any more.

All clients run in one thread, on a selector. Nothing here waits for a fixed time; a request
or a farewell without an answer for `STALL_S` ends the run with a list of what was in flight.
"""

from __future__ import annotations

import enum
import random
import selectors
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.e2e.disk_model import SECTOR_BYTES, DiskModel, Lot, Wrong
from tests.e2e.raw_nbd import (
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    FLAG_FUA,
    FLAG_NO_HOLE,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_OK,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    RawNbd,
)

KIB = 1 << 10
BLOCK_BYTES = 4096
STALL_S = 20.0
# How often requests are looked through for one that is too old.
LOOK_S = 2.0
RECEIVE_BYTES = 256 * KIB
BEYOND_ANY_DISK = 1 << 50
UNKNOWN_COMMAND = 99
UNKNOWN_FLAG = 1 << 13

WRITING = frozenset({CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES})
NAMES = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_WRITE_ZEROES: "write-zeroes",
    UNKNOWN_COMMAND: "unknown",
}


class Stalled(AssertionError):
    """A request, or a change of the graph, doesn't end."""


class Farewell(enum.Enum):
    """How a client leaves."""

    DISCONNECT = "by a disconnect request; what is in flight is answered"
    HALF_CLOSE = "by closing its half, perhaps inside a header; what is in flight is answered"
    VANISH = "inside a write, with reads in flight and replies unread"


@dataclass(slots=True)
class Pending:
    """A request that has been sent, at least in part."""

    kind: int
    offset: int
    length: int
    flags: int
    sent_at: float
    data: bytes = b""
    error: int = NBD_OK
    # Of a read: the model when it was sent, if writes to its bytes were in flight beside it.
    before: tuple[bytes, bytes] = (b"", b"")
    beside: list[Pending] = field(default_factory=list)

    def touches(self, other: Pending) -> bool:
        """Whether their bytes meet."""
        return self.offset < other.offset + other.length and other.offset < self.end

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.offset + self.length

    def __str__(self) -> str:
        age = time.monotonic() - self.sent_at
        return f"{NAMES[self.kind]} {self.offset}+{self.length} flags {self.flags}, {age:.1f} s old"


class VerifiedClient:
    """One connection after the other, to one export, always with requests in flight."""

    def __init__(
        self,
        name: str,
        socket_path: Path,
        export: str,
        *,
        model: DiskModel,
        lots: list[Lot],
        depth: int,
        rng: random.Random,
    ) -> None:
        self.name = name
        self.depth = depth
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.refused = 0
        self.connections = 0
        self.sock: socket.socket
        self.gone = True
        self._path = socket_path
        self._export = export
        self._model = model
        self._lots = lots
        self._rng = rng
        self._pending: dict[int, Pending] = {}
        self._outbox = bytearray()
        self._inbox = bytearray()
        self._leaving: Farewell | None = None
        self._leaving_since = 0.0
        self._half_closed = False

    # --- its connections ---

    def connect(self) -> None:
        """Negotiate, waiting for it; then begin."""
        self.sock = RawNbd.connected(self._path, self._export).sock
        self.sock.setblocking(False)
        if self._rng.random() < 0.5:
            size = self._rng.randint(4096, 65536)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        self.gone = self._half_closed = False
        self._leaving = None
        self.connections += 1

    def leave(self, farewell: Farewell = Farewell.DISCONNECT) -> None:
        """Begin no more, and go."""
        if self._leaving is not None:
            return
        self._leaving = farewell
        self._leaving_since = time.monotonic()
        if farewell is Farewell.DISCONNECT:
            self._outbox += struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0)
        elif farewell is Farewell.HALF_CLOSE:
            header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_WRITE, 0, 0, 1)
            self._outbox += header[: self._rng.choice([0, 0, 1, 27, 28])]

    def _vanish(self) -> None:
        """Hang up in the middle of everything but writes, of which nobody knows what they did."""
        for _ in range(self.depth):
            self._begin_read()
        lot = self._rng.choice(self._lots)
        header = (REQUEST_MAGIC, 0, CMD_WRITE, 0, lot.offset, lot.length)
        self._outbox += struct.pack(">IHHQQI", *header)
        self._outbox += self._model.noise(self._rng.randrange(lot.length), self._rng)
        try:
            self.sock.send(self._outbox)
        except BlockingIOError:
            pass
        self._pending.clear()
        self._outbox.clear()
        self._inbox.clear()
        self.close()

    def close(self) -> None:
        """Hang up."""
        if not self.gone:
            self.gone = True
            self.sock.close()

    @property
    def leaving(self) -> Farewell | None:
        """How it is about to go, if it is."""
        return None if self.gone else self._leaving

    @property
    def wants_to_send(self) -> bool:
        """Whether the kernel hasn't taken all of it yet."""
        return bool(self._outbox)

    def in_flight(self) -> list[str]:
        """What isn't answered yet, oldest first."""
        oldest_first = sorted(self._pending.values(), key=lambda pending: pending.sent_at)
        return [str(pending) for pending in oldest_first]

    def oldest_s(self, now: float) -> float:
        """The age of the oldest request, or of a farewell that the server hasn't answered."""
        since = [pending.sent_at for pending in self._pending.values()]
        if self.leaving is not None:
            since.append(self._leaving_since)
        return now - min(since, default=now)

    # --- sending ---

    def fill(self) -> None:
        """Begin requests, as many as may be in flight."""
        while self._leaving is None and len(self._pending) < self.depth:
            self._begin()

    def send(self) -> None:
        """Hand the kernel some of what there is to send, at times only a part of a header."""
        if self._leaving is Farewell.VANISH and not self._is_writing():
            self._vanish()
            return
        if self._outbox:
            limit = self._rng.choice([5, 28, 5000]) if self._rng.random() < 0.05 else 1 << 20
            try:
                sent = self.sock.send(memoryview(self._outbox)[:limit])
            except BlockingIOError:
                return
            del self._outbox[:sent]
        if self._leaving is Farewell.HALF_CLOSE and not self._outbox and not self._half_closed:
            self._half_closed = True
            self.sock.shutdown(socket.SHUT_WR)

    def _is_writing(self) -> bool:
        return any(pending.kind in WRITING for pending in self._pending.values())

    def _begin(self) -> None:
        rng, choice = self._rng, self._rng.random()
        if choice < 0.02:
            self._begin_bad()
        elif choice < 0.04:
            self._submit(self._new(CMD_FLUSH, 0, 0))
        elif choice < 0.1:
            self._begin_change(CMD_TRIM)
        elif choice < 0.15:
            self._begin_change(CMD_WRITE_ZEROES, flags=rng.choice([0, FLAG_NO_HOLE]))
        elif choice < 0.5:
            self._begin_change(CMD_WRITE)
        else:
            self._begin_read()

    def _begin_bad(self) -> None:
        pending = self._rng.choice(
            [
                self._new(CMD_READ, BEYOND_ANY_DISK, BLOCK_BYTES, error=NBD_EINVAL),
                self._new(CMD_WRITE, BEYOND_ANY_DISK, BLOCK_BYTES, error=NBD_ENOSPC),
                self._new(CMD_READ, 0, BLOCK_BYTES, flags=UNKNOWN_FLAG, error=NBD_EINVAL),
                self._new(UNKNOWN_COMMAND, 0, 0, error=NBD_EINVAL),
            ]
        )
        pending.data = bytes(pending.length) if pending.kind == CMD_WRITE else b""
        self._submit(pending)

    def _begin_read(self) -> None:
        pending = self._new(CMD_READ, *self._rng.choice(self._lots).some(self._rng))
        for other in self._pending.values():
            if other.kind in WRITING and other.touches(pending):
                pending.beside.append(other)
        if pending.beside:
            pending.before = self._model.state(pending.offset, pending.length)
        self._submit(pending)

    def _begin_change(self, kind: int, *, flags: int = 0) -> None:
        """Change bytes that no other change in flight touches; they'd have no order."""
        rng = self._rng
        pending = self._new(kind, *rng.choice(self._lots).some(rng), flags=flags)
        overlapping = [other for other in self._pending.values() if other.touches(pending)]
        if any(other.kind in WRITING for other in overlapping):
            return
        for other in overlapping:
            if other.kind == CMD_READ and not other.error:
                if not other.beside:
                    other.before = self._model.state(other.offset, other.length)
                other.beside.append(pending)
        if kind != CMD_TRIM and rng.random() < 0.05:
            pending.flags |= FLAG_FUA
        if kind == CMD_WRITE:
            pending.data = self._model.noise(pending.length, rng)
        self._model.note(pending.offset, pending.length, f"{self.name}: {pending} sent")
        self._submit(pending)

    def _new(
        self, kind: int, offset: int, length: int, *, flags: int = 0, error: int = NBD_OK
    ) -> Pending:
        return Pending(kind, offset, length, flags, time.monotonic(), error=error)

    def _submit(self, pending: Pending) -> None:
        cookie = self._rng.getrandbits(64)
        assert cookie not in self._pending, "the same 64 bits twice"
        self._pending[cookie] = pending
        self._outbox += struct.pack(
            ">IHHQQI",
            *(REQUEST_MAGIC, pending.flags, pending.kind, cookie),
            *(pending.offset, pending.length),
        )
        self._outbox += pending.data

    # --- receiving ---

    def receive(self) -> int:
        """Take what has arrived, and judge it. Returns how many requests were answered."""
        try:
            chunk = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return 0
        if not chunk:
            self._at_end_of_stream()
            return 0
        self._inbox += chunk
        answered, position, inbox = 0, 0, self._inbox
        while len(inbox) - position >= 16:
            magic, error, cookie = struct.unpack_from(">IIQ", inbox, position)
            pending = self._pending.get(cookie)
            if magic != SIMPLE_REPLY_MAGIC:
                raise Wrong(f"{self.name}: {magic:#x} where a reply must begin")
            if pending is None:
                raise Wrong(f"{self.name}: a reply to {cookie:#x}, which isn't in flight")
            payload = pending.length if pending.kind == CMD_READ and not error else 0
            if len(inbox) - position < 16 + payload:
                break
            data = bytes(memoryview(inbox)[position + 16 : position + 16 + payload])
            position += 16 + payload
            del self._pending[cookie]
            self._judge(pending, error, data)
            answered += 1
        del inbox[:position]
        return answered

    def _at_end_of_stream(self) -> None:
        if self._leaving is None or self._pending or self._inbox or self._outbox:
            raise Wrong(
                f"{self.name}: the server closed, with {self.in_flight()} unanswered, "
                f"{len(self._outbox)} bytes unsent and {len(self._inbox)} bytes of half a reply"
            )
        self.close()

    def _judge(self, pending: Pending, error: int, data: bytes) -> None:
        if error != pending.error:
            raise Wrong(f"{self.name}: {pending}: error {error} instead of {pending.error}")
        name = NAMES[pending.kind]
        self.counts[name] += 1
        if error:
            self.refused += 1
            return
        self.bytes[name] += pending.length
        offset, length = pending.offset, pending.length
        if pending.kind == CMD_READ:
            if pending.beside:
                self._judge_beside_writes(pending, data)
            else:
                self._model.check(offset, data)
        elif pending.kind == CMD_TRIM:
            self._model.trim(offset, length)
        elif pending.kind in WRITING:
            self._model.write(offset, pending.data or bytes(length))
        if pending.kind in WRITING:
            self._model.note(offset, length, f"{self.name}: {pending} answered")

    def _judge_beside_writes(self, pending: Pending, data: bytes) -> None:
        """Each byte is what it was, or what one of the writes beside it makes of it."""
        content, trimmed = pending.before
        cuts = {0, len(data), *range(0, len(data), SECTOR_BYTES)}
        for other in pending.beside:
            cuts.update((other.offset - pending.offset, other.end - pending.offset))
        edges = sorted(cut for cut in cuts if 0 <= cut <= len(data))
        for start, end in pairwise(edges):
            found = data[start:end]
            if found == content[start:end]:
                continue
            place = pending.offset + start
            may_be = [
                other.data[place - other.offset :][: len(found)] or bytes(len(found))
                for other in pending.beside
                if other.offset <= place < other.end
            ]
            if found in may_be:
                continue
            for at, byte in enumerate(found):
                is_trimmed = trimmed[start + at] and not byte
                known = byte == content[start + at] or any(one[at] == byte for one in may_be)
                if not is_trimmed and not known:
                    self._model.complain(pending.offset, data, start + at)


@dataclass(slots=True)
class LoadLimits:
    """How clients come and go."""

    # Of a client's turns, how many end with a farewell and a new connection.
    leave_share: float = 0.002
    # Of a client's turns, how many begin a pause in which it doesn't read its replies.
    pause_share: float = 0.01
    pause_turns_max: int = 20


class VerifiedLoad:
    """Runs clients until somebody says that it is enough; then has them leave in good order.

    `enough` is asked after every turn of the selector; `on_replies` is told how many came.
    `describe` says what else was under way when the load stalls. Context: one thread.
    """

    def __init__(
        self,
        clients: list[VerifiedClient],
        *,
        rng: random.Random,
        enough: Callable[[], bool],
        on_replies: Callable[[int], None] = lambda count: None,
        describe: Callable[[], str] = lambda: "",
        limits: LoadLimits | None = None,
    ) -> None:
        self._clients = clients
        self._rng = rng
        self._enough = enough
        self._on_replies = on_replies
        self._describe = describe
        self._limits = limits or LoadLimits()
        self._selector = selectors.DefaultSelector()
        self._events: dict[VerifiedClient, int] = {}
        self._paused: dict[VerifiedClient, int] = {}
        self._ending = False
        self._looked_at = time.monotonic()

    def run(self, wake: socket.socket) -> None:
        """`wake` becomes readable when `enough` should be asked again. Raises: Wrong, Stalled."""
        try:
            with self._selector:
                self._selector.register(wake, selectors.EVENT_READ, None)
                for client in self._clients:
                    client.connect()
                    self._turn(client)
                while self._events:
                    self._one_turn(wake)
        except BaseException as error:
            # Also when pytest-timeout interrupts: what was in flight is what one wants to know.
            report = self.report()
            print(report)
            error.add_note(report)
            raise
        finally:
            for client in self._clients:
                client.close()

    def report(self) -> str:
        """What is under way."""
        lines = [self._describe()]
        for client in self._clients:
            requests = client.in_flight()
            leaving = f", leaving {client.leaving.value}" if client.leaving else ""
            lines.append(
                f"{client.name}: {len(requests)} in flight{leaving}; {dict(client.counts)}"
            )
            lines += [f"    {request}" for request in requests[:5]]
        return "\n".join(lines)

    def _one_turn(self, wake: socket.socket) -> None:
        ready = self._selector.select(0 if self._paused else LOOK_S)
        for key, events in ready:
            client = key.data
            if client is None:
                wake.recv(1024)
                continue
            if events & selectors.EVENT_READ:
                answered = client.receive()
                if answered:
                    self._on_replies(answered)
            if not client.gone and events & selectors.EVENT_WRITE:
                client.send()
            self._turn(client)
        for client in [*self._paused]:
            self._paused[client] -= 1
            if self._paused[client] <= 0:
                del self._paused[client]
                self._turn(client)
        if not self._ending and self._enough():
            self._ending = True
            self._paused.clear()
            for client in self._clients:
                client.leave()
                self._turn(client)
        self._look_for_old_requests()

    def _turn(self, client: VerifiedClient) -> None:
        """Have it go on, and watch what it waits for."""
        if client.gone:
            if self._events.pop(client, 0):
                self._selector.unregister(client.sock)
            self._paused.pop(client, None)
            if self._ending:
                return
            client.connect()
        if not self._ending:
            choice = self._rng.random()
            if choice < self._limits.leave_share:
                client.leave(self._rng.choice([*Farewell]))
            elif choice < self._limits.leave_share + self._limits.pause_share:
                self._paused[client] = self._rng.randint(1, self._limits.pause_turns_max)
        client.fill()
        client.send()
        if client.gone:  # vanished
            self._turn(client)
            return
        events = 0 if client in self._paused else selectors.EVENT_READ
        if client.wants_to_send:
            events |= selectors.EVENT_WRITE
        self._watch(client, events)

    def _watch(self, client: VerifiedClient, events: int) -> None:
        known = self._events.get(client)
        if known == events:
            return
        if known:
            self._selector.unregister(client.sock)
        if events:
            self._selector.register(client.sock, events, client)
        self._events[client] = events

    def _look_for_old_requests(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        oldest = max(client.oldest_s(now) for client in self._clients)
        if oldest > STALL_S:
            raise Stalled(f"a request or a farewell has had no answer for {oldest:.0f} s")
