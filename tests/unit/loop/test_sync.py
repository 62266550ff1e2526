# SPDX-License-Identifier: Apache-2.0
"""Locks, queues and sleeps: fair, and whole after any cancellation."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from blockemu.loop import (
    AioContext,
    Cancelled,
    Event,
    Future,
    Mutex,
    Semaphore,
    Task,
    VirtualClock,
    WaitQueue,
    gather,
    sleep_ns,
    yield_now,
)


def poll(ctx: AioContext, rounds: int = 1) -> None:
    for _ in range(rounds):
        ctx.poll(blocking=False)


class Line:
    """Tasks that each do the same with one object, and a list of who got through."""

    def __init__(self, ctx: AioContext) -> None:
        self.ctx = ctx
        self.entered: list[int] = []

    def join(self, lock: Semaphore, index: int, leave: Future[None] | None = None) -> Task[None]:
        async def coroutine() -> None:
            async with lock:
                self.entered.append(index)
                if leave is not None:
                    await leave

        return self.ctx.spawn(coroutine())


def test_mutex_without_contention_never_suspends(ctx: AioContext) -> None:
    mutex = Mutex()
    assert Line(ctx).join(mutex, 1).done()
    assert not mutex.locked()


def test_mutex_lets_one_in_and_the_rest_in_their_order(ctx: AioContext) -> None:
    mutex, line = Mutex(), Line(ctx)
    leave: Future[None] = Future()
    line.join(mutex, 0, leave)
    for index in (1, 2, 3):
        line.join(mutex, index)
    assert mutex.locked()
    assert line.entered == [0]
    leave.set_result(None)
    poll(ctx)
    assert line.entered == [0, 1, 2, 3]
    assert not mutex.locked()


def test_mutex_newcomer_does_not_overtake_who_was_handed_it(ctx: AioContext) -> None:
    mutex, line = Mutex(), Line(ctx)
    line.join(mutex, 9)
    ctx.run(mutex.acquire())
    line.join(mutex, 1)
    mutex.release()
    assert mutex.locked()
    line.join(mutex, 2)
    poll(ctx)
    assert line.entered == [9, 1, 2]


def test_mutex_is_free_after_an_exception(ctx: AioContext) -> None:
    mutex = Mutex()

    async def broken() -> None:
        async with mutex:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        ctx.run(broken())
    assert not mutex.locked()


def test_mutex_waiter_that_is_cancelled_leaves_the_line(ctx: AioContext) -> None:
    mutex, line = Mutex(), Line(ctx)
    leave: Future[None] = Future()
    line.join(mutex, 0, leave)
    line.join(mutex, 1).cancel()
    line.join(mutex, 2)
    poll(ctx)
    leave.set_result(None)
    poll(ctx)
    assert line.entered == [0, 2]
    assert not mutex.locked()


def test_mutex_waiter_cancelled_when_it_was_handed_the_lock_hands_it_on(
    ctx: AioContext,
) -> None:
    mutex, line = Mutex(), Line(ctx)
    ctx.run(mutex.acquire())
    first = line.join(mutex, 1)
    line.join(mutex, 2)
    mutex.release()
    first.cancel()
    poll(ctx)
    assert first.cancelled()
    assert line.entered == [2]
    assert not mutex.locked()


def test_mutex_release_of_an_unlocked_one_is_refused() -> None:
    with pytest.raises(AssertionError, match="not locked"):
        Mutex().release()


def test_semaphore_lets_in_as_many_as_its_value(ctx: AioContext) -> None:
    semaphore, line = Semaphore(2), Line(ctx)
    leave: Future[None] = Future()
    for index in range(4):
        line.join(semaphore, index, leave)
    assert line.entered == [0, 1]
    assert semaphore.locked()
    leave.set_result(None)
    poll(ctx)
    assert line.entered == [0, 1, 2, 3]
    assert not semaphore.locked()


def test_semaphore_of_zero_waits_for_a_release(ctx: AioContext) -> None:
    semaphore = Semaphore(0)
    task = ctx.spawn(semaphore.acquire())
    assert not task.done()
    semaphore.release()
    poll(ctx)
    assert task.done()
    with pytest.raises(ValueError, match="-1"):
        Semaphore(-1)


def test_locks_survive_any_mix_of_entering_leaving_and_cancelling(
    ctx: AioContext, seed: int
) -> None:
    source = random.Random(seed)
    semaphore = Semaphore(2)
    inside = inside_max = 0

    async def visit() -> None:
        nonlocal inside, inside_max
        async with semaphore:
            inside += 1
            inside_max = max(inside_max, inside)
            try:
                for _ in range(source.randrange(3)):
                    await yield_now()
            finally:
                inside -= 1

    tasks: list[Task[None]] = []
    for _ in range(2000):
        if source.random() < 0.5:
            tasks.append(ctx.spawn(visit()))
        if tasks and source.random() < 0.3:
            source.choice(tasks).cancel()
        if source.random() < 0.6:
            poll(ctx)
    while not all(task.done() for task in tasks):
        poll(ctx)
    assert inside == 0
    assert inside_max == 2
    assert semaphore._value == 2
    assert not semaphore._waiters


def test_wait_queue_wakes_one_or_all_in_their_order(ctx: AioContext) -> None:
    queue, woken = WaitQueue(), list[int]()

    async def wait(index: int) -> None:
        await queue.wait()
        woken.append(index)

    assert not queue.wake_one()
    for index in range(4):
        ctx.spawn(wait(index))
    assert len(queue) == 4
    assert queue.wake_one()
    poll(ctx)
    assert woken == [0]
    queue.wake_all()
    ctx.spawn(wait(4))
    poll(ctx)
    assert woken == [0, 1, 2, 3]
    assert queue
    queue.wake_all()
    poll(ctx)
    assert not queue


@pytest.mark.parametrize("woken_first", [True, False])
def test_wait_queue_waiter_that_is_cancelled_does_not_swallow_a_wake_up(
    ctx: AioContext, *, woken_first: bool
) -> None:
    queue = WaitQueue()
    first, second = ctx.spawn(queue.wait()), ctx.spawn(queue.wait())
    steps: list[Callable[[], object]] = [queue.wake_one, first.cancel]
    for step in steps if woken_first else reversed(steps):
        step()
        if not woken_first:
            poll(ctx)
    poll(ctx)
    assert first.cancelled()
    assert second.done()
    assert not second.cancelled()


def test_event_wakes_everybody_and_stays_set(ctx: AioContext) -> None:
    event = Event()
    tasks = [ctx.spawn(event.wait()) for _ in range(3)]
    assert not event.is_set()
    event.set()
    event.clear()
    poll(ctx)
    assert all(task.done() for task in tasks)
    late = ctx.spawn(event.wait())
    assert not late.done()
    event.set()
    assert ctx.spawn(event.wait()).done()
    poll(ctx)
    assert late.done()


def test_event_waiter_that_is_cancelled_leaves_nothing_behind(ctx: AioContext) -> None:
    event = Event()
    waits, is_woken = ctx.spawn(event.wait()), ctx.spawn(event.wait())
    waits.cancel()
    poll(ctx)
    assert len(event._waiters) == 1
    event.set()
    is_woken.cancel()
    poll(ctx)
    assert waits.cancelled()
    assert is_woken.cancelled()


def test_sleep_takes_as_long_as_it_says(ctx: AioContext, clock: VirtualClock) -> None:
    clock.set_ns(5)

    async def nap() -> int:
        await sleep_ns(10**9)
        return clock.now_ns()

    assert ctx.run(nap()) == 10**9 + 5


def test_sleep_that_is_cancelled_disarms_its_timer(ctx: AioContext) -> None:
    task = ctx.spawn(sleep_ns(10**9))
    task.cancel()
    poll(ctx)
    assert task.cancelled()
    assert ctx._timeout_ns() is None


def test_yield_goes_on_in_the_next_round(ctx: AioContext) -> None:
    task = ctx.spawn(yield_now())
    assert not task.done()
    poll(ctx)
    assert task.done()

    async def many() -> None:
        for _ in range(3):
            await yield_now()

    task = ctx.spawn(many())
    poll(ctx, 2)
    assert not task.done()
    poll(ctx)
    assert task.done()


async def later(result: int, rounds: int) -> int:
    for _ in range(rounds):
        await yield_now()
    if result < 0:
        raise ValueError(str(result))
    return result


def test_gather_returns_results_in_the_order_of_its_arguments(ctx: AioContext) -> None:
    assert ctx.run(gather(later(1, 3), later(2, 0), later(3, 1))) == [1, 2, 3]
    assert ctx.run(gather()) == []


def test_gather_waits_for_all_before_it_raises_the_first_error(ctx: AioContext) -> None:
    ended: list[int] = []

    async def note(rounds: int) -> int:
        await later(1, rounds)
        ended.append(rounds)
        return rounds

    with pytest.raises(ValueError, match="-1"):
        ctx.run(gather(note(5), later(-1, 3), later(-2, 0), note(1)))
    assert ended == [1, 5]


def test_gather_that_is_cancelled_cancels_all_and_waits_for_them(ctx: AioContext) -> None:
    ended: list[str] = []

    async def slow_to_leave() -> None:
        try:
            await Future[None]()
        finally:
            try:
                await later(0, 3)
            finally:
                ended.append("slow")

    task = ctx.spawn(gather(slow_to_leave(), slow_to_leave()))
    task.cancel()
    poll(ctx, 2)
    assert not task.done()
    task.cancel()
    poll(ctx, 5)
    assert ended == ["slow", "slow"]
    with pytest.raises(Cancelled):
        task.result()
