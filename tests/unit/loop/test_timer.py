# SPDX-License-Identifier: Apache-2.0
"""Timers: order, re-arming, and rounds that can't be held up. Time is the test's."""

from __future__ import annotations

import random
from functools import partial

import pytest

from blockemu.loop import AioContext, ClockType, VirtualClock
from blockemu.loop.timer import LITTER_MIN


def test_timer_is_not_armed_when_made(ctx: AioContext) -> None:
    assert not ctx.new_timer(lambda: None).armed


def test_poll_sleeps_until_the_nearest_timer_and_runs_it(
    ctx: AioContext, clock: VirtualClock
) -> None:
    ran: list[tuple[str, int]] = []
    ctx.new_timer(lambda: ran.append(("late", clock.now_ns()))).arm(10**9)
    ctx.new_timer(lambda: ran.append(("early", clock.now_ns()))).arm(500)
    assert ctx.poll(blocking=True)
    assert ctx.poll(blocking=True)
    assert ran == [("early", 500), ("late", 10**9)]


def test_timer_does_not_run_before_its_time(ctx: AioContext, clock: VirtualClock) -> None:
    timer = ctx.new_timer(lambda: pytest.fail("too early"))
    timer.arm(100)
    clock.set_ns(99)
    assert not ctx.poll(blocking=False)
    assert timer.armed
    timer.cancel()


def test_timers_of_one_deadline_run_in_the_order_of_arming(ctx: AioContext) -> None:
    ran: list[str] = []
    timers = {name: ctx.new_timer(partial(ran.append, name)) for name in "abc"}
    for name in "bcab":
        timers[name].arm(5)
    ctx.poll(blocking=True)
    assert ran == ["c", "a", "b"]


def test_timers_that_are_all_overdue_run_by_deadline(ctx: AioContext, clock: VirtualClock) -> None:
    ran: list[int] = []
    for deadline in (30, 10, 20):
        ctx.new_timer(partial(ran.append, deadline)).arm(deadline)
    clock.set_ns(1000)
    ctx.poll(blocking=False)
    assert ran == [10, 20, 30]


def test_arming_again_replaces_the_deadline(ctx: AioContext, clock: VirtualClock) -> None:
    ran: list[int] = []
    timer = ctx.new_timer(lambda: ran.append(clock.now_ns()))
    timer.arm(10)
    timer.arm(20)
    ctx.poll(blocking=True)
    assert ran == [20]
    timer.arm(90)
    timer.arm(30)
    ctx.poll(blocking=True)
    assert ran == [20, 30]


def test_cancelled_timer_neither_runs_nor_shortens_a_sleep(
    ctx: AioContext, clock: VirtualClock
) -> None:
    timer = ctx.new_timer(lambda: pytest.fail("cancelled"))
    timer.arm(10)
    ctx.new_timer(lambda: None).arm(70)
    timer.cancel()
    timer.cancel()
    ctx.poll(blocking=True)
    assert clock.now_ns() == 70


def test_timer_cancelled_by_an_earlier_one_of_its_round_does_not_run(
    ctx: AioContext, clock: VirtualClock
) -> None:
    second = ctx.new_timer(lambda: pytest.fail("cancelled"))
    ctx.new_timer(second.cancel).arm(10)
    second.arm(10)
    clock.set_ns(10)
    ctx.poll(blocking=False)
    assert not second.armed


def test_timer_armed_in_a_round_for_the_past_runs_in_the_next(ctx: AioContext) -> None:
    ran: list[int] = []

    def callback() -> None:
        ran.append(len(ran))
        timer.arm(0)

    timer = ctx.new_timer(callback)
    timer.arm(0)
    ctx.poll(blocking=True)
    assert ran == [0]
    ctx.poll(blocking=True)
    assert ran == [0, 1]
    timer.cancel()


def test_nested_poll_runs_timers_of_the_outer_round_and_parked_ones(
    ctx: AioContext, clock: VirtualClock
) -> None:
    ran: list[str] = []

    def rearm_early() -> None:
        ran.append("first")
        parked.arm(0)

    def nest() -> None:
        ran.append("nest")
        ctx.poll(blocking=True)
        ran.append("nest ends")

    parked = ctx.new_timer(lambda: ran.append("parked"))
    for callback in (rearm_early, nest, lambda: ran.append("third")):
        ctx.new_timer(callback).arm(10)
    clock.set_ns(10)
    ctx.poll(blocking=False)
    assert ran == ["first", "nest", "parked", "third", "nest ends"]


def test_armed_is_false_inside_the_callback(ctx: AioContext) -> None:
    seen: list[bool] = []
    timer = ctx.new_timer(lambda: seen.append(timer.armed))
    timer.arm(1)
    ctx.poll(blocking=True)
    assert seen == [False]


@pytest.mark.parametrize("kind", list(ClockType))
def test_timer_runs_on_each_clock(ctx: AioContext, clock: VirtualClock, kind: ClockType) -> None:
    ran: list[int] = []
    ctx.new_timer(lambda: ran.append(clock.now_ns()), clock=kind).arm(33)
    ctx.poll(blocking=True)
    assert ran == [33]


def test_rearming_for_ever_keeps_the_heap_small(ctx: AioContext, clock: VirtualClock) -> None:
    timers = [ctx.new_timer(lambda: None) for _ in range(10)]
    for number in range(10_000):
        timers[number % 10].arm(10**9 + number)
    (timer_list,) = ctx._timer_lists.values()
    assert len(timer_list._heap) <= 10 + 2 * LITTER_MIN


def test_random_arming_and_cancelling_matches_a_plain_model(
    ctx: AioContext, clock: VirtualClock, seed: int
) -> None:
    random_source = random.Random(seed)
    ran: list[int] = []
    timers = [ctx.new_timer(partial(ran.append, index)) for index in range(30)]
    model: dict[int, tuple[int, int]] = {}
    for step in range(3000):
        index = random_source.randrange(30)
        choice = random_source.random()
        if choice < 0.5:
            deadline = clock.now_ns() + random_source.randrange(1, 50)
            timers[index].arm(deadline)
            model[index] = (deadline, step)
        elif choice < 0.8:
            timers[index].cancel()
            model.pop(index, None)
        else:
            clock.advance_ns(random_source.randrange(20))
            ctx.poll(blocking=False)
            due = sorted(
                (order, index) for index, order in model.items() if order[0] <= clock.now_ns()
            )
            assert ran == [index for _, index in due]
            for _, index in due:
                del model[index]
            ran.clear()
        assert [timer.armed for timer in timers] == [index in model for index in range(30)]


def test_timer_belongs_to_its_home_thread(ctx: AioContext) -> None:
    timer = ctx.new_timer(lambda: None)
    ctx._home = -1
    with pytest.raises(AssertionError, match="another thread"):
        timer.arm(1)
    with pytest.raises(AssertionError, match="another thread"):
        timer.cancel()
    ctx.adopt()
