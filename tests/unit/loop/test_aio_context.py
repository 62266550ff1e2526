# SPDX-License-Identifier: Apache-2.0
"""A round, its order, its descriptors, and what happens when callbacks fail."""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Callable

import pytest

from blockemu.loop import (
    AioContext,
    Cancelled,
    EpollPoller,
    Future,
    MemoryPoller,
    VirtualClock,
    yield_now,
)
from blockemu.loop.aio_context import SETTLE_PASSES_MAX, STEPS_MAX, TURNS_NS

IN, OUT, ERR, HUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLERR, select.EPOLLHUP


def test_round_runs_bhs_fds_timers_coroutines_deferred_in_this_order(
    ctx: AioContext, poller: MemoryPoller
) -> None:
    ran: list[str] = []
    future: Future[None] = Future()

    async def waiter() -> None:
        await future
        ran.append("coroutine")

    def bh() -> None:
        ran.append("bh")
        ctx.defer(lambda: ran.append("deferred"))
        future.set_result(None)

    ctx.spawn(waiter())
    ctx.new_timer(lambda: ran.append("timer")).arm(0)
    ctx.set_fd_handler(7, read=lambda: ran.append("fd"))
    poller.ready(7, IN)
    ctx.schedule_oneshot(bh)
    assert ctx.poll(blocking=True)
    assert ran == ["bh", "fd", "timer", "coroutine", "deferred"]


# Descriptors


def test_fd_handlers_are_called_for_their_events(ctx: AioContext, poller: MemoryPoller) -> None:
    ran: list[str] = []
    ctx.set_fd_handler(7, read=lambda: ran.append("read"), write=lambda: ran.append("write"))
    for level in (IN, OUT, IN | OUT, ERR, HUP):
        poller.ready(7, level)
        ctx.poll(blocking=True)
        ran.append("|")
    assert "".join(word[0] for word in ran) == "r|w|rw|rw|rw|"


def test_fd_interest_follows_the_handlers(ctx: AioContext, poller: MemoryPoller) -> None:
    def nothing() -> None:
        pass

    ctx.set_fd_handler(7, read=nothing)
    assert poller.interest(7) == IN
    ctx.set_fd_handler(7, read=nothing, write=nothing)
    assert poller.interest(7) == IN | OUT
    ctx.set_fd_handler(7, write=nothing)
    assert poller.interest(7) == OUT
    ctx.set_fd_handler(7)
    ctx.set_fd_handler(7)
    assert poller.interest(7) == 0


def test_fd_handler_removed_by_another_of_its_round_is_not_called(
    ctx: AioContext, poller: MemoryPoller
) -> None:
    ran: list[int] = []

    def handler(mine: int, other: int) -> None:
        ran.append(mine)
        ctx.set_fd_handler(other)

    ctx.set_fd_handler(7, read=lambda: handler(7, 8))
    ctx.set_fd_handler(8, read=lambda: handler(8, 7))
    poller.ready(7, IN)
    poller.ready(8, IN)
    ctx.poll(blocking=False)
    ctx.poll(blocking=False)
    assert ran == [7, 7]


def test_fd_handler_set_in_a_round_is_not_called_with_that_rounds_events(
    ctx: AioContext, poller: MemoryPoller
) -> None:
    """The number may belong to another file by now."""
    ran: list[str] = []

    def reopen() -> None:
        ctx.set_fd_handler(7)
        ctx.set_fd_handler(8)
        ctx.set_fd_handler(8, read=lambda: ran.append("new"))

    ctx.set_fd_handler(7, read=reopen)
    ctx.set_fd_handler(8, read=lambda: ran.append("old"))
    poller.ready(7, IN)
    poller.ready(8, IN)
    ctx.poll(blocking=False)
    assert ran == []
    ctx.poll(blocking=False)
    assert ran == ["new"]


def test_fd_write_handler_removed_by_the_read_handler_is_not_called(
    ctx: AioContext, poller: MemoryPoller
) -> None:
    ctx.set_fd_handler(
        7,
        read=lambda: ctx.set_fd_handler(7, read=lambda: None),
        write=lambda: pytest.fail("removed"),
    )
    poller.ready(7, IN | OUT)
    ctx.poll(blocking=False)


def test_fd_event_served_by_a_nested_poll_is_not_served_again(
    ctx: AioContext, poller: MemoryPoller
) -> None:
    ran: list[str] = []

    def nest() -> None:
        ran.append("nest")
        ctx.set_fd_handler(7)
        ctx.poll(blocking=True)

    def second() -> None:
        ran.append("second")
        poller.ready(8, 0)

    ctx.set_fd_handler(7, read=nest)
    ctx.set_fd_handler(8, read=second)
    poller.ready(7, IN)
    poller.ready(8, IN)
    ctx.poll(blocking=False)
    assert ran == ["nest", "second"]


def test_external_handlers_stay_silent_while_disabled(
    ctx: AioContext, poller: MemoryPoller
) -> None:
    ran: list[str] = []
    ctx.set_fd_handler(7, read=lambda: ran.append("external"), external=True)
    ctx.set_fd_handler(8, read=lambda: ran.append("internal"))
    poller.ready(7, IN)
    poller.ready(8, IN)
    ctx.disable_external()
    ctx.disable_external()
    ctx.set_fd_handler(9, read=lambda: ran.append("newcomer"), external=True)
    poller.ready(9, IN)
    ctx.poll(blocking=False)
    ctx.enable_external()
    silent = [ctx.external_disabled]
    ctx.poll(blocking=False)
    assert ran == ["internal", "internal"]
    ctx.enable_external()
    silent.append(ctx.external_disabled)
    assert silent == [True, False]
    ctx.poll(blocking=False)
    assert sorted(ran[2:]) == ["external", "internal", "newcomer"]


def test_external_handler_disabled_within_a_round_is_not_called_in_it(
    ctx: AioContext, poller: MemoryPoller
) -> None:
    ctx.set_fd_handler(7, read=ctx.disable_external)
    ctx.set_fd_handler(8, read=lambda: pytest.fail("silenced"), external=True)
    ctx.set_fd_handler(
        9,
        read=lambda: pytest.fail("silenced"),
        write=lambda: pytest.fail("silenced"),
        external=True,
    )
    for fd in (7, 8, 9):
        poller.ready(fd, IN | OUT)
    ctx.poll(blocking=False)


def test_enable_external_without_disable_is_refused(ctx: AioContext) -> None:
    with pytest.raises(AssertionError, match="without disable"):
        ctx.enable_external()


def test_epoll_context_serves_a_socket(epoll_ctx: AioContext) -> None:
    near, far = socket.socketpair()
    near.setblocking(False)
    got: list[bytes] = []
    epoll_ctx.set_fd_handler(near.fileno(), read=lambda: got.append(near.recv(10)))
    far.send(b"hello")
    assert epoll_ctx.poll(blocking=True)
    assert not epoll_ctx.poll(blocking=False)
    assert got == [b"hello"]
    epoll_ctx.set_fd_handler(near.fileno())
    near.close()
    far.close()


def test_other_thread_ends_a_sleep(epoll_ctx: AioContext) -> None:
    ran: list[int] = []
    thread = threading.Thread(target=lambda: epoll_ctx.schedule_oneshot(lambda: ran.append(1)))
    thread.start()
    while not ran:
        epoll_ctx.poll(blocking=True)
    thread.join()


# Deferred callbacks


def test_deferred_callbacks_run_once_each_in_order(ctx: AioContext) -> None:
    ran: list[int] = []

    def three() -> None:
        ran.append(3)

    ctx.defer(three)
    ctx.defer(lambda: ran.append(1))
    ctx.defer(three)
    ctx.poll(blocking=True)
    ctx.poll(blocking=False)
    assert ran == [3, 1, 3]


def test_what_a_deferred_callback_wakes_and_defers_still_belongs_to_the_round(
    ctx: AioContext,
) -> None:
    ran: list[str] = []
    future: Future[None] = Future()

    async def waiter() -> None:
        await future
        ran.append("woken")
        ctx.defer(lambda: ran.append("deferred again"))

    ctx.spawn(waiter())
    ctx.defer(lambda: future.set_result(None))
    ctx.poll(blocking=True)
    assert ran == ["woken", "deferred again"]


def test_a_callback_that_defers_itself_does_not_stop_the_loop(ctx: AioContext) -> None:
    ran: list[int] = []

    def again() -> None:
        ran.append(1)
        ctx.defer(again)

    ctx.defer(again)
    ctx.poll(blocking=True)
    assert len(ran) == SETTLE_PASSES_MAX
    ctx.poll(blocking=True)
    assert len(ran) == 2 * SETTLE_PASSES_MAX


def test_nested_poll_runs_the_outer_rounds_deferred_callbacks_once(ctx: AioContext) -> None:
    ran: list[str] = []

    def nest() -> None:
        ctx.poll(blocking=True)
        ran.append("nest ends")

    ctx.defer(nest)
    ctx.defer(lambda: ran.append("second"))
    ctx.poll(blocking=True)
    assert ran == ["second", "nest ends"]


def test_tasks_that_wake_each_other_for_ever_do_not_stop_the_loop(ctx: AioContext) -> None:
    steps = 0

    async def ping(mine: list[Future[None]], other: list[Future[None]]) -> None:
        nonlocal steps
        while True:
            steps += 1
            mine[0] = Future()
            if not other[0].done():
                other[0].set_result(None)
            await mine[0]

    one: list[Future[None]] = [Future()]
    two: list[Future[None]] = [Future()]
    tasks = [ctx.spawn(ping(one, two)), ctx.spawn(ping(two, one))]
    ctx.poll(blocking=True)
    assert STEPS_MAX <= steps <= STEPS_MAX + 2
    ctx.poll(blocking=True)
    assert steps > STEPS_MAX + 2
    for task in tasks:
        task.cancel()
    ctx.poll(blocking=True)


# Callbacks that raise


def fail() -> None:
    raise ValueError("broken")


@pytest.mark.parametrize("place", ["bh", "fd", "timer", "defer", "done"])
def test_exception_in_a_callback_goes_to_the_handler_and_the_round_goes_on(
    ctx: AioContext, poller: MemoryPoller, place: str
) -> None:
    seen: list[tuple[str, Exception]] = []
    ran: list[str] = []
    ctx.exception_handler = lambda what, error: seen.append((what, error))

    def twice(add: Callable[[Callable[[], None]], object]) -> None:
        add(fail)
        add(lambda: ran.append("second"))

    if place == "bh":
        twice(ctx.schedule_oneshot)
    elif place == "fd":
        fds = iter((7, 8))
        twice(lambda callback: ctx.set_fd_handler(next(fds), read=callback))
        poller.ready(7, IN)
        poller.ready(8, IN)
    elif place == "timer":
        twice(lambda callback: ctx.new_timer(callback).arm(0))
    elif place == "defer":
        twice(ctx.defer)
    else:
        future: Future[None] = Future()

        async def add_both() -> None:
            twice(lambda callback: future.add_done_callback(lambda _: callback()))

        ctx.spawn(add_both())
        future.set_result(None)
    ctx.poll(blocking=False)
    assert ran == ["second"]
    assert len(seen) == 1
    assert isinstance(seen[0][1], ValueError)


def test_handler_that_raises_leaves_the_rest_to_the_next_round(ctx: AioContext) -> None:
    ran: list[str] = []
    ctx.schedule_oneshot(fail)
    ctx.schedule_oneshot(lambda: ran.append("bh"))
    ctx.defer(lambda: ran.append("deferred"))
    with pytest.raises(ValueError, match="broken"):
        ctx.poll(blocking=True)
    assert AioContext.current() is None
    ctx.poll(blocking=True)
    assert ran == ["bh", "deferred"]


def test_default_handler_logs_the_traceback(caplog: pytest.LogCaptureFixture) -> None:
    ctx = AioContext()
    ctx.schedule_oneshot(fail)
    with caplog.at_level(logging.ERROR):
        ctx.poll(blocking=False)
    assert "ValueError: broken" in caplog.text
    assert "bottom half" in caplog.text
    ctx.close()


def test_keyboard_interrupt_leaves_poll(ctx: AioContext) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    ctx.exception_handler = lambda what, error: pytest.fail("not for the handler")
    ctx.schedule_oneshot(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ctx.poll(blocking=True)


def test_interrupted_sleep_leaves_notify_me_as_it_was(clock: VirtualClock) -> None:
    class Interrupted(MemoryPoller):
        def wait(self, timeout_ns: int | None) -> list[tuple[int, int]]:
            raise KeyboardInterrupt

    ctx = AioContext(clock=clock, poller=Interrupted(clock))
    with pytest.raises(KeyboardInterrupt):
        ctx.poll(blocking=True)
    assert ctx._notify_me == 0
    ctx.close()


# Threads and homes


def test_current_is_the_running_context_only_while_it_runs(ctx: AioContext) -> None:
    seen: list[AioContext | None] = []
    assert AioContext.current() is None
    ctx.schedule_oneshot(lambda: seen.append(AioContext.current()))
    ctx.poll(blocking=False)
    assert seen == [ctx]
    assert AioContext.current() is None


def test_two_contexts_of_one_thread_run_inside_each_other(ctx: AioContext) -> None:
    clock = VirtualClock()
    other = AioContext("other", clock=clock, poller=MemoryPoller(clock))
    seen: list[AioContext | None] = []

    async def here() -> None:
        seen.append(AioContext.current())

    def callback() -> None:
        other.spawn(here())
        seen.append(AioContext.current())

    ctx.schedule_oneshot(callback)
    ctx.poll(blocking=False)
    assert seen == [other, ctx]
    other.close()


def test_first_poll_makes_a_home_and_other_threads_are_refused(ctx: AioContext) -> None:
    ctx.poll(blocking=False)
    refused: list[str] = []

    def elsewhere() -> None:
        assert not ctx.is_home()
        for call in (
            lambda: ctx.poll(blocking=False),
            lambda: ctx.set_fd_handler(7),
            lambda: ctx.new_timer(fail),
            ctx.disable_external,
            ctx.enable_external,
            ctx.assert_home,
            ctx.close,
        ):
            try:
                call()
            except AssertionError as error:
                refused.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(refused) == 7
    assert all("belongs to another thread" in text for text in refused)
    assert ctx.is_home()


def test_adopt_moves_the_home(ctx: AioContext) -> None:
    ctx.poll(blocking=False)
    thread = threading.Thread(target=ctx.adopt)
    thread.start()
    thread.join()
    ctx._home = -1
    assert not ctx.is_home()
    ctx.adopt()
    assert ctx.is_home()


def test_run_returns_the_result_and_raises_the_exception(ctx: AioContext) -> None:
    async def answer() -> int:
        await yield_now()
        return 42

    async def broken() -> None:
        await yield_now()
        raise ValueError("broken")

    assert ctx.run(answer()) == 42
    with pytest.raises(ValueError, match="broken"):
        ctx.run(broken())


# The parts that come with it, and the end


def test_thread_pool_and_buffers_are_made_when_first_used() -> None:
    ctx = AioContext()
    assert ctx._thread_pool is None
    assert ctx.thread_pool is ctx.thread_pool
    assert ctx.buffers is ctx.buffers
    ctx.close()


def test_linux_aio_is_none_where_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockemu.loop import linux_aio

    calls: list[AioContext] = []

    def refuse(ctx: AioContext) -> None:
        calls.append(ctx)
        raise OSError(11, "io_setup")

    monkeypatch.setattr(linux_aio, "LinuxAio", refuse)
    ctx = AioContext()
    assert ctx.linux_aio is None
    assert ctx.linux_aio is None
    assert calls == [ctx]
    ctx.close()


def test_close_closes_what_the_context_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockemu.loop import linux_aio

    closed: list[str] = []

    class Aio:
        def __init__(self, ctx: AioContext) -> None:
            pass

        def close(self) -> None:
            closed.append("aio")

    monkeypatch.setattr(linux_aio, "LinuxAio", Aio)
    ctx = AioContext()
    assert ctx.linux_aio is not None
    pool = ctx.thread_pool
    ctx.close()
    ctx.close()
    assert closed == ["aio"]
    with pytest.raises(AssertionError, match="closed"):
        pool.submit(fail, (), lambda result: None)
    with pytest.raises(AssertionError, match="closed"):
        ctx.poll(blocking=False)


def test_close_ends_coroutines_that_still_wait(ctx: AioContext) -> None:
    cleaned: list[str] = []

    async def waits() -> None:
        try:
            await Future[None]()
        finally:
            cleaned.append("finally")

    task = ctx.spawn(waits())
    ctx.close()
    assert cleaned == ["finally"]
    assert task.cancelled()
    with pytest.raises(Cancelled):
        task.result()


def test_close_inside_a_round_is_refused(ctx: AioContext) -> None:
    ctx.schedule_oneshot(ctx.close)
    with pytest.raises(AssertionError, match="its own round"):
        ctx.poll(blocking=False)


def test_closed_context_gives_its_descriptors_back() -> None:
    poller = EpollPoller()
    ctx = AioContext(poller=poller)
    ctx.close()
    with pytest.raises(ValueError, match="closed"):
        poller.fileno()
    ctx.schedule_oneshot(fail)
    ctx.notify()


def test_who_comes_late_in_a_round_is_told_and_the_next_round_begins_anew(
    ctx: AioContext, clock: VirtualClock
) -> None:
    told: list[bool] = []

    def turn() -> None:
        told.append(ctx.is_late(ctx.now_ns()))
        clock.advance_ns(TURNS_NS // 2 + 1)

    for _ in range(2):
        for _ in range(4):
            ctx.schedule_oneshot(turn)
        ctx.poll(blocking=False)
    assert told == 2 * [False, False, True, True]
