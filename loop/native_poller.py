# SPDX-License-Identifier: Apache-2.0
"""NativePoller: the machine's epoll, with C handlers that are served without Python.

`wait` is one call into C (native/poll.h says what happens there) with the GIL released. It comes
back for Python's work only: a descriptor that Python watches, the time, or an *event* that a native
handler posted: (token, what, value), where the token says whose it is.

Events are handed out in a round's turn of the fd handlers, as those of one more descriptor,
`EVENTS_FD`, which is a number that no file has. So the rules of fd_handlers.py hold for them: a
nested poll may take over, a callback that raises is reported and the rest comes in the next round.
They are kept here from the moment that C reports them until their callback has been called.

Alternative not taken: a Python callback from C (cffi's extern "Python"). It takes the GIL once per
event in the middle of a pass, and lets Python change what C is walking over.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from blockemu.loop._poll import ffi, lib
from blockemu.loop.clock import MonotonicClock
from blockemu.loop.event_notifier import EventNotifier
from blockemu.loop.poller import (
    EVENTS_MAX,
    INTEREST_MASK,
    TIMEOUT_NS_MAX,
    EpollPoller,
    Notifier,
    Poller,
    PollParams,
)

AIO_DEPTH: Final = 256
"""Requests in the kernel at once; linux_aio.py's DEPTH says why."""

EVENTS_FD: Final = -2
"""Stands for the native handlers' events among descriptors. -1 is "no descriptor" to others."""

_EPOLLIN: Final = select.EPOLLIN
_READY: Final = struct.Struct("@iI")
_EVENT: Final = struct.Struct("@QQQ")
_READY_BYTES: Final = _READY.size
assert ffi.sizeof("struct poll_ready") == _READY_BYTES
assert ffi.sizeof("struct poll_event") == _EVENT.size
# Fields of C structures cost ten times as much as items of a view.
_READY_COUNT: Final = ffi.offsetof("struct native_poll", "ready_count") // 4
_EVENT_COUNT: Final = ffi.offsetof("struct native_poll", "event_count") // 4
_COUNTERS: Final = ("sleeps", "passes", "spins_hit", "spins_missed")
_now_ns = MonotonicClock.now_ns


def default_poller(*, native: bool | None = None) -> Poller:
    """The machine's poller. None leaves the choice to BLOCKEMU_NATIVE: "0" is EpollPoller."""
    if native is None:
        native = os.environ.get("BLOCKEMU_NATIVE") != "0"
    return NativePoller() if native else EpollPoller()


class NativePoller:
    """A Poller over a `struct native_poll`, which native handlers find by `address`.

    `handle` is the structure, for calls into this module's own library. Context: as Poller.
    """

    def __init__(self) -> None:
        """Raises: OSError."""
        holder = ffi.new("struct native_poll **")
        _check(lib.native_poll_open(holder), "native poll")
        self.handle: Any = holder[0]
        self.address = int(ffi.cast("uintptr_t", self.handle))
        self._epoll_fd: int = self.handle.epoll_fd
        self._wait = lib.native_poll_wait
        head_bytes = (max(_READY_COUNT, _EVENT_COUNT) + 1) * 4
        self._head = memoryview(ffi.buffer(self.handle, head_bytes)).cast("B").cast("I")
        self._ready = memoryview(ffi.buffer(self.handle.ready, EVENTS_MAX * _READY_BYTES))
        self._interest: dict[int, int] = {}
        self._callbacks: dict[int, Callable[[int, int], None]] = {}
        self._tokens = itertools.count(1)
        self._events: deque[tuple[int, int, int]] = deque()
        self._closed = False

    # As a Poller

    def set_interest(self, fd: int, events: int) -> None:
        if fd == EVENTS_FD:
            return  # always of interest
        known = self._interest.get(fd, 0)
        if events == known:
            return
        assert events & ~INTEREST_MASK == 0, f"odd events {events:#x} for fd {fd}"
        if events == 0:
            del self._interest[fd]
        _check(lib.native_poll_watch(self._open(), fd, known, events), f"epoll_ctl of fd {fd}")
        if events:
            self._interest[fd] = events

    def wait(self, timeout_ns: int | None) -> list[tuple[int, int]]:
        deadline_ns = None
        if timeout_ns is None:
            left_ns = -1
        elif timeout_ns > 0:
            left_ns = min(timeout_ns, TIMEOUT_NS_MAX)
            deadline_ns = _now_ns() + left_ns
        else:
            left_ns = 0
        if self._events:
            left_ns = 0
        while (count := self._wait(self.handle, left_ns)) < 0:
            # A signal, whose Python handler has run by now: the rest of the time is left (PEP 475).
            if count != -errno.EINTR:
                _check(count, "epoll_wait")
            if deadline_ns is not None:
                left_ns = max(deadline_ns - _now_ns(), 0)
        return self._take() if count or self._events else []

    def _take(self) -> list[tuple[int, int]]:
        """What the wait has left in C's arrays."""
        head = self._head
        found: list[Any] = list(
            _READY.iter_unpack(self._ready[: head[_READY_COUNT] * _READY_BYTES])
        )
        count = head[_EVENT_COUNT]
        if count:
            events = _EVENT.iter_unpack(ffi.buffer(self.handle.events, count * _EVENT.size))
            extend = self._events.extend
            # A KeyboardInterrupt comes before these two or behind them: nothing is lost or doubled.
            head[_EVENT_COUNT] = 0
            extend(events)
        if self._events:
            found.append((EVENTS_FD, _EPOLLIN))
        return found

    def has_work(self) -> bool:
        return bool(self._events) or lib.native_poll_has_work(self._open()) != 0

    def set_external_silent(self, silent: bool) -> None:
        lib.native_poll_silence(self._open(), int(silent))

    def fileno(self) -> int:
        if self._closed:
            raise ValueError("I/O operation on a closed poller")
        return self._epoll_fd

    def new_notifier(self) -> Notifier:
        return EventNotifier()

    def close(self) -> None:
        """Native handlers have left, and no AIO is in flight."""
        if self._closed:
            return
        assert self.handle.handler_count == 0, "native poll closed with handlers in it"
        self._closed = True
        self._head.release()
        self._ready.release()
        lib.native_poll_close(self.handle)
        self.handle = ffi.NULL
        self._wait = _wait_closed
        self._interest.clear()
        self._callbacks.clear()
        self._events.clear()

    def _open(self) -> Any:
        assert not self._closed, "the native poll is closed"
        return self.handle

    # For native handlers

    def add_native(self, callback: Callable[[int, int], None]) -> int:
        """A token for a native handler: `callback(what, value)` gets the events posted with it.

        Raises: OSError, where there is no memory.
        """
        _check(lib.native_poll_add_token(self._open()), "native poll")
        token = next(self._tokens)
        self._callbacks[token] = callback
        return token

    def remove_native(self, token: int) -> None:
        """Events of `token` go nowhere from now on."""
        del self._callbacks[token]
        if not self._closed:
            lib.native_poll_remove_token(self.handle)

    def dispatch_events(self) -> None:
        """Hands out events: the read handler of EVENTS_FD. Raises: what a callback raises."""
        events = self._events
        while events:
            token, what, value = events.popleft()
            callback = self._callbacks.get(token)
            if callback is not None:
                callback(what, value)

    def enable_aio(self) -> bool:
        """Has Linux AIO ready for native handlers; False where the kernel has none to give."""
        poll = self._open()
        return bool(poll.aio) or lib.native_poll_open_aio(poll, AIO_DEPTH) == 0

    def set_poll_params(self, params: PollParams) -> None:
        """Look for work that long before sleeping, beginning anew."""
        poll = self._open()
        poll.poll_ns = poll.poll_io_ns = 0
        poll.poll_max_ns = params.max_ns
        poll.poll_grow = params.grow
        poll.poll_shrink = params.shrink

    def counters(self) -> dict[str, int]:
        """How often it slept, made a pass, and looked for work with and without success."""
        poll = self._open()
        return {name: getattr(poll, name) for name in _COUNTERS}


def _check(error: int, what: str) -> None:
    if error < 0:
        raise OSError(-error, f"{what}: {os.strerror(-error)}")


def _wait_closed(poll: object, timeout_ns: int) -> int:
    raise ValueError("I/O operation on a closed poller")
