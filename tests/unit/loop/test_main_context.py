# SPDX-License-Identifier: Apache-2.0
"""glib's rules for sources and iterations, and an AioContext as one of the sources."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator

import pytest

from blockemu.loop import (
    AioContext,
    Future,
    MainContext,
    MainLoop,
    MemoryPoller,
    PollFD,
    Source,
    VirtualClock,
    sleep_ns,
)
from blockemu.loop.main_context import PRIORITY_LOWEST, virtual_poll
from blockemu.loop.source import PRIORITY_HIGH, PRIORITY_LOW


@pytest.fixture
def context(clock: VirtualClock) -> Iterator[MainContext]:
    made = MainContext(clock=clock, poll=virtual_poll(clock))
    yield made
    made.close()


class Probe(Source):
    """A source whose answers a test sets, with a diary of what it was asked."""

    def __init__(
        self,
        diary: list[str],
        name: str,
        *,
        priority: int = 0,
        prepared: tuple[bool, int | None] = (False, None),
        checked: bool = False,
        keep: bool = True,
        on_dispatch: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(name=name, priority=priority)
        self.diary = diary
        self.prepared = prepared
        self.checked = checked
        self.keep = keep
        self.on_dispatch = on_dispatch

    def prepare(self) -> tuple[bool, int | None]:
        self.diary.append(f"{self.name}.prepare")
        return self.prepared

    def check(self) -> bool:
        self.diary.append(f"{self.name}.check")
        return self.checked

    def dispatch(self) -> bool:
        self.diary.append(f"{self.name}.dispatch")
        self.on_dispatch()
        return self.keep

    def finalize(self) -> None:
        self.diary.append(f"{self.name}.finalize")


def iterate(context: MainContext, count: int = 1) -> None:
    for _ in range(count):
        context.iteration(may_block=False)


# Phases and priorities


def test_iteration_prepares_checks_and_dispatches_in_order(context: MainContext) -> None:
    diary: list[str] = []
    Probe(diary, "a", checked=True).attach(context)
    Probe(diary, "b").attach(context)
    assert context.iteration(may_block=False)
    assert diary == ["a.prepare", "b.prepare", "a.check", "b.check", "a.dispatch"]


def test_iteration_with_nothing_ready_dispatches_nothing(context: MainContext) -> None:
    Probe([], "a").attach(context)
    assert not context.iteration(may_block=False)


def test_source_that_prepare_found_ready_is_not_checked(context: MainContext) -> None:
    diary: list[str] = []
    Probe(diary, "a", prepared=(True, None)).attach(context)
    iterate(context)
    assert diary == ["a.prepare", "a.dispatch"]


def test_sources_are_walked_by_priority_then_attachment(context: MainContext) -> None:
    diary: list[str] = []
    for name, priority in (("low", PRIORITY_LOW), ("b", 0), ("c", 0), ("high", PRIORITY_HIGH)):
        Probe(diary, name, priority=priority).attach(context)
    iterate(context)
    assert diary[:4] == ["high.prepare", "b.prepare", "c.prepare", "low.prepare"]


def test_less_urgent_sources_are_left_alone_while_one_is_ready(context: MainContext) -> None:
    diary: list[str] = []
    urgent = Probe(diary, "urgent", prepared=(True, 0))
    Probe(diary, "low", priority=PRIORITY_LOW, prepared=(True, 0)).attach(context)
    urgent.attach(context)
    Probe(diary, "equal", checked=True).attach(context)
    iterate(context)
    assert diary == [
        "urgent.prepare",
        "equal.prepare",
        "equal.check",
        "urgent.dispatch",
        "equal.dispatch",
    ]
    urgent.destroy()
    diary.clear()
    iterate(context)
    assert "low.prepare" in diary
    assert "low.dispatch" not in diary


def test_check_that_finds_a_source_ready_leaves_less_urgent_ones_unchecked(
    context: MainContext,
) -> None:
    diary: list[str] = []
    Probe(diary, "a", checked=True).attach(context)
    Probe(diary, "b", priority=1, checked=True).attach(context)
    iterate(context)
    assert diary == ["a.prepare", "b.prepare", "a.check", "a.dispatch"]


def test_set_priority_moves_a_source_to_the_end_of_its_new_line(context: MainContext) -> None:
    diary: list[str] = []
    first = Probe(diary, "first")
    first.set_priority(5)
    first.attach(context)
    Probe(diary, "second").attach(context)
    iterate(context)
    assert diary[:2] == ["second.prepare", "first.prepare"]
    diary.clear()
    first.set_priority(0)
    iterate(context)
    assert diary[:2] == ["second.prepare", "first.prepare"]
    first.set_priority(-1)
    diary.clear()
    iterate(context)
    assert diary[:2] == ["first.prepare", "second.prepare"]


def test_prepare_reports_readiness_and_the_priority(context: MainContext) -> None:
    assert context.acquire()
    assert context.prepare() == (False, PRIORITY_LOWEST)
    source = Probe([], "a", priority=3, prepared=(True, None))
    source.attach(context)
    assert context.prepare() == (True, 3)
    assert context.query(3)[0] == 0
    context.release()


# Time-outs


def test_query_answers_the_smallest_timeout(context: MainContext) -> None:
    context.acquire()
    context.prepare()
    assert context.query(PRIORITY_LOWEST)[0] is None
    for timeout_ns in (500, 300, None, 400):
        Probe([], "a", prepared=(False, timeout_ns)).attach(context)
    context.prepare()
    assert context.query(PRIORITY_LOWEST)[0] == 300
    context.release()


def test_timeout_zero_without_readiness_polls_but_does_not_sleep(
    context: MainContext, clock: VirtualClock
) -> None:
    diary: list[str] = []
    Probe(diary, "a", prepared=(False, 0)).attach(context)
    assert not context.iteration(may_block=True)
    assert diary == ["a.prepare", "a.check"]
    assert clock.now_ns() == 0


def test_ready_time_makes_a_source_ready_until_it_is_changed(
    context: MainContext, clock: VirtualClock
) -> None:
    diary: list[str] = []
    source = Probe(diary, "a")
    source.attach(context)
    source.set_ready_time(1000)
    assert context.iteration(may_block=True)
    assert clock.now_ns() == 1000
    assert diary == ["a.prepare", "a.check", "a.dispatch"]
    assert context.iteration(may_block=False)
    source.set_ready_time(None)
    assert not context.iteration(may_block=False)


# Readiness and recursion


def test_source_stays_ready_until_it_is_dispatched(context: MainContext) -> None:
    diary: list[str] = []
    source = Probe(diary, "a", prepared=(True, 0))
    source.attach(context)
    assert context.pending()
    source.prepared = (False, None)
    diary.clear()
    iterate(context, 2)
    assert diary == ["a.dispatch", "a.prepare", "a.check"]


def test_source_is_invisible_to_a_nested_iteration_while_dispatched(
    context: MainContext,
) -> None:
    diary: list[str] = []
    source = Probe(
        diary, "a", prepared=(True, 0), on_dispatch=lambda: context.iteration(may_block=False)
    )
    source.attach(context)
    iterate(context)
    assert diary == ["a.prepare", "a.dispatch"]


def test_source_that_can_recurse_is_seen_by_a_nested_iteration(context: MainContext) -> None:
    diary: list[str] = []
    depth = 0

    def nest() -> None:
        nonlocal depth
        if depth < 2:
            depth += 1
            context.iteration(may_block=False)

    source = Probe(diary, "a", prepared=(True, 0), on_dispatch=nest)
    source.can_recurse = True
    source.attach(context)
    iterate(context)
    assert diary == ["a.prepare", "a.dispatch"] * 3


def test_nested_iteration_takes_over_what_the_outer_one_had_to_dispatch(
    context: MainContext,
) -> None:
    diary: list[str] = []

    def nest() -> None:
        context.iteration(may_block=False)
        diary.append("nested end")

    nesting = Probe(diary, "nesting", prepared=(True, 0), on_dispatch=nest)
    nesting.attach(context)
    Probe(diary, "sibling", checked=True).attach(context)
    iterate(context)
    assert diary == [
        "nesting.prepare",
        "sibling.prepare",
        "sibling.check",
        "nesting.dispatch",
        "sibling.dispatch",
        "nested end",
    ]


def test_iteration_inside_prepare_or_check_is_refused(context: MainContext) -> None:
    class Recursing(Source):
        def prepare(self) -> tuple[bool, int | None]:
            context.iteration(may_block=False)
            return False, None

    source = Recursing()
    source.attach(context)
    with pytest.raises(AssertionError, match="prepare"):
        iterate(context)
    source.destroy()
    assert not context.iteration(may_block=False)
    assert not context.is_owner()


# Coming and going


def test_dispatch_that_returns_false_destroys_its_source(context: MainContext) -> None:
    diary: list[str] = []
    source = Probe(diary, "a", prepared=(True, 0), keep=False)
    source.attach(context)
    iterate(context, 2)
    assert diary == ["a.prepare", "a.dispatch", "a.finalize"]
    assert source.is_destroyed


def test_source_destroyed_by_an_earlier_one_is_not_dispatched(context: MainContext) -> None:
    diary: list[str] = []
    second = Probe(diary, "second", prepared=(True, 0))
    Probe(diary, "first", prepared=(True, 0), on_dispatch=second.destroy).attach(context)
    second.attach(context)
    iterate(context)
    assert diary[2:] == ["first.dispatch", "second.finalize"]


def test_source_that_destroys_itself_is_finalized_after_its_dispatch(
    context: MainContext,
) -> None:
    diary: list[str] = []
    source = Probe(diary, "a", prepared=(True, 0))

    def end() -> None:
        source.destroy()
        diary.append("still here")

    source.on_dispatch = end
    source.attach(context)
    iterate(context)
    assert diary == ["a.prepare", "a.dispatch", "still here", "a.finalize"]


def test_sources_may_come_and_go_during_prepare(context: MainContext) -> None:
    diary: list[str] = []

    class Meddler(Source):
        def prepare(self) -> tuple[bool, int | None]:
            diary.append("meddler")
            self.destroy()
            gone.destroy()
            late.attach(context)
            early.attach(context)
            return False, None

    gone = Probe(diary, "gone")
    late = Probe(diary, "late", priority=1)
    early = Probe(diary, "early", priority=-1)
    Meddler().attach(context)
    gone.attach(context)
    stays = Probe(diary, "stays")
    stays.attach(context)
    context.acquire()
    context.prepare()
    context.release()
    assert diary == ["meddler", "gone.finalize", "stays.prepare", "late.prepare"]


def test_source_belongs_to_one_context_only(context: MainContext) -> None:
    source = Probe([], "a")
    assert source.attach(context) > 0
    with pytest.raises(AssertionError, match="attached already"):
        source.attach(context)
    source.destroy()
    source.destroy()
    unattached = Probe([], "b")
    unattached.destroy()
    with pytest.raises(AssertionError, match="destroyed"):
        unattached.attach(context)


def test_exception_in_dispatch_leaves_the_rest_for_the_next_iteration(
    context: MainContext,
) -> None:
    diary: list[str] = []

    def fail() -> None:
        raise ValueError("broken")

    broken = Probe(diary, "broken", prepared=(True, 0), on_dispatch=fail)
    broken.attach(context)
    Probe(diary, "b", prepared=(True, 0)).attach(context)
    with pytest.raises(ValueError, match="broken"):
        iterate(context)
    broken.destroy()
    diary.clear()
    iterate(context)
    assert diary == ["b.dispatch"]


# Descriptors


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_unix_fd_makes_its_source_ready(context: MainContext, pipe: tuple[int, int]) -> None:
    diary: list[str] = []
    source = Probe(diary, "a")
    poll_fd = source.add_unix_fd(pipe[0], select.POLLIN)
    source.attach(context)
    iterate(context)
    assert "a.dispatch" not in diary
    os.write(pipe[1], b"x")
    assert context.iteration(may_block=True)
    assert poll_fd.revents == select.POLLIN
    source.remove_unix_fd(poll_fd)
    assert not context.iteration(may_block=False)


def test_add_poll_is_polled_but_judged_by_check(
    context: MainContext, pipe: tuple[int, int]
) -> None:
    diary: list[str] = []
    source = Probe(diary, "a")
    poll_fd = PollFD(pipe[0], select.POLLIN)
    source.attach(context)
    source.add_poll(poll_fd)
    os.write(pipe[1], b"x")
    assert not context.iteration(may_block=True)
    assert poll_fd.revents == select.POLLIN
    source.remove_poll(poll_fd)


def test_one_descriptor_of_two_sources_is_polled_once_for_both(
    context: MainContext, pipe: tuple[int, int]
) -> None:
    reads, writes = Probe([], "reads"), Probe([], "writes", priority=5)
    read_fd = reads.add_unix_fd(pipe[0], select.POLLIN)
    write_fd = writes.add_unix_fd(pipe[0], select.POLLOUT | select.POLLERR)
    reads.attach(context)
    writes.attach(context)
    context.acquire()
    context.prepare()
    _, poll_fds = context.query(PRIORITY_LOWEST)
    (merged,) = [poll_fd for poll_fd in poll_fds if poll_fd.fd == pipe[0]]
    assert merged.events == select.POLLIN | select.POLLOUT
    assert not [fd for fd in context.query(-1)[1] if fd.fd == pipe[0]]
    assert [fd.events for fd in context.query(0)[1] if fd.fd == pipe[0]] == [select.POLLIN]
    merged.revents = select.POLLIN | select.POLLHUP
    context.query(PRIORITY_LOWEST)
    context.check(PRIORITY_LOWEST, [merged])
    assert read_fd.revents == select.POLLIN | select.POLLHUP
    assert write_fd.revents == select.POLLHUP
    context.release()


def test_check_gives_up_when_descriptors_changed_since_query(
    context: MainContext, pipe: tuple[int, int]
) -> None:
    diary: list[str] = []
    Probe(diary, "a", prepared=(True, 0)).attach(context)
    context.acquire()
    _, priority = context.prepare()
    _, poll_fds = context.query(priority)
    other = Probe(diary, "other")
    other.add_unix_fd(pipe[0], select.POLLIN)
    other.attach(context)
    assert not context.check(priority, poll_fds)
    context.release()
    assert context.iteration(may_block=False)


# Owners and threads


def test_context_is_owned_by_one_thread_at_a_time(context: MainContext) -> None:
    assert context.acquire()
    assert context.acquire()
    seen: list[bool] = []

    def elsewhere() -> None:
        seen.append(context.acquire())
        seen.append(context.iteration(may_block=False))
        seen.append(context.pending())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False, False, False]
    context.release()
    assert context.is_owner()
    context.release()
    assert not context.is_owner()
    with pytest.raises(AssertionError, match="own"):
        context.prepare()
    with pytest.raises(AssertionError, match="own"):
        context.release()


def test_blocking_iteration_waits_for_the_owner_to_release(context: MainContext) -> None:
    diary: list[str] = []
    Probe(diary, "a", prepared=(True, 0)).attach(context)
    context.acquire()
    thread = threading.Thread(target=lambda: context.iteration(may_block=True))
    thread.start()
    assert diary == []
    context.release()
    thread.join()
    assert diary == ["a.prepare", "a.dispatch"]


@pytest.mark.parametrize("how", ["wakeup", "attach", "ready time"])
def test_other_thread_ends_a_poll(context: MainContext, how: str) -> None:
    source = Probe([], "a")
    source.attach(context)
    polling = threading.Event()
    context.acquire()

    def elsewhere() -> None:
        polling.wait()
        if how == "wakeup":
            context.wakeup()
        elif how == "attach":
            Probe([], "b").attach(context)
        else:
            source.set_ready_time(0)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    polling.set()
    context.iteration(may_block=True)  # Without a wake-up it would sleep for ever.
    thread.join()
    context.release()


def test_main_loop_runs_until_quit(context: MainContext) -> None:
    loop = MainLoop(context)
    ran: list[bool] = []

    def dispatch() -> None:
        ran.append(loop.is_running())
        if len(ran) == 3:
            loop.quit()

    Probe([], "a", prepared=(True, 0), on_dispatch=dispatch).attach(context)
    loop.quit()
    loop.run()
    assert ran == [True] * 3
    assert not loop.is_running()
    assert not context.is_owner()


def test_quit_from_another_thread_ends_a_sleeping_loop(context: MainContext) -> None:
    loop = MainLoop(context)
    started = threading.Event()
    source = Probe([], "a", prepared=(True, 0))

    def dispatch() -> None:
        source.prepared = (False, None)
        started.set()

    source.on_dispatch = dispatch
    source.attach(context)

    def elsewhere() -> None:
        started.wait()
        loop.quit()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    loop.run()
    thread.join()


def test_quit_ends_a_run_that_waits_for_the_owner(context: MainContext) -> None:
    loop = MainLoop(context)
    context.acquire()
    thread = threading.Thread(target=loop.run)
    thread.start()
    while not loop.is_running():
        pass
    loop.quit()
    thread.join()
    context.release()


# An AioContext as a source


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
