# SPDX-License-Identifier: Apache-2.0
"""What coroutines wait for besides I/O: mutexes, wait queues, events, semaphores, sleeps, each
other.

All of them are for the tasks of one home thread. They take no lock of their own, since between two
`await`s nothing else runs there; tasks of another thread come over with `run_in_context`.

All are fair: first come, first served, and what is released goes straight to who waits longest, so
a newcomer can't overtake. All survive cancellation: a task that is cancelled in the moment in which
it is given something hands that on.

They wait on plain futures, hence the pattern that comes back below: on Cancelled, a future that is
done means "it was mine already", and one that isn't is taken out of the line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

from blockemu.loop.coroutine import Cancelled, Future, Task, settled
from blockemu.loop.current import running_context

T = TypeVar("T")


class Semaphore:
    """Lets `value` holders in at a time: `async with semaphore`, or `acquire` and `release`.

    Context: one home thread.
    """

    __slots__ = ("_value", "_waiters")

    def __init__(self, value: int) -> None:
        if value < 0:
            raise ValueError(f"a semaphore can't start at {value}")
        self._value = value
        self._waiters: deque[Future[None]] = deque()

    def locked(self) -> bool:
        """Whether the next `acquire` would wait."""
        return self._value == 0

    def try_acquire(self) -> bool:
        """Take one, if one is free: without the cost of a coroutine. Nobody is overtaken: where
        somebody waits, none is free."""
        if self._value:
            self._value -= 1
            return True
        return False

    async def acquire(self) -> None:
        """Take one. Suspends: until one is free, if none is."""
        if self._value:
            self._value -= 1
            return
        future: Future[None] = Future()
        self._waiters.append(future)
        try:
            await future
        except Cancelled:
            if future.done():
                self.release()
            else:
                self._waiters.remove(future)
            raise

    def release(self) -> None:
        """Give one back: to who waits longest, if somebody does."""
        if self._waiters:
            self._waiters.popleft().set_result(None)
        else:
            self._value += 1

    async def __aenter__(self) -> None:
        if self._value:
            self._value -= 1
        else:
            await self.acquire()

    async def __aexit__(self, *exc_info: object) -> None:
        self.release()


class Mutex(Semaphore):
    """One holder at a time: `async with mutex`. Not re-entrant.

    Context: one home thread.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(1)

    def release(self) -> None:
        """Unlock it, or hand it to who waits longest."""
        assert self._value == 0, "released a mutex that is not locked"
        super().release()


class WaitQueue:
    """A line of tasks that wait to be woken; QEMU's CoQueue.

    A wake-up is not remembered: it reaches who waits now. Whoever waits for a condition checks it
    again after `wait()`, in a loop.
    Context: one home thread.
    """

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: deque[Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._waiters)

    def __bool__(self) -> bool:
        return bool(self._waiters)

    async def wait(self) -> None:
        """Join the end of the line. Suspends: always, until it is woken."""
        future: Future[None] = Future()
        self._waiters.append(future)
        try:
            await future
        except Cancelled:
            if future.done():
                self.wake_one()
            else:
                self._waiters.remove(future)
            raise

    def wake_one(self) -> bool:
        """Wake who waits longest. False when nobody does."""
        if not self._waiters:
            return False
        self._waiters.popleft().set_result(None)
        return True

    def wake_all(self) -> None:
        """Wake all who wait now, in their order; not those who join while the woken run."""
        waiters, self._waiters = self._waiters, deque()
        for future in waiters:
            future.set_result(None)


class Event:
    """A flag that can be waited for. It wakes everybody, and stays set until it is cleared.

    Context: one home thread.
    """

    __slots__ = ("_set", "_waiters")

    def __init__(self) -> None:
        self._set = False
        self._waiters: deque[Future[None]] = deque()

    def is_set(self) -> bool:
        """Whether `wait()` would return at once."""
        return self._set

    def set(self) -> None:
        """Raise the flag. All who wait go on, even if it is cleared before they run."""
        self._set = True
        waiters, self._waiters = self._waiters, deque()
        for future in waiters:
            future.set_result(None)

    def clear(self) -> None:
        """Lower the flag."""
        self._set = False

    async def wait(self) -> None:
        """Suspends: until the flag is set, if it isn't."""
        if self._set:
            return
        future: Future[None] = Future()
        self._waiters.append(future)
        try:
            await future
        except Cancelled:
            if not future.done():
                self._waiters.remove(future)
            raise


async def sleep_ns(duration_ns: int) -> None:
    """Wait for `duration_ns` on the running context's clock; nothing is promised for 0 or less.

    Suspends: until then, at least to the next round.
    """
    ctx = running_context()
    future: Future[None] = Future()
    timer = ctx.new_timer(lambda: future.set_result(None))
    timer.arm(ctx.now_ns() + duration_ns)
    try:
        await future
    finally:
        timer.cancel()


async def yield_now() -> None:
    """Let everything else have a turn: go on in the context's next round.

    Suspends: always.
    """
    future: Future[None] = Future(shielded=True)
    running_context().schedule_oneshot(lambda: future.set_result(None))
    await future


async def gather(*coros: Coroutine[Any, Any, T]) -> list[T]:
    """Run all of `coros` as tasks of the running context, and return their results in order.

    It waits for all, also when one fails. If the caller is cancelled, they all are, and it still
    waits until they have ended.
    Suspends: until all are done, if one had to wait.
    Raises: the exception of the first in the order of arguments that failed.
    """
    ctx = running_context()
    tasks = [ctx.spawn(coro) for coro in coros]
    try:
        for task in tasks:
            if not task.done():
                await _done(task)
    except Cancelled:
        for task in tasks:
            task.cancel()
        await _all_settled(tasks)
        raise
    first_error: BaseException | None = None
    for task in tasks:
        error = task.exception()  # Asking marks it as read, so that no second one is reported.
        if first_error is None:
            first_error = error
    if first_error is not None:
        raise first_error
    return [task.result() for task in tasks]


async def _done(task: Task[Any]) -> None:
    """Wait for `task` without raising what it raises. Suspends: until it is done."""
    latch: Future[None] = Future()
    task.add_done_callback(lambda _: latch.set_result(None))
    await latch


async def _all_settled(tasks: list[Task[T]]) -> None:
    """Wait for all of `tasks`, come what may. Suspends: until all are done."""
    for task in tasks:
        while not task.done():
            try:
                await settled(task)
            except Cancelled:
                pass  # The caller raises Cancelled anyway.
        task.exception()
