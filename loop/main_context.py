# SPDX-License-Identifier: Apache-2.0
"""MainContext and MainLoop: several sources in one thread, after glib's GMainContext and GMainLoop.

An iteration has four phases, each a method, so that a foreign loop can drive a context:

    prepare() -> query() -> poll -> check() -> dispatch()

The rules are glib's, because those who know it will expect them:

- Sources are looked at in the order of their priority, lower numbers first, and of their attachment
  within one. Once a source is ready, those of a greater number are left alone in this iteration:
  neither prepared, nor polled, nor checked, nor dispatched. Those of the same number take part.
- A source that has been found ready stays so until it is dispatched, even if that happens in a
  later iteration; meanwhile it is neither prepared nor checked again.
- `check()` gives up if the descriptors have changed since `query()` (another thread attached
  something): what poll found may belong to descriptors of another meaning. The next iteration
  follows at once.
- A source is blocked while it is dispatched, unless it `can_recurse`: a nested iteration doesn't
  see it.
- A nested iteration drops what the outer one was still to dispatch. Nothing is lost, since those
  sources are still ready; the nested one dispatches them, and the outer one then ends.
- One thread at a time owns a context. `iteration` and `MainLoop.run` acquire it themselves.

Where C would return an error, this raises. An exception from a source's method leaves the
iteration; sources that are still ready are dispatched by the next one.

The walk over sources must survive that sources come and go in the middle of it, as anything may
happen in a callback. Each source has a key (priority, sequence); the walk asks for the first key
after the one it has just seen, so no change to the list can make it skip or repeat a source.
"""

from __future__ import annotations

import bisect
import itertools
import select
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from blockemu.loop.clock import Clock, MonotonicClock, VirtualClock
from blockemu.loop.event_notifier import EventNotifier
from blockemu.loop.source import UNASKED_EVENTS, PollFD

if TYPE_CHECKING:
    from blockemu.loop.source import Source

PRIORITY_LOWEST = 2**31 - 1
"""The number that `prepare()` starts from: no source is less urgent."""

WAKE_UP_PRIORITY = 0
"""The wake-up descriptor is polled as a source of this priority would be, as in glib."""

TIMEOUT_MS_MAX = 2**31 - 1
"""poll(2) takes a C int."""

PollFunction = Callable[[list[PollFD], int | None], None]
"""Waits for events on descriptors, fills in their `revents`. The time-out is in ns, None for
none."""


def poll_descriptors(poll_fds: list[PollFD], timeout_ns: int | None) -> None:
    """The usual PollFunction: poll(2). Rounds the time-out up to its milliseconds."""
    poller = select.poll()
    by_fd = {}
    for poll_fd in poll_fds:
        poll_fd.revents = 0
        by_fd[poll_fd.fd] = poll_fd
        poller.register(poll_fd.fd, poll_fd.events)
    timeout_ms = None if timeout_ns is None else min(-(-timeout_ns // 1_000_000), TIMEOUT_MS_MAX)
    for fd, revents in poller.poll(timeout_ms):
        by_fd[fd].revents = revents


def virtual_poll(clock: VirtualClock) -> PollFunction:
    """A PollFunction for tests and simulation: real descriptors, but sleeping only moves `clock`.

    Without a time-out, and with nothing ready, it waits for real: another thread must wake it.
    """

    def poll(poll_fds: list[PollFD], timeout_ns: int | None) -> None:
        poll_descriptors(poll_fds, None if timeout_ns is None else 0)
        if timeout_ns and not any(poll_fd.revents for poll_fd in poll_fds):
            clock.advance_ns(timeout_ns)

    return poll


class MainContext:
    """A set of sources, iterated by the one thread that owns it at the time.

    Context: `acquire` and what stands below it needs ownership; `wakeup` and everything about
    sources (attach, destroy) may be called in any thread.
    """

    def __init__(self, *, clock: Clock | None = None, poll: PollFunction | None = None) -> None:
        self._clock: Clock = MonotonicClock() if clock is None else clock
        self._poll: PollFunction = poll_descriptors if poll is None else poll
        self._lock = threading.RLock()
        self._released = threading.Condition(self._lock)
        self._owner: int | None = None
        self._owner_depth = 0
        self._sources: list[Source] = []
        self._sequence = itertools.count(1)
        self._pending: list[Source] = []
        self._in_prepare_or_check = 0
        self._timeout_ns: int | None = None
        self._time_ns = 0
        self._time_is_fresh = False
        self._polls_changed = False
        self._wake_up = EventNotifier()

    # Ownership

    def acquire(self) -> bool:
        """Try to become the owner. An owner may acquire it again, and releases it as often."""
        me = threading.get_ident()
        with self._lock:
            if self._owner is None:
                self._owner = me
            elif self._owner != me:
                return False
            self._owner_depth += 1
            return True

    def release(self) -> None:
        """Undo one `acquire`."""
        with self._lock:
            assert self._owner == threading.get_ident(), "this thread doesn't own the main context"
            self._owner_depth -= 1
            if self._owner_depth == 0:
                self._owner = None
                self._released.notify()

    def is_owner(self) -> bool:
        """Whether the calling thread owns it."""
        return self._owner == threading.get_ident()

    def acquire_blocking(self, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait until this thread is the owner; False when `give_up()` became true instead."""
        with self._lock:
            while not self.acquire():
                if give_up():
                    return False
                self._released.wait()
            return True

    def wakeup(self) -> None:
        """End the poll that the owner is in, or the next one.

        Context: any thread.
        """
        self._wake_up.set()

    def wakeup_if_foreign(self) -> None:
        """`wakeup`, if another thread owns the context: it may be polling with old knowledge."""
        owner = self._owner
        if owner is not None and owner != threading.get_ident():
            self._wake_up.set()

    def wake_waiters(self) -> None:
        """Have those who wait for ownership look whether they should give up."""
        with self._lock:
            self._released.notify_all()

    # Sources, by way of Source's methods

    def add_source(self, source: Source) -> int:
        """See `Source.attach`."""
        with self._lock:
            assert source.context is None, f"source {source.name!r} is attached already"
            assert not source.is_destroyed, f"source {source.name!r} is destroyed"
            source.context = self
            source_id = self._insert(source)
            self._note_polls_of(source)
        self.wakeup_if_foreign()
        return source_id

    def remove_source(self, source: Source) -> None:
        """See `Source.destroy`."""
        with self._lock:
            if source.is_destroyed:
                return
            source.is_destroyed = True
            self._sources.remove(source)
            if not source.is_blocked:
                self._note_polls_of(source)
        self.wakeup_if_foreign()
        if not source.is_dispatching:
            source.finalize()

    def reorder_source(self, source: Source, priority: int) -> None:
        """See `Source.set_priority`."""
        with self._lock:
            if source.is_destroyed:
                return
            self._sources.remove(source)
            source.priority = priority
            self._insert(source)
            self._note_polls_of(source)
        self.wakeup_if_foreign()

    def polls_changed(self) -> None:
        """A source's descriptors have changed: an iteration under way must start anew."""
        self._polls_changed = True
        self.wakeup_if_foreign()

    def _insert(self, source: Source) -> int:
        source.sequence = next(self._sequence)
        bisect.insort(self._sources, source, key=_key)
        return source.sequence

    def _note_polls_of(self, source: Source) -> None:
        if source.poll_fds or source.unix_fds:
            self._polls_changed = True

    def _walk(self) -> Iterator[Source]:
        """The sources that may run now, in order, whatever happens to the list meanwhile."""
        key = (-PRIORITY_LOWEST - 2, 0)
        while True:
            with self._lock:
                index = bisect.bisect_right(self._sources, key, key=_key)
                if index == len(self._sources):
                    return
                source = self._sources[index]
            key = _key(source)
            if not source.is_blocked:
                yield source
                if not source.is_destroyed:
                    key = _key(source)

    # The phases

    def now_ns(self) -> int:
        """The time, read once per phase, that ready times are compared with."""
        if not self._time_is_fresh:
            self._time_ns = self._clock.now_ns()
            self._time_is_fresh = True
        return self._time_ns

    def prepare(self) -> tuple[bool, int]:
        """(whether a source is ready, the priority up to which sources take part)."""
        self._assert_owner()
        self._assert_outside_callbacks()
        # A nested iteration: what the outer one still had to dispatch is found ready again below.
        self._pending.clear()
        self._time_is_fresh = False
        self._timeout_ns = None
        found_ready = False
        max_priority = PRIORITY_LOWEST
        for source in self._walk():
            if found_ready and source.priority > max_priority:
                break
            timeout_ns = None
            if not source.is_ready:
                source.is_ready, timeout_ns = self._prepare_source(source)
            if source.is_ready:
                found_ready = True
                max_priority = source.priority
                timeout_ns = 0
            if timeout_ns is not None and (
                self._timeout_ns is None or timeout_ns < self._timeout_ns
            ):
                self._timeout_ns = timeout_ns
        return found_ready, max_priority

    def _prepare_source(self, source: Source) -> tuple[bool, int | None]:
        self._in_prepare_or_check += 1
        try:
            ready, timeout_ns = source.prepare()
        finally:
            self._in_prepare_or_check -= 1
        if not ready and source.ready_time_ns is not None:
            left_ns = source.ready_time_ns - self.now_ns()
            if left_ns <= 0:
                return True, 0
            if timeout_ns is None or left_ns < timeout_ns:
                timeout_ns = left_ns
        return ready, timeout_ns

    def query(self, max_priority: int) -> tuple[int | None, list[PollFD]]:
        """(for how long to poll, what to poll): one PollFD for each descriptor, in their order."""
        self._assert_owner()
        events: dict[int, int] = {}
        with self._lock:
            self._polls_changed = False
            if max_priority >= WAKE_UP_PRIORITY:
                events[self._wake_up.fd] = select.POLLIN
            for source in self._sources:
                if source.priority > max_priority:
                    break
                if not source.is_blocked:
                    for poll_fd in itertools.chain(source.poll_fds, source.unix_fds):
                        wanted = poll_fd.events & ~UNASKED_EVENTS
                        events[poll_fd.fd] = events.get(poll_fd.fd, 0) | wanted
        if self._timeout_ns != 0:
            self._time_is_fresh = False
        return self._timeout_ns, [PollFD(fd, events[fd]) for fd in sorted(events)]

    def check(self, max_priority: int, poll_fds: list[PollFD]) -> bool:
        """Whether there is something to dispatch, now that `poll_fds` have been polled."""
        self._assert_owner()
        self._assert_outside_callbacks()
        revents = {poll_fd.fd: poll_fd.revents for poll_fd in poll_fds}
        if revents.get(self._wake_up.fd):
            self._wake_up.test_and_clear()
        if self._polls_changed:
            return False
        self._hand_out(revents, max_priority)
        self._pending.clear()
        for source in self._walk():
            if self._pending and source.priority > max_priority:
                break
            if not source.is_ready:
                source.is_ready = self._check_source(source)
            if source.is_ready:
                self._pending.append(source)
                max_priority = source.priority
        return bool(self._pending)

    def _hand_out(self, revents: dict[int, int], max_priority: int) -> None:
        with self._lock:
            for source in self._sources:
                if source.priority > max_priority:
                    break
                if not source.is_blocked:
                    for poll_fd in itertools.chain(source.poll_fds, source.unix_fds):
                        wanted = poll_fd.events | UNASKED_EVENTS
                        poll_fd.revents = revents.get(poll_fd.fd, 0) & wanted

    def _check_source(self, source: Source) -> bool:
        self._in_prepare_or_check += 1
        try:
            ready = source.check()
        finally:
            self._in_prepare_or_check -= 1
        if ready or any(poll_fd.revents for poll_fd in source.unix_fds):
            return True
        return source.ready_time_ns is not None and source.ready_time_ns <= self.now_ns()

    def dispatch(self) -> None:
        """Dispatch what `check()` has found."""
        self._assert_owner()
        pending = self._pending
        index = 0
        # A nested iteration empties the list, which ends this walk.
        while index < len(pending):
            source = pending[index]
            index += 1
            source.is_ready = False
            if not source.is_destroyed:
                self._dispatch_source(source)
        pending.clear()

    def _dispatch_source(self, source: Source) -> None:
        was_dispatching = source.is_dispatching
        source.is_dispatching = True
        if not source.can_recurse:
            self._set_blocked(source, blocked=True)
        try:
            keep = source.dispatch()
        finally:
            source.is_dispatching = was_dispatching
            self._set_blocked(source, blocked=False)
            if source.is_destroyed and not was_dispatching:
                source.finalize()
        if not keep:
            source.destroy()

    def _set_blocked(self, source: Source, *, blocked: bool) -> None:
        with self._lock:
            if source.is_blocked != blocked:
                source.is_blocked = blocked
                if not source.is_destroyed:
                    self._note_polls_of(source)

    def iteration(self, *, may_block: bool) -> bool:
        """One iteration; True when something was dispatched.

        If another thread owns the context, wait for it, or return False when that isn't wanted.
        """
        if may_block:
            self.acquire_blocking()
        elif not self.acquire():
            return False
        try:
            _, max_priority = self.prepare()
            timeout_ns, poll_fds = self.query(max_priority)
            self._poll(poll_fds, timeout_ns if may_block else 0)
            some_ready = self.check(max_priority, poll_fds)
            self.dispatch()
            return some_ready
        finally:
            self.release()

    def pending(self) -> bool:
        """Whether an iteration would dispatch something, without doing it."""
        if not self.acquire():
            return False
        try:
            _, max_priority = self.prepare()
            _, poll_fds = self.query(max_priority)
            self._poll(poll_fds, 0)
            return self.check(max_priority, poll_fds)
        finally:
            self.release()

    def close(self) -> None:
        """Destroy all sources and give back the wake-up descriptor. Nobody may own it."""
        assert self._owner is None, "the main context is in use"
        for source in list(self._sources):
            source.destroy()
        self._wake_up.close()

    def _assert_owner(self) -> None:
        assert self._owner == threading.get_ident(), "this thread doesn't own the main context"

    def _assert_outside_callbacks(self) -> None:
        assert not self._in_prepare_or_check, "iterated from inside a source's prepare() or check()"


def _key(source: Source) -> tuple[int, int]:
    return (source.priority, source.sequence)


class MainLoop:
    """Iterates a MainContext until told to quit. Several may run on one context, nested."""

    def __init__(self, context: MainContext) -> None:
        self.context = context
        self._is_running = False

    def is_running(self) -> bool:
        """Whether `run()` is under way. Context: any thread."""
        return self._is_running

    def run(self) -> None:
        """Iterate until `quit()`. A quit that came before the run doesn't count, as in glib."""
        self._is_running = True
        if not self.context.acquire_blocking(lambda: not self._is_running):
            return
        try:
            while self._is_running:
                self.context.iteration(may_block=True)
        finally:
            self._is_running = False
            self.context.release()

    def quit(self) -> None:
        """Have `run()` return after the iteration that it is in.

        Context: any thread, or a source's dispatch.
        """
        self._is_running = False
        self.context.wake_waiters()
        self.context.wakeup()
