# SPDX-License-Identifier: Apache-2.0
"""BHs: once per schedule, first in first out, in the next round at the earliest, never lost."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from blockemu.loop import BH, AioContext, MemoryPoller, VirtualClock


def rounds(ctx: AioContext, count: int = 1) -> None:
    for _ in range(count):
        ctx.poll(blocking=False)


def test_bh_runs_once_per_schedule_not_per_call(ctx: AioContext) -> None:
    ran: list[int] = []
    bh = ctx.new_bh(lambda: ran.append(1))
    bh.schedule()
    bh.schedule()
    assert bh.scheduled
    rounds(ctx, 3)
    assert ran == [1]
    assert not bh.scheduled


def test_bhs_run_in_the_order_in_which_they_were_scheduled(ctx: AioContext) -> None:
    ran: list[str] = []
    bhs = {name: ctx.new_bh(partial(ran.append, name)) for name in "abc"}
    for name in "cab":
        bhs[name].schedule()
    ctx.schedule_oneshot(lambda: ran.append("oneshot"))
    bhs["c"].schedule()
    rounds(ctx)
    assert ran == ["c", "a", "b", "oneshot"]


def test_bh_scheduled_in_a_round_runs_in_the_next(ctx: AioContext) -> None:
    ran: list[str] = []
    second = ctx.new_bh(lambda: ran.append("second"))

    def first() -> None:
        ran.append("first")
        bh.schedule()
        second.schedule()

    bh = ctx.new_bh(first)
    bh.schedule()
    rounds(ctx)
    assert ran == ["first"]
    rounds(ctx)
    assert ran == ["first", "first", "second"]
    bh.delete()


def test_bh_scheduled_in_its_round_but_before_it_is_reached_runs_once(ctx: AioContext) -> None:
    ran: list[str] = []
    second = ctx.new_bh(lambda: ran.append("second"))
    ctx.schedule_oneshot(second.schedule)
    second.schedule()
    rounds(ctx, 2)
    assert ran == ["second"]


def test_cancelled_bh_does_not_run_until_scheduled_again(ctx: AioContext) -> None:
    ran: list[int] = []
    bh = ctx.new_bh(lambda: ran.append(1))
    bh.schedule()
    bh.cancel()
    rounds(ctx)
    assert ran == []
    bh.schedule()
    rounds(ctx)
    assert ran == [1]


def test_bh_cancelled_and_rescheduled_in_its_round_runs_once(ctx: AioContext) -> None:
    ran: list[int] = []
    bh = ctx.new_bh(lambda: ran.append(1))

    def toggle() -> None:
        bh.cancel()
        bh.schedule()

    ctx.schedule_oneshot(toggle)
    bh.schedule()
    rounds(ctx, 3)
    assert ran == [1]


def test_deleted_bh_never_runs(ctx: AioContext) -> None:
    bh = ctx.new_bh(lambda: pytest.fail("deleted"))
    bh.schedule()
    bh.delete()
    bh.delete()
    bh.schedule()
    bh.schedule_idle()
    assert not bh.scheduled
    rounds(ctx)


def test_bh_may_delete_itself_and_others_while_running(ctx: AioContext) -> None:
    ran: list[str] = []
    other = ctx.new_bh(lambda: ran.append("other"))

    def callback() -> None:
        ran.append("self")
        bh.schedule()
        bh.delete()
        other.delete()

    bh = ctx.new_bh(callback)
    bh.schedule()
    other.schedule()
    rounds(ctx, 2)
    assert ran == ["self"]


def test_poll_sleeps_at_most_10_ms_for_idle_bhs(ctx: AioContext, clock: VirtualClock) -> None:
    ran: list[int] = []
    bh = ctx.new_bh(lambda: ran.append(clock.now_ns()))
    bh.schedule_idle()
    ctx.poll(blocking=True)
    assert ran == [10_000_000]


def test_idle_bh_runs_in_a_round_that_happens_anyway(ctx: AioContext, clock: VirtualClock) -> None:
    ran: list[int] = []
    bh = ctx.new_bh(lambda: ran.append(clock.now_ns()))
    bh.schedule_idle()
    ctx.new_bh(lambda: None).schedule()
    ctx.poll(blocking=True)
    assert ran == [0]


@pytest.mark.parametrize("idle_first", [True, False])
def test_bh_scheduled_both_ways_runs_once_and_urgently(
    ctx: AioContext, clock: VirtualClock, *, idle_first: bool
) -> None:
    ran: list[int] = []
    bh = ctx.new_bh(lambda: ran.append(clock.now_ns()))
    for schedule in (bh.schedule_idle, bh.schedule)[:: 1 if idle_first else -1]:
        schedule()
    ctx.poll(blocking=True)
    rounds(ctx)
    assert ran == [0]


def test_cancelled_bh_does_not_keep_poll_from_sleeping(
    ctx: AioContext, clock: VirtualClock
) -> None:
    ctx.new_timer(lambda: None).arm(1000)
    bh = ctx.new_bh(lambda: None)
    bh.schedule()
    bh.cancel()
    ctx.poll(blocking=True)
    assert clock.now_ns() == 1000


def test_poll_reports_progress(ctx: AioContext) -> None:
    assert not ctx.poll(blocking=False)
    bh = ctx.new_bh(lambda: None)
    bh.schedule()
    assert ctx.poll(blocking=False)
    bh.schedule()
    bh.cancel()
    assert not ctx.poll(blocking=False)


def test_nested_poll_runs_the_outer_rounds_remaining_bhs_once(ctx: AioContext) -> None:
    ran: list[str] = []

    def outer() -> None:
        ran.append("outer")
        late.schedule()
        ctx.poll(blocking=True)
        ran.append("outer ends")

    def late_callback() -> None:
        ran.append("late")
        after.schedule()

    after = ctx.new_bh(lambda: ran.append("after"))
    late = ctx.new_bh(late_callback)
    ctx.schedule_oneshot(outer)
    ctx.schedule_oneshot(lambda: ran.append("sibling"))
    rounds(ctx)
    assert ran == ["outer", "sibling", "late", "outer ends"]
    rounds(ctx)
    assert ran[4:] == ["after"]


def test_schedules_from_many_threads_each_lead_to_a_later_run() -> None:
    """A run must follow each schedule; it may serve several."""
    ctx = AioContext("home")
    threads_count, schedules_count = 4, 2000
    written = [0] * threads_count
    seen = [0] * threads_count

    def callback(index: int) -> None:
        seen[index] = written[index]

    def schedule(index: int, bh: BH) -> None:
        for number in range(1, schedules_count + 1):
            written[index] = number
            bh.schedule()
        ctx.schedule_oneshot(lambda: ended.append(index))

    ended: list[int] = []
    threads = [
        threading.Thread(target=schedule, args=(index, ctx.new_bh(partial(callback, index))))
        for index in range(threads_count)
    ]
    for thread in threads:
        thread.start()
    while len(ended) < threads_count:
        ctx.poll(blocking=True)
    for thread in threads:
        thread.join()
    ctx.poll(blocking=False)
    assert seen == [schedules_count] * threads_count
    ctx.close()


def test_one_bh_scheduled_by_many_threads_is_never_lost() -> None:
    ctx = AioContext("home")
    count = 3000
    tickets: list[int] = []
    taken = 0
    bh = ctx.new_bh(lambda: None)

    def take() -> None:
        nonlocal taken
        while tickets:
            tickets.pop()
            taken += 1

    bh = ctx.new_bh(take)

    def give() -> None:
        for _ in range(count):
            tickets.append(1)
            bh.schedule()

    threads = [threading.Thread(target=give) for _ in range(3)]
    for thread in threads:
        thread.start()
    while taken < 3 * count:
        ctx.poll(blocking=True)  # A lost schedule would sleep here for ever: the time-out fails.
    for thread in threads:
        thread.join()
    ctx.close()


def test_notifier_is_not_set_while_nobody_sleeps(ctx: AioContext, poller: MemoryPoller) -> None:
    ctx.new_bh(lambda: None).schedule()
    ctx.schedule_oneshot(lambda: None)
    ctx.notify()
    assert not poller.is_ready(ctx._notifier.fd)
