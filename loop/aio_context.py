# SPDX-License-Identifier: Apache-2.0
"""AioContext: file descriptors, bottom halves, timers and coroutines of one thread.

It runs in one of two ways: its home thread calls `poll()` in a loop (an IOThread does), or it is
attached to a MainContext as the Source that it is. Either way a *round* is:

    wait in the poller -> BHs -> fd handlers -> timers -> woken coroutines -> deferred callbacks

A BH scheduled in a round runs in the next. Coroutines that are woken in a round, by anything in it,
run in it, to exhaustion up to a bound. Deferred callbacks come last, because they are where batches
leave: whatever this round queued goes out in one `io_submit` and one `sendmsg`. What they wake or
defer still belongs to the round, up to `SETTLE_PASSES_MAX` times.

The `notify_me` protocol
------------------------ Waking a sleeping thread is dear (tens of microseconds), so it happens only
when somebody sleeps. Who has work for the loop (a BH, a woken task) first puts it into a queue,
then looks at `_notify_me`, and if that is not zero, sets the notifier. The home thread does it the
other way round: before a sleep it first makes `_notify_me` non-zero, then looks at the queues
(computing the time-out), then sleeps.

Python's threads see each other's writes in one global order (the GIL makes every bytecode's effect
visible before another thread runs). Of the four steps, queue < look-at-flag and flag <
look-at-queues are fixed. If the queueing comes before the home thread's look, it sees the work, and
the time-out is 0. If it comes after, then the flag was set even earlier, and the scheduler's look
at the flag, which is later still, sees it and sets the notifier, which ends the sleep or prevents
it. There is no third case. tests/unit/loop/test_notify_me.py walks all interleavings.

Bit 0 of `_notify_me` belongs to the Source (set by `prepare`, cleared by `check` or `dispatch`);
each blocking `poll()` adds 2 for as long as it sleeps. Only the home thread writes it.

Callbacks that raise
-------------------- One broken callback must not stop everybody's I/O: an Exception from a BH, fd
handler, timer, deferred or done callback, or from a task that nobody awaits, goes to
`ctx.exception_handler(what, error)`, and the round goes on. By default it is logged with its
traceback. A handler may raise; then the exception leaves `poll()`, and what the round had left to
do is done by the next one. What isn't an Exception (KeyboardInterrupt, SystemExit) leaves `poll()`
always.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from blockemu.loop.bottom_half import BH, IDLE_POLL_NS, OneshotBH
from blockemu.loop.clock import Clock, ClockType, HostClock, MonotonicClock
from blockemu.loop.coroutine import Task
from blockemu.loop.current import running
from blockemu.loop.fd_handlers import FdHandlers
from blockemu.loop.native_poller import EVENTS_FD, NativePoller, default_poller
from blockemu.loop.poller import Poller, PollParams
from blockemu.loop.source import PRIORITY_DEFAULT, PollFD, Source
from blockemu.loop.timer import Timer, TimerList

if TYPE_CHECKING:
    from blockemu.loop.buffers import BufferPool
    from blockemu.loop.coroutine import _DoneCallback
    from blockemu.loop.linux_aio import LinuxAio
    from blockemu.loop.thread_pool import ThreadPool

T = TypeVar("T")

STEPS_MAX = 4096
"""Coroutine steps per round: tasks that keep waking each other leave the descriptors their turn."""

SETTLE_PASSES_MAX = 4
"""How often a round goes through woken coroutines and deferred callbacks."""

TURNS_NS = 1_000_000
"""Of a round, after which `is_late` asks for short turns. The native poll's POLL_SLOT_NS."""

_EPOLLIN = 1
_log = logging.getLogger(__name__)
_get_ident = threading.get_ident


def log_exception(what: str, error: Exception) -> None:
    """The default `exception_handler`: a traceback in the log, which without set-up is stderr."""
    _log.error("unhandled exception in %s", what, exc_info=error)


class AioContext(Source):
    """An event loop with one home thread. The module's text describes a round.

    Without arguments it runs on the machine's epoll and the monotonic clock. `native` says whether
    C waits in epoll and serves native handlers (native_poller.py), or Python does; None leaves it
    to BLOCKEMU_NATIVE. A poller that is handed in wins. A clock that is handed in is the only one:
    HOST time comes from it as well, so that a simulation has no second source of time.

    Context: any thread may make one; the first thread that polls it, or calls `adopt()`, becomes
    its home. `new_bh`, `schedule_oneshot`, `spawn_threadsafe`, `notify`, `is_home` and the
    properties without laziness: any thread. Everything else: home thread, asserted.
    """

    def __init__(
        self,
        name: str = "main",
        *,
        clock: Clock | None = None,
        poller: Poller | None = None,
        native: bool | None = None,
        priority: int = PRIORITY_DEFAULT,
    ) -> None:
        super().__init__(name=name, priority=priority)
        self.exception_handler: Callable[[str, Exception], None] = log_exception
        self.closed = False
        self._clock: Clock = MonotonicClock() if clock is None else clock
        self._host_clock: Clock = HostClock() if clock is None else clock
        self._poller: Poller = default_poller(native=native) if poller is None else poller
        self._native = self._poller if isinstance(self._poller, NativePoller) else None
        self._wait = self._poller.wait
        self._home: int | None = None
        self._round = 0
        self._turns_round = -1
        self._turns_began_ns = 0
        self._fds = FdHandlers(self._poller)
        self._bh_queue: deque[BH | OneshotBH] = deque()
        self._bh_popped = 0
        self._timer_lists: dict[ClockType, TimerList] = {}
        self._woken: deque[Task[Any] | _DoneCallback] = deque()
        self._deferred: deque[Callable[[], None]] = deque()
        self._deferred_popped = 0
        self._task: Task[Any] | None = None
        self._tasks: set[Task[Any]] = set()
        self._notify_me = 0
        self._notifier = self._poller.new_notifier()
        self._fds.set(self._notifier.fd, self._notified, None, external=False, round_=0)
        if self._native is not None:
            read = self._native.dispatch_events
            self._fds.set(EVENTS_FD, read, None, external=False, round_=0)
        self._thread_pool: ThreadPool | None = None
        self._linux_aio: LinuxAio | None = None
        self._linux_aio_tried = False
        self._buffers: BufferPool | None = None
        self._poll_fd: PollFD | None = None
        if self._poller.fileno() >= 0:
            self._poll_fd = PollFD(self._poller.fileno(), _EPOLLIN)
            self.add_poll(self._poll_fd)

    def __repr__(self) -> str:
        return f"<AioContext {self.name}>"

    # Whose thread it is

    @staticmethod
    def current() -> AioContext | None:
        """The context that is running in this thread: whose callback or coroutine called this.

        Context: any thread.
        """
        return running.ctx

    def adopt(self) -> None:
        """Make the calling thread the home. No other thread may be inside `poll()`."""
        self._home = _get_ident()

    def is_home(self) -> bool:
        """Whether the calling thread is the home, or there is none yet.

        Context: any thread.
        """
        return running.ctx is self or self._home is None or self._home == _get_ident()

    def assert_home(self) -> None:
        """Stop whoever calls from the wrong thread."""
        if running.ctx is not self:
            assert self._home is None or self._home == _get_ident(), (
                f"{self!r} belongs to another thread than {threading.current_thread().name!r}"
            )

    def _enter(self) -> AioContext | None:
        """Become the running context; the caller puts back what this returns."""
        if self._home is None:
            self.adopt()
        self.assert_home()
        assert not self.closed, f"{self!r} is closed"
        previous = running.ctx
        running.ctx = self
        return previous

    # Work from any thread

    def new_bh(self, callback: Callable[[], None], *, name: str = "") -> BH:
        """A BH that runs `callback` here when it is scheduled. Context: any thread."""
        return BH(self, callback, name)

    def schedule_oneshot(self, callback: Callable[[], None]) -> None:
        """Run `callback` once, in the next round. Context: any thread."""
        self._bh_queue.append(OneshotBH(callback))
        if self._notify_me:
            self._notifier.set()

    def notify(self) -> None:
        """End a sleep that is under way, for work that was put somewhere the loop looks.

        Context: any thread.
        """
        if self._notify_me:
            self._notifier.set()

    def _notified(self) -> None:
        self._notifier.test_and_clear()

    # Descriptors

    def set_fd_handler(
        self,
        fd: int,
        *,
        read: Callable[[], None] | None = None,
        write: Callable[[], None] | None = None,
        external: bool = False,
    ) -> None:
        """Call `read` whenever `fd` is readable, `write` whenever it is writable.

        Replaces what was set for `fd`; with both None it is watched no longer, which must happen
        before it is closed. Errors and hang-ups call both, whose next system call tells what it is.
        A handler may be called although a nested poll has done its work: descriptors are
        non-blocking. External handlers (those of sockets whose peers could go on sending requests)
        stay silent while `disable_external()` is in force.

        Context: home thread.
        """
        self.assert_home()
        self._fds.set(fd, read, write, external=external, round_=self._round)

    def disable_external(self) -> None:
        """Silence external handlers, until `enable_external` was called as often as this."""
        self.assert_home()
        self._fds.disable_external()

    def enable_external(self) -> None:
        """Undo one `disable_external`."""
        self.assert_home()
        self._fds.enable_external()

    @property
    def external_disabled(self) -> bool:
        """Whether external handlers are silent."""
        return self._fds.external_disable_count > 0

    # Time

    def now_ns(self, clock: ClockType = ClockType.REALTIME) -> int:
        """What `clock` says. Context: any thread."""
        return (self._host_clock if clock is ClockType.HOST else self._clock).now_ns()

    def is_late(self, now_ns: int) -> bool:
        """Whether others have had so much time in this round that who comes now should take a short
        turn, and leave the rest to the next round. To be asked at the beginning of each turn."""
        if self._turns_round != self._round:
            self._turns_round, self._turns_began_ns = self._round, now_ns
            return False
        return now_ns - self._turns_began_ns > TURNS_NS

    def clock_reader(self) -> Callable[[], int]:
        """What `now_ns()` calls: for a hot path, which saves a frame. Context: any thread."""
        return self._clock.now_ns

    def new_timer(
        self, callback: Callable[[], None], *, clock: ClockType = ClockType.REALTIME
    ) -> Timer:
        """A timer on `clock` that runs `callback` here when it is due; not armed yet."""
        self.assert_home()
        timers = self._timer_lists.get(clock)
        if timers is None:
            timers = TimerList(self._host_clock if clock is ClockType.HOST else self._clock)
            self._timer_lists[clock] = timers
        return Timer(self, timers, callback)

    # Coroutines

    def spawn(self, coro: Coroutine[Any, Any, T], *, name: str = "") -> Task[T]:
        """Run `coro` here and now, up to where it first has to wait.

        Context: home thread.
        """
        task = Task(self, coro, name)
        if running.ctx is self:
            task._step()
            return task
        previous = self._enter()
        try:
            task._step()
        finally:
            running.ctx = previous
        return task

    def spawn_threadsafe(self, factory: Callable[[], Coroutine[Any, Any, T]]) -> Task[T]:
        """Have the home thread call `factory` in its next round, and run the coroutine it returns.

        Context: any thread.
        """
        task: Task[T] = Task(self, None)
        task._factory = factory
        self.schedule_oneshot(task._start)
        return task

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Spawn `coro`, poll until it is done, and return what it returns.

        For start-up, the command line and tests; code inside the loop awaits.
        Raises: what it raises.
        """
        task = self.spawn(coro)
        while not task._done:
            self.poll(blocking=True)
        return task.result()

    def defer(self, callback: Callable[[], None]) -> None:
        """Run `callback` once when this round has done everything else, or at the next round's end.

        First in, first out. Deferring one callable twice runs it twice.
        Context: home thread.
        """
        self._deferred.append(callback)
        if self._notify_me:
            self._notifier.set()  # Another source's prepare() called, after ours.

    def report_later(self, what: str, error: Exception) -> None:
        """Hand `error` to the exception handler in the next round, or log it after `close()`.

        Context: any thread.
        """
        if self.closed:
            log_exception(what, error)
        else:
            self.schedule_oneshot(lambda: self.exception_handler(what, error))

    # The loop

    def poll(self, *, blocking: bool) -> bool:
        """Run one round. With `blocking`, sleep first until there is something to do.

        True when a callback ran or a coroutine was stepped; a blocking call may return False as
        well. Correct when called from inside a round (a round of its own runs), though code that
        can should `await`.
        Context: home thread. Raises: what an exception handler raises, KeyboardInterrupt and its
        like.
        """
        if running.ctx is self:
            return self._poll(blocking)
        previous = self._enter()
        try:
            return self._poll(blocking)
        finally:
            running.ctx = previous

    def run_until(self, stop: Callable[[], bool]) -> None:
        """Run rounds, sleeping in between, until `stop()` is true after one: an IOThread's life.

        Cheaper than calling `poll` in a loop.
        Context: home thread. Raises: as `poll`.
        """
        previous = self._enter()
        try:
            while not stop():
                self._poll(blocking=True)
        finally:
            running.ctx = previous

    def _poll(self, blocking: bool) -> bool:
        if not blocking:
            return self._run_round(self._wait(0))
        self._notify_me += 2
        try:
            events = self._wait(self._timeout_ns())
        finally:
            self._notify_me -= 2
        return self._run_round(events)

    def _timeout_ns(self) -> int | None:
        """How long a sleep may last; None for any time."""
        if self._woken or self._deferred:
            return 0
        timeout_ns: int | None = None
        if self._bh_queue:
            # list() of a deque is one step to other threads; walking the deque itself is not.
            for bh in list(self._bh_queue):
                if bh._urgent:
                    return 0
                if bh._idle:
                    timeout_ns = IDLE_POLL_NS
        for timers in self._timer_lists.values():
            deadline_ns = timers.deadline_ns()
            if deadline_ns is not None:
                left_ns = deadline_ns - timers.clock.now_ns()
                if left_ns <= 0:
                    return 0
                if timeout_ns is None or left_ns < timeout_ns:
                    timeout_ns = left_ns
        return timeout_ns

    def _run_round(self, events: list[tuple[int, int]]) -> bool:
        """Everything after the wait. Context: home thread, running."""
        self._round = round_ = self._round + 1
        progress = False
        if self._bh_queue:
            progress = self._run_bhs()
        if events and self._fds.dispatch(events, round_, self.exception_handler):
            progress = True
        for timers in self._timer_lists.values():
            if timers.run(self.exception_handler):
                progress = True
        if self._woken or self._deferred:
            self._settle()
            progress = True
        return progress

    def _run_bhs(self) -> bool:
        queue = self._bh_queue
        # A nested poll takes from the same queue; counting what was ever taken tells us how far
        # ours has got with it.
        last = self._bh_popped + len(queue)
        progress = False
        while self._bh_popped < last:
            self._bh_popped += 1
            callback = queue.popleft()._take()
            if callback is not None:
                progress = True
                try:
                    callback()
                except Exception as error:
                    self.exception_handler(f"bottom half {callback!r}", error)
        return progress

    def _settle(self) -> None:
        woken = self._woken
        steps_left = STEPS_MAX
        for _ in range(SETTLE_PASSES_MAX):
            while woken and steps_left:
                steps_left -= 1
                woken.popleft()._step()
            if self._deferred:
                self._run_deferred()
            if not woken and not self._deferred:
                break

    def _run_deferred(self) -> None:
        deferred = self._deferred
        last = self._deferred_popped + len(deferred)
        while self._deferred_popped < last:
            self._deferred_popped += 1
            callback = deferred.popleft()
            try:
                callback()
            except Exception as error:
                self.exception_handler(f"deferred callback {callback!r}", error)

    # As a Source of a MainContext

    def prepare(self) -> tuple[bool, int | None]:
        self._notify_me |= 1
        timeout_ns = 0 if self._poller.has_work() else self._timeout_ns()
        if timeout_ns != 0 and self._poll_fd is None and self._wait(0):
            timeout_ns = 0  # No descriptor stands for this poller, so it must be asked.
        return timeout_ns == 0, timeout_ns

    def check(self) -> bool:
        self._notify_me &= ~1
        if self._woken or self._deferred or self._poller.has_work():
            return True
        if any(bh._urgent or bh._idle for bh in list(self._bh_queue)):
            return True
        if self._poll_fd is None:
            if self._wait(0):
                return True
        elif self._poll_fd.revents:
            return True
        return self._timeout_ns() == 0

    def dispatch(self) -> bool:
        self._notify_me &= ~1
        self.poll(blocking=False)
        return True

    # Parts that come with it

    @property
    def native(self) -> NativePoller | None:
        """The poller that serves native handlers, if it is one that does. Context: any thread."""
        return self._native

    def set_poll_params(self, params: PollParams) -> None:
        """Has native waits look for work before they sleep. Begins without.

        Python's poller doesn't: spinning with the GIL would keep others from working.
        Context: home thread.
        """
        self.assert_home()
        if self._native is not None:
            self._native.set_poll_params(params)

    @property
    def thread_pool(self) -> ThreadPool:
        """Worker threads for calls that block. Started when first used."""
        if self._thread_pool is None:
            from blockemu.loop.thread_pool import ThreadPool

            self._thread_pool = ThreadPool(self)
        return self._thread_pool

    @property
    def linux_aio(self) -> LinuxAio | None:
        """Linux AIO for this context; None where the kernel refuses to set it up."""
        if not self._linux_aio_tried:
            from blockemu.loop.linux_aio import LinuxAio

            self._linux_aio_tried = True
            try:
                self._linux_aio = LinuxAio(self)
            except OSError as error:
                _log.info("%s: no Linux AIO: %s", self.name, error)
        return self._linux_aio

    @property
    def buffers(self) -> BufferPool:
        """Aligned buffers for this context's I/O."""
        if self._buffers is None:
            from blockemu.loop.buffers import BufferPool

            self._buffers = BufferPool()
        return self._buffers

    def close(self) -> None:
        """Give back what it holds: threads (joined), descriptors. Its coroutines should be done.

        Those that still wait never resume; they are closed, which runs their `finally` blocks.
        Context: home thread, outside of `poll()`. Twice is fine.
        """
        if self.closed:
            return
        self.assert_home()
        assert running.ctx is not self, f"{self!r} can't be closed from inside its own round"
        self.destroy()
        if self._linux_aio is not None:
            self._linux_aio.close()
        if self._thread_pool is not None:
            self._thread_pool.close()
        for task in list(self._tasks):
            task.abandon()
        self.closed = True
        self._notify_me = 0
        self._fds.set(self._notifier.fd, None, None, external=False, round_=self._round)
        self._notifier.close()
        self._poller.close()
        if self._buffers is not None:
            close = getattr(self._buffers, "close", None)
            if close is not None:
                close()
