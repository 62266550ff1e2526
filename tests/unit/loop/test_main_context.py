# SPDX-License-Identifier: Apache-2.0
"""glib's rules for sources and iterations."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import pytest

from blockemu.loop import (
    MainContext,
    MainLoop,
    PollFD,
    Source,
    VirtualClock,
)
from blockemu.loop.main_context import PRIORITY_LOWEST
from blockemu.loop.source import PRIORITY_HIGH, PRIORITY_LOW


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
