# SPDX-License-Identifier: Apache-2.0
"""Futures and tasks: who runs when, what cancelling does, and that no failure goes unheard."""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator
from typing import Any

import pytest

from blockemu.loop import (
    AioContext,
    Cancelled,
    Future,
    IOThread,
    NotDoneError,
    Task,
    current_task,
    run_in_context,
    run_on_fresh_stack,
    settled,
    yield_now,
)


async def value(result: int) -> int:
    return result


async def wait_for(future: Future[int]) -> int:
    return await future


async def broken() -> None:
    raise ValueError("broken")


def poll(ctx: AioContext) -> None:
    ctx.poll(blocking=False)


# Futures


def test_future_has_no_result_until_it_is_done() -> None:
    future: Future[int] = Future()
    assert not future.done()
    with pytest.raises(NotDoneError):
        future.result()
    with pytest.raises(NotDoneError):
        future.exception()
    future.set_result(3)
    assert future.done()
    assert future.result() == 3
    assert future.exception() is None


def test_future_result_raises_its_exception() -> None:
    future: Future[int] = Future()
    error = OSError(5, "broken disk")
    future.set_exception(error)
    assert future.exception() is error
    with pytest.raises(OSError, match="broken disk"):
        future.result()


def test_future_completes_once() -> None:
    future: Future[int] = Future()
    future.set_result(3)
    with pytest.raises(RuntimeError, match="already"):
        future.set_result(4)
    with pytest.raises(RuntimeError, match="already"):
        future.set_exception(ValueError())


def test_done_callback_outside_of_a_context_runs_at_once() -> None:
    seen: list[int] = []
    future: Future[int] = Future()
    future.add_done_callback(lambda done: seen.append(done.result()))
    future.set_result(3)
    future.add_done_callback(lambda done: seen.append(done.result() + 1))
    assert seen == [3, 4]


def test_done_callback_of_a_context_runs_in_its_round(ctx: AioContext) -> None:
    seen: list[AioContext | None] = []
    future: Future[int] = Future()

    async def add() -> None:
        future.add_done_callback(lambda _: seen.append(AioContext.current()))

    ctx.spawn(add())
    future.set_result(3)
    assert seen == []
    ctx.spawn(add())
    poll(ctx)
    assert seen == [ctx, ctx]


# Tasks


def test_spawn_runs_at_once_to_the_first_suspension(ctx: AioContext) -> None:
    ran: list[str] = []
    future: Future[int] = Future()

    async def coroutine() -> int:
        ran.append("start")
        result = await future
        ran.append("end")
        return result

    task = ctx.spawn(coroutine(), name="mine")
    assert ran == ["start"]
    assert not task.done()
    future.set_result(5)
    assert ran == ["start"]
    poll(ctx)
    assert task.result() == 5
    assert ran == ["start", "end"]
    assert "mine" in repr(task)


def test_coroutine_that_never_waits_is_done_when_spawn_returns(ctx: AioContext) -> None:
    task = ctx.spawn(value(3))
    assert task.done()
    assert task.result() == 3
    assert not ctx._woken
    assert not ctx._tasks


def test_awaiting_a_done_future_does_not_suspend(ctx: AioContext) -> None:
    future: Future[int] = Future()
    future.set_result(7)
    assert ctx.spawn(wait_for(future)).result() == 7


def test_waiters_resume_in_their_order(ctx: AioContext) -> None:
    order: list[int] = []
    future: Future[int] = Future()

    async def waiter(index: int) -> None:
        await future
        order.append(index)

    for index in range(5):
        ctx.spawn(waiter(index))
    future.set_result(0)
    poll(ctx)
    assert order == [0, 1, 2, 3, 4]


def test_exception_reaches_who_awaits_the_task(ctx: AioContext) -> None:
    async def outer() -> str:
        try:
            await ctx.spawn(broken())
        except ValueError as error:
            return str(error)
        return "nothing"

    assert ctx.run(outer()) == "broken"


def test_current_task_is_the_one_whose_code_runs(ctx: AioContext) -> None:
    seen: list[Task[Any] | None] = []

    async def inner() -> None:
        seen.append(current_task())

    async def outer() -> None:
        seen.append(current_task())
        inner_task = ctx.spawn(inner())
        assert seen[-1] is inner_task
        seen.append(current_task())
        await yield_now()
        seen.append(current_task())

    task = ctx.spawn(outer())
    assert current_task() is None
    poll(ctx)
    poll(ctx)
    assert [entry is task for entry in seen] == [True, False, True, True]
    assert task.ctx is ctx


def test_foreign_awaitable_is_refused_where_it_is_awaited(ctx: AioContext) -> None:
    class Foreign:
        def __await__(self) -> Generator[str, None, None]:
            yield "something of asyncio's"

    async def confused() -> str:
        try:
            await Foreign()
        except TypeError as error:
            await yield_now()
            return str(error)
        return "accepted"

    assert "can't await 'something of asyncio's'" in ctx.run(confused()).replace('"', "'")


# Exceptions that nobody reads


def test_unread_exception_of_a_task_is_reported(ctx: AioContext) -> None:
    seen: list[tuple[str, Exception]] = []
    ctx.exception_handler = lambda what, error: seen.append((what, error))
    gc.disable()  # It must not take the collector.
    ctx.spawn(broken(), name="lonely")
    poll(ctx)
    gc.enable()
    ((what, error),) = seen
    assert "lonely" in what
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("how", ["result", "exception", "await"])
def test_exception_that_was_read_is_not_reported(ctx: AioContext, how: str) -> None:
    task = ctx.spawn(broken())
    if how == "result":
        with pytest.raises(ValueError, match="broken"):
            task.result()
    elif how == "exception":
        assert isinstance(task.exception(), ValueError)
    else:

        async def reader(task: Task[None]) -> None:
            with pytest.raises(ValueError, match="broken"):
                await task

        ctx.run(reader(task))
    del task
    gc.collect()
    poll(ctx)


def test_cancelled_task_is_not_reported(ctx: AioContext) -> None:
    task = ctx.spawn(wait_for(Future()))
    task.cancel()
    poll(ctx)
    assert task.cancelled()
    del task
    gc.collect()
    poll(ctx)


def test_keyboard_interrupt_in_a_task_leaves_poll(ctx: AioContext) -> None:
    async def interrupted() -> None:
        await yield_now()
        raise KeyboardInterrupt

    task = ctx.spawn(interrupted())
    with pytest.raises(KeyboardInterrupt):
        poll(ctx)
    assert isinstance(task.exception(), KeyboardInterrupt)
    poll(ctx)


# Cancellation


def test_cancel_throws_where_the_task_waits(ctx: AioContext) -> None:
    cleaned: list[str] = []

    async def coroutine() -> None:
        try:
            await Future[None]()
        except Exception:
            pytest.fail("Cancelled is no Exception")
        finally:
            cleaned.append("finally")

    task = ctx.spawn(coroutine())
    task.cancel()
    assert cleaned == []
    poll(ctx)
    assert cleaned == ["finally"]
    assert task.cancelled()
    with pytest.raises(Cancelled):
        task.result()
    task.cancel()


def test_cancel_waits_for_a_shielded_future(ctx: AioContext) -> None:
    io: Future[int] = Future(shielded=True)
    task = ctx.spawn(wait_for(io))
    task.cancel()
    poll(ctx)
    assert not task.done()
    io.set_result(1)
    poll(ctx)
    assert task.cancelled()


def test_cancel_of_a_task_that_was_woken_is_delivered(ctx: AioContext) -> None:
    future: Future[int] = Future()
    task = ctx.spawn(wait_for(future))
    future.set_result(1)
    task.cancel()
    poll(ctx)
    assert task.cancelled()


def test_cancelled_task_may_go_on_and_be_cancelled_again(ctx: AioContext) -> None:
    caught = 0

    async def stubborn() -> int:
        nonlocal caught
        while caught < 3:
            try:
                await Future[None]()
            except Cancelled:
                caught += 1
        return caught

    task = ctx.spawn(stubborn())
    for _ in range(3):
        task.cancel()
        poll(ctx)
    assert task.result() == 3


def test_cancelling_oneself_takes_effect_at_the_next_suspension(ctx: AioContext) -> None:
    ran: list[str] = []

    async def suicidal() -> None:
        task = current_task()
        assert task is not None
        task.cancel()
        ran.append("goes on")
        await Future[None]()
        ran.append("not reached")

    task = ctx.spawn(suicidal())
    poll(ctx)
    assert task.cancelled()
    assert ran == ["goes on"]


def test_cancelling_who_awaits_a_task_leaves_that_task_alone(ctx: AioContext) -> None:
    future: Future[int] = Future()
    worker = ctx.spawn(wait_for(future))
    waiter = ctx.spawn(wait_for(worker))
    waiter.cancel()
    poll(ctx)
    assert waiter.cancelled()
    assert not worker.done()
    future.set_result(4)
    poll(ctx)
    assert worker.result() == 4


def test_settled_waits_even_when_cancelled(ctx: AioContext) -> None:
    future: Future[int] = Future()
    task = ctx.spawn(settled(future))
    task.cancel()
    poll(ctx)
    assert not task.done()
    future.set_exception(ValueError("not raised"))
    poll(ctx)
    assert task.cancelled()


def test_cancel_of_a_task_that_has_not_started_never_calls_its_factory(ctx: AioContext) -> None:
    def factory() -> Any:
        pytest.fail("called")

    task = ctx.spawn_threadsafe(factory)
    task.cancel()
    poll(ctx)
    assert task.cancelled()


def test_factory_that_raises_fails_its_task(ctx: AioContext) -> None:
    def factory() -> Any:
        raise ValueError("no coroutine")

    task = ctx.spawn_threadsafe(factory)
    poll(ctx)
    with pytest.raises(ValueError, match="no coroutine"):
        task.result()


# Between threads


def test_future_completed_by_another_thread_resumes_its_waiter_at_home(
    epoll_ctx: AioContext,
) -> None:
    threads: list[int] = []
    future: Future[int] = Future()

    async def waiter() -> int:
        result = await future
        threads.append(threading.get_ident())
        return result

    task = epoll_ctx.spawn(waiter())
    thread = threading.Thread(target=future.set_result, args=(9,))
    thread.start()
    while not task.done():
        epoll_ctx.poll(blocking=True)
    thread.join()
    assert task.result() == 9
    assert threads == [threading.get_ident()]


def test_completions_racing_with_waits_are_never_lost(epoll_ctx: AioContext) -> None:
    count = 5000
    futures: list[Future[int]] = [Future() for _ in range(count)]

    def complete() -> None:
        for index, future in enumerate(futures):
            future.set_result(index)

    async def wait_all() -> int:
        total = 0
        for future in futures:
            total += await future
        return total

    thread = threading.Thread(target=complete)
    thread.start()
    assert epoll_ctx.run(wait_all()) == count * (count - 1) // 2
    thread.join()


def test_run_in_context_hops_there_and_back(epoll_ctx: AioContext) -> None:
    iothread = IOThread("there")
    iothread.start()

    async def there() -> str:
        ctx = AioContext.current()
        assert ctx is iothread.ctx
        await yield_now()
        return threading.current_thread().name

    async def here() -> str:
        name = await run_in_context(iothread.ctx, there)
        assert AioContext.current() is epoll_ctx
        return name

    assert epoll_ctx.run(here()) == "there"
    iothread.stop()


def test_run_in_context_of_the_running_context_runs_in_place(ctx: AioContext) -> None:
    assert ctx.spawn(run_in_context(ctx, lambda: value(3))).result() == 3


def test_run_on_fresh_stack_lets_recursion_go_past_the_interpreters_limit(ctx: AioContext) -> None:
    async def descend(levels: int) -> int:
        if not levels:
            return 0
        if levels % 50:
            return 1 + await descend(levels - 1)
        return 1 + await run_on_fresh_stack(lambda: descend(levels - 1))

    assert ctx.run(descend(5000)) == 5000


def test_run_in_context_carries_exceptions(epoll_ctx: AioContext) -> None:
    iothread = IOThread("there")
    iothread.start()
    with pytest.raises(ValueError, match="broken"):
        epoll_ctx.run(run_in_context(iothread.ctx, broken))
    iothread.stop()


def test_cancelling_run_in_context_cancels_there_and_waits_for_it(
    epoll_ctx: AioContext,
) -> None:
    iothread = IOThread("there")
    iothread.start()
    order: list[str] = []
    started = threading.Event()

    async def there() -> None:
        started.set()
        try:
            await Future[None]()
        finally:
            await yield_now()
            order.append("there")

    async def here() -> None:
        try:
            await run_in_context(iothread.ctx, there)
        finally:
            order.append("here")

    task = epoll_ctx.spawn(here())
    started.wait()
    task.cancel()
    while not task.done():
        epoll_ctx.poll(blocking=True)
    assert order == ["there", "here"]
    assert task.cancelled()
    iothread.stop()
