# SPDX-License-Identifier: Apache-2.0
"""An AioContext as a source of a MainContext: what it answers, and what wakes the main loop."""

from __future__ import annotations

import os
import select
import threading

import pytest

from blockemu.loop import (
    AioContext,
    Future,
    MainContext,
    MainLoop,
    MemoryPoller,
    Source,
    VirtualClock,
    sleep_ns,
)


def prepared(ctx: AioContext) -> tuple[bool, int | None]:
    """What `prepare` answers, in an iteration that ends with `check`."""
    answer = ctx.prepare()
    ctx.check()
    return answer


def test_aio_context_prepare_answers_by_what_is_scheduled(
    ctx: AioContext, clock: VirtualClock
) -> None:
    assert prepared(ctx) == (False, None)
    timer = ctx.new_timer(lambda: None)
    timer.arm(50_000_000)
    assert prepared(ctx) == (False, 50_000_000)
    idle = ctx.new_bh(lambda: None)
    idle.schedule_idle()
    assert prepared(ctx) == (False, 10_000_000)
    timer.arm(7_000_000)
    assert prepared(ctx) == (False, 7_000_000)
    ctx.new_bh(lambda: None).schedule()
    assert prepared(ctx) == (True, 0)
    ctx.dispatch()
    assert prepared(ctx) == (False, 7_000_000)
    clock.set_ns(7_000_000)
    assert prepared(ctx) == (True, 0)
    timer.cancel()


def test_aio_context_prepare_answers_zero_for_woken_and_deferred_work(ctx: AioContext) -> None:
    future: Future[None] = Future()

    async def wait() -> None:
        await future

    ctx.spawn(wait())
    assert prepared(ctx) == (False, None)
    future.set_result(None)
    assert prepared(ctx) == (True, 0)
    ctx.dispatch()
    ctx.defer(lambda: None)
    assert prepared(ctx) == (True, 0)
    ctx.dispatch()
    assert prepared(ctx) == (False, None)


@pytest.mark.parametrize("work", ["nothing", "bh", "idle bh", "timer", "woken", "defer"])
def test_aio_context_check_says_whether_something_is_ready(ctx: AioContext, work: str) -> None:
    future: Future[None] = Future()

    async def wait() -> None:
        await future

    ctx.spawn(wait())
    if work == "bh":
        ctx.new_bh(lambda: None).schedule()
    elif work == "idle bh":
        ctx.new_bh(lambda: None).schedule_idle()
    elif work == "timer":
        ctx.new_timer(lambda: None).arm(0)
    elif work == "woken":
        future.set_result(None)
    elif work == "defer":
        ctx.defer(lambda: None)
    assert ctx.check() == (work != "nothing")
    ctx.dispatch()
    assert not ctx.check()


def test_aio_context_with_a_memory_poller_finds_its_descriptors(
    ctx: AioContext, poller: MemoryPoller, context: MainContext
) -> None:
    ran: list[int] = []
    ctx.set_fd_handler(7, read=lambda: ran.append(7))
    ctx.attach(context)
    assert not context.iteration(may_block=False)
    poller.ready(7, select.EPOLLIN)
    assert context.iteration(may_block=True)
    assert ran == [7]


def test_aio_context_on_epoll_wakes_the_main_loop_by_its_descriptor(
    epoll_ctx: AioContext, context: MainContext, pipe: tuple[int, int]
) -> None:
    ran: list[bytes] = []
    epoll_ctx.set_fd_handler(pipe[0], read=lambda: ran.append(os.read(pipe[0], 10)))
    epoll_ctx.attach(context)
    thread = threading.Thread(target=lambda: os.write(pipe[1], b"x"))
    thread.start()
    while not ran:
        context.iteration(may_block=True)
    thread.join()
    epoll_ctx.set_fd_handler(pipe[0])


def test_aio_context_in_a_main_loop_hears_of_bhs_of_other_threads(
    epoll_ctx: AioContext, context: MainContext
) -> None:
    epoll_ctx.attach(context)
    loop = MainLoop(context)
    thread = threading.Thread(target=lambda: epoll_ctx.schedule_oneshot(loop.quit))
    thread.start()
    loop.run()
    thread.join()


def test_two_aio_contexts_share_a_main_loop(clock: VirtualClock, context: MainContext) -> None:
    order: list[str] = []
    contexts = [
        AioContext(name, clock=clock, poller=MemoryPoller(clock)) for name in ("main", "iohandler")
    ]

    async def tick(ctx: AioContext, step_ns: int) -> None:
        for _ in range(2):
            await sleep_ns(step_ns)
            assert AioContext.current() is ctx
            order.append(f"{ctx.name} {clock.now_ns()}")

    for ctx, step_ns in zip(contexts, (100, 70), strict=True):
        ctx.attach(context)
        ctx.spawn(tick(ctx, step_ns))
    while len(order) < 4:
        context.iteration(may_block=True)
    assert order == ["iohandler 70", "main 100", "iohandler 140", "main 200"]
    for ctx in contexts:
        ctx.close()


def test_nested_poll_inside_a_main_loop_does_not_run_the_other_context(
    clock: VirtualClock, context: MainContext
) -> None:
    ran: list[str] = []
    main = AioContext("main", clock=clock, poller=MemoryPoller(clock))
    iohandler = AioContext("iohandler", clock=clock, poller=MemoryPoller(clock))

    def nest() -> None:
        iohandler.schedule_oneshot(lambda: ran.append("iohandler"))
        main.schedule_oneshot(lambda: ran.append("nested"))
        main.poll(blocking=True)
        ran.append("nest ends")

    main.attach(context)
    iohandler.attach(context)
    main.schedule_oneshot(nest)
    context.iteration(may_block=True)
    context.iteration(may_block=True)
    assert ran == ["nested", "nest ends", "iohandler"]
    main.close()
    iohandler.close()


@pytest.mark.parametrize("work", ["timer", "defer"])
def test_work_from_another_sources_prepare_is_not_slept_over(
    epoll_ctx: AioContext, context: MainContext, work: str
) -> None:
    ran: list[int] = []

    class Late(Source):
        def prepare(self) -> tuple[bool, int | None]:
            if work == "timer":
                epoll_ctx.new_timer(lambda: ran.append(1)).arm(0)
            else:
                epoll_ctx.defer(lambda: ran.append(1))
            self.destroy()
            return False, None

    epoll_ctx.attach(context)
    Late().attach(context)
    while not ran:
        context.iteration(may_block=True)
