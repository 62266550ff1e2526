# SPDX-License-Identifier: Apache-2.0
"""An IOThread is the home of its context from start to stop, and the kernel knows its name."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from blockemu.loop import AioContext, IOThread, PollParams
from blockemu.loop.iothread import default_poll_params


def test_iothread_is_home_of_its_context_and_runs_what_is_scheduled() -> None:
    iothread = IOThread("io0")
    seen: list[tuple[bool, AioContext | None]] = []
    done = threading.Event()

    def callback() -> None:
        seen.append((iothread.ctx.is_home(), AioContext.current()))
        done.set()

    iothread.ctx.schedule_oneshot(callback)  # Before the start: it is kept.
    iothread.start()
    done.wait()
    assert not iothread.ctx.is_home()
    iothread.stop()
    assert seen == [(True, iothread.ctx)]


def test_iothread_shows_its_name_to_the_kernel() -> None:
    iothread = IOThread("a-rather-long-iothread-name")
    iothread.start()
    comm = Path(f"/proc/self/task/{iothread.thread_id}/comm").read_text().rstrip()
    iothread.stop()
    assert comm == "a-rather-long-i"


def test_stop_joins_the_thread_and_closes_the_context() -> None:
    iothread = IOThread("io0")
    iothread.start()
    assert any(thread.name == "io0" for thread in threading.enumerate())
    iothread.stop()
    iothread.stop()
    assert iothread.ctx.closed
    assert not any(thread.name == "io0" for thread in threading.enumerate())


def test_stop_without_start_closes_the_context() -> None:
    iothread = IOThread("io0")
    assert iothread.thread_id is None
    iothread.stop()
    assert iothread.ctx.closed


def test_start_twice_is_refused() -> None:
    iothread = IOThread("io0")
    iothread.start()
    with pytest.raises(AssertionError, match="started already"):
        iothread.start()
    iothread.stop()


def test_stop_raises_what_ended_the_loop() -> None:
    def raise_it(what: str, error: Exception) -> None:
        raise error

    def broken() -> None:
        raise ValueError("broken")

    iothread = IOThread("io0")
    iothread.ctx.exception_handler = raise_it
    iothread.start()
    iothread.ctx.schedule_oneshot(broken)
    with pytest.raises(ValueError, match="broken"):
        iothread.stop()
    iothread.stop()


def test_context_factory_makes_the_context() -> None:
    made: list[AioContext] = []

    def factory(name: str) -> AioContext:
        made.append(AioContext(name))
        return made[0]

    iothread = IOThread("io7", context_factory=factory)
    assert iothread.ctx is made[0]
    assert iothread.ctx.name == "io7"
    iothread.stop()


def test_two_iothreads_pass_work_to_and_fro() -> None:
    one, two = IOThread("one"), IOThread("two")
    hops: list[str] = []
    done = threading.Event()

    def hop(mine: IOThread, other: IOThread, left: int) -> None:
        current = AioContext.current()
        assert current is mine.ctx
        hops.append(mine.name)
        if left:
            other.ctx.schedule_oneshot(lambda: hop(other, mine, left - 1))
        else:
            done.set()

    one.start()
    two.start()
    one.ctx.schedule_oneshot(lambda: hop(one, two, 999))
    done.wait()
    one.stop()
    two.stop()
    assert len(hops) == 1000


def test_native_waits_look_for_work_as_asked() -> None:
    iothread = IOThread("io0", poll_params=PollParams(max_ns=5000, grow=3, shrink=4))
    native = iothread.ctx.native
    iothread.start()
    try:
        assert iothread.poll_params == PollParams(max_ns=5000, grow=3, shrink=4)
        if native is not None:  # BLOCKEMU_NATIVE=0
            poll = native.handle
            assert (poll.poll_max_ns, poll.poll_grow, poll.poll_shrink) == (5000, 3, 4)
    finally:
        iothread.stop()


def test_on_one_core_it_does_not_look_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert default_poll_params().max_ns == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert default_poll_params().max_ns > 0
