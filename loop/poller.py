# SPDX-License-Identifier: Apache-2.0
"""Pollers: what an AioContext sleeps in.

A poller knows which descriptors somebody is interested in, and waits until one is ready or the time
is up. It is a seam: `EpollPoller` is the machine's, `MemoryPoller` is for tests and simulation,
where descriptors are mere numbers that a test declares ready, and sleeping means moving a
`VirtualClock`. `NativePoller` (native_poller.py) is epoll again, with handlers of its own in C.

All are level-triggered: a descriptor is reported by every `wait` for as long as it is ready. That
is what makes the loop's shortcuts safe: whoever skips an event sees it again in the next round.

A poller also makes the notifier that other threads wake it with, since an eventfd wakes nobody who
does not sleep in the kernel.
"""

from __future__ import annotations

import errno
import select
import threading
from dataclasses import dataclass
from typing import Protocol

from blockemu.loop.clock import VirtualClock
from blockemu.loop.event_notifier import EventNotifier

EVENTS_MAX = 256
"""Events taken per wait: bounds a round's work; what doesn't fit is reported by the next one."""

TIMEOUT_NS_MAX = 3600 * 10**9
"""The longest single sleep. epoll counts milliseconds in a C int; waking once an hour is
harmless."""

INTEREST_MASK = select.EPOLLIN | select.EPOLLOUT
"""What one can ask for. EPOLLERR and EPOLLHUP are reported unasked, as epoll does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PollParams:
    """How long a wait looks for work before it sleeps (adaptive polling), as QEMU's `poll-max-ns`,
    `poll-grow` and `poll-shrink`.

    The time grows from 0 by the factor `grow` (0: 2) up to `max_ns` as long as work comes within
    that, and is divided by `shrink` (0: begins anew) when it takes longer. `max_ns` 0: don't look.
    While Linux AIO is under way, the bound is ten times `max_ns`, and adapts by itself.
    """

    max_ns: int = 0
    grow: int = 0
    shrink: int = 0

    def __post_init__(self) -> None:
        assert min(self.max_ns, self.grow, self.shrink) >= 0, self


class Notifier(Protocol):
    """What `Poller.new_notifier` makes; EventNotifier's interface."""

    fd: int

    def set(self) -> None:
        """Wake the poller. Context: any thread."""

    def test_and_clear(self) -> bool:
        """True when it was set. Context: the polling thread."""

    def close(self) -> None:
        """Context: the polling thread."""


class Poller(Protocol):
    """Waits for descriptors. Context: everything in one thread at a time."""

    def set_interest(self, fd: int, events: int) -> None:
        """Ask for EPOLLIN and/or EPOLLOUT of `fd`, instead of what was asked before; 0 removes it.

        A descriptor must be removed before it is closed.
        Raises: OSError when the descriptor can't be polled.
        """

    def wait(self, timeout_ns: int | None) -> list[tuple[int, int]]:
        """The ready descriptors with their events, once there is one or the time is up.

        None waits for as long as it takes. Never returns early for a positive time-out without an
        event, but may return late: epoll's grain is a millisecond, rounded up.
        """

    def has_work(self) -> bool:
        """Whether `wait` would find something to do that no descriptor stands for: then don't sleep
        in anything else."""

    def set_external_silent(self, silent: bool) -> None:
        """Have the poller's own handlers, those that aren't in FdHandlers, read no new requests."""

    def fileno(self) -> int:
        """A descriptor that polls readable when `wait(0)` would return something, or -1."""

    def new_notifier(self) -> Notifier:
        """A notifier that wakes this poller, once its `fd` is among the interests."""

    def close(self) -> None:
        """Give up the poller's own descriptor. Closing twice is fine."""


class EpollPoller:
    """Linux epoll. An epoll descriptor polls readable itself, so a poller can stand in another
    one."""

    __slots__ = ("_epoll", "_interest", "_poll")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._interest: dict[int, int] = {}

    def set_interest(self, fd: int, events: int) -> None:
        known = self._interest.get(fd, 0)
        if events == known:
            return
        assert events & ~INTEREST_MASK == 0, f"odd events {events:#x} for fd {fd}"
        if events == 0:
            del self._interest[fd]
            self._remove(fd)
            return
        if known:
            self._modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._interest[fd] = events

    def _remove(self, fd: int) -> None:
        try:
            self._epoll.unregister(fd)
        except OSError as error:
            # Closed before it was removed: the kernel has forgotten it already.
            if error.errno not in (errno.EBADF, errno.ENOENT):
                raise

    def _modify(self, fd: int, events: int) -> None:
        try:
            self._epoll.modify(fd, events)
        except FileNotFoundError:
            self._epoll.register(fd, events)  # Closed behind our back, and opened anew.

    def wait(self, timeout_ns: int | None) -> list[tuple[int, int]]:
        if timeout_ns is None:
            return self._poll(-1, EVENTS_MAX)
        if timeout_ns <= 0:
            return self._poll(0, EVENTS_MAX)
        timeout_ns = min(timeout_ns, TIMEOUT_NS_MAX)
        return self._poll(timeout_ns * 1e-9, EVENTS_MAX)

    def has_work(self) -> bool:
        return False

    def set_external_silent(self, silent: bool) -> None:
        pass

    def fileno(self) -> int:
        return self._epoll.fileno()

    def new_notifier(self) -> Notifier:
        return EventNotifier()

    def close(self) -> None:
        self._epoll.close()
        self._interest.clear()


class SleepsForeverError(RuntimeError):
    """A MemoryPoller was asked to wait without a time-out, and nothing in memory can wake it."""


class MemoryNotifier:
    """EventNotifier's twin for a MemoryPoller. Its `fd` is a negative number: no real
    descriptor."""

    __slots__ = ("_poller", "fd")

    def __init__(self, poller: MemoryPoller, fd: int) -> None:
        self._poller = poller
        self.fd = fd

    def set(self) -> None:
        self._poller.ready(self.fd, select.EPOLLIN)

    def test_and_clear(self) -> bool:
        was_set = self._poller.is_ready(self.fd)
        self._poller.ready(self.fd, 0)
        return was_set

    def close(self) -> None:
        self._poller.ready(self.fd, 0)


class MemoryPoller:
    """Descriptors are numbers, readiness is what a test says, sleeping moves `clock`.

    `ready(fd, events)` sets a descriptor's level, which stays until it is set anew. With
    `threads_wait_s` a wait without a time-out really waits that long for another thread to set
    something; without, and after it, it raises SleepsForeverError: in a simulation that is a
    deadlock.
    """

    def __init__(self, clock: VirtualClock, *, threads_wait_s: float = 0.0) -> None:
        self.clock = clock
        self.wait_count = 0
        self._threads_wait_s = threads_wait_s
        self._interest: dict[int, int] = {}
        self._levels: dict[int, int] = {}
        self._changed = threading.Condition()
        self._notifier_fd_last = -1

    def ready(self, fd: int, events: int) -> None:
        """Declare `fd` ready for `events` (and nothing else); 0 for not ready.

        Context: any thread.
        """
        with self._changed:
            if events:
                self._levels[fd] = events
            else:
                self._levels.pop(fd, None)
            self._changed.notify_all()

    def is_ready(self, fd: int) -> bool:
        """Whether `ready` has been said of `fd`, wanted or not."""
        return fd in self._levels

    def interest(self, fd: int) -> int:
        """What was asked for of `fd`; 0 when nothing. For tests to look at."""
        return self._interest.get(fd, 0)

    def set_interest(self, fd: int, events: int) -> None:
        assert events & ~INTEREST_MASK == 0, f"odd events {events:#x} for fd {fd}"
        if events:
            self._interest[fd] = events
        else:
            self._interest.pop(fd, None)

    def wait(self, timeout_ns: int | None) -> list[tuple[int, int]]:
        self.wait_count += 1
        with self._changed:
            found = self._ready_now()
            if found or timeout_ns == 0:
                return found
            if timeout_ns is not None:
                self.clock.advance_ns(timeout_ns)
                return self._ready_now()
            if self._threads_wait_s > 0:
                self._changed.wait_for(self._ready_now, self._threads_wait_s)
                found = self._ready_now()
            if not found:
                raise SleepsForeverError("nothing is ready, no timer is armed: it would never wake")
            return found

    def _ready_now(self) -> list[tuple[int, int]]:
        found = []
        for fd, level in self._levels.items():
            wanted = self._interest.get(fd, 0)
            if wanted:
                events = level & (wanted | select.EPOLLERR | select.EPOLLHUP)
                if events:
                    found.append((fd, events))
        return found[:EVENTS_MAX]

    def has_work(self) -> bool:
        return False

    def set_external_silent(self, silent: bool) -> None:
        pass

    def fileno(self) -> int:
        return -1

    def new_notifier(self) -> Notifier:
        # -1 means "no descriptor" to others.
        self._notifier_fd_last -= 1
        return MemoryNotifier(self, self._notifier_fd_last)

    def close(self) -> None:
        self._interest.clear()
