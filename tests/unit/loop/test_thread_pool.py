# SPDX-License-Identifier: Apache-2.0
"""The pool: where jobs run, how many threads there are, what close promises."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from blockemu.loop import AioContext, ThreadPool


@pytest.fixture
def pool(epoll_ctx: AioContext) -> Iterator[ThreadPool]:
    made = ThreadPool(epoll_ctx, workers_max=4)
    yield made
    made.close()


def poll_until(ctx: AioContext, results: list[Any], count: int) -> None:
    while len(results) < count:
        ctx.poll(blocking=True)


def test_run_returns_what_the_function_returns(epoll_ctx: AioContext, pool: ThreadPool) -> None:
    assert epoll_ctx.run(pool.run(divmod, 17, 5)) == (3, 2)


def test_run_raises_what_the_function_raises(epoll_ctx: AioContext, pool: ThreadPool) -> None:
    with pytest.raises(ZeroDivisionError):
        epoll_ctx.run(pool.run(divmod, 1, 0))


def test_function_runs_in_a_worker_and_completion_at_home(
    epoll_ctx: AioContext, pool: ThreadPool
) -> None:
    seen: list[int] = []
    pool.submit(threading.get_ident, (), seen.append)
    pool.submit(lambda: None, (), lambda result: seen.append(threading.get_ident()))
    poll_until(epoll_ctx, seen, 2)
    assert sorted(ident == threading.get_ident() for ident in seen) == [False, True]


def test_exception_is_handed_to_done_as_a_value(epoll_ctx: AioContext, pool: ThreadPool) -> None:
    seen: list[Any] = []

    def fail() -> None:
        raise OSError(28, "full")

    pool.submit(fail, (), seen.append)
    poll_until(epoll_ctx, seen, 1)
    assert isinstance(seen[0], OSError)


def test_done_that_raises_does_not_hide_other_completions(epoll_ctx: AioContext) -> None:
    reported: list[Exception] = []
    epoll_ctx.exception_handler = lambda what, error: reported.append(error)
    pool = ThreadPool(epoll_ctx, workers_max=1)
    seen: list[Any] = []

    def broken(result: int) -> None:
        raise ValueError("broken")

    pool.submit(int, (), broken)
    pool.submit(int, (), seen.append)
    poll_until(epoll_ctx, seen, 1)
    pool.close()
    assert [str(error) for error in reported] == ["broken"]


def test_workers_are_started_on_demand_up_to_the_bound(
    epoll_ctx: AioContext, pool: ThreadPool
) -> None:
    gate = threading.Event()
    seen: list[Any] = []
    assert pool.workers_count == 0
    for count in range(1, 8):
        pool.submit(gate.wait, (), seen.append)
        assert pool.workers_count == min(count, 4)
    gate.set()
    poll_until(epoll_ctx, seen, 7)
    assert pool.workers_count == 4


def test_jobs_of_one_worker_run_in_the_order_of_submission(epoll_ctx: AioContext) -> None:
    pool = ThreadPool(epoll_ctx, workers_max=1)
    ran: list[int] = []
    seen: list[int] = []

    def note(index: int, result: object) -> None:
        seen.append(index)

    for index in range(100):
        pool.submit(ran.append, (index,), partial(note, index))
    poll_until(epoll_ctx, seen, 100)
    pool.close()
    assert ran == seen == list(range(100))


def test_idle_worker_is_used_again(epoll_ctx: AioContext) -> None:
    pool = ThreadPool(epoll_ctx, workers_max=4)
    for _ in range(20):
        epoll_ctx.run(pool.run(int))
        while not pool._waiting:
            pass  # The worker is on its way to its sleep.
    assert pool.workers_count == 1
    pool.close()


def test_idle_worker_ends_after_its_time_and_another_is_started(epoll_ctx: AioContext) -> None:
    pool = ThreadPool(epoll_ctx, idle_timeout_s=0.001)
    for _ in range(3):
        assert epoll_ctx.run(pool.run(int, "7")) == 7
        for worker in list(pool._workers):
            worker.join()
        assert pool.workers_count == 0
        assert pool._waiting == 0
    pool.close()


@pytest.mark.parametrize("workers_max", [1, 3])
def test_jobs_never_hang_while_workers_come_and_go(epoll_ctx: AioContext, workers_max: int) -> None:
    pool = ThreadPool(epoll_ctx, workers_max=workers_max, idle_timeout_s=0.00001)
    for number in range(1000):
        assert epoll_ctx.run(pool.run(int, number)) == number
    pool.close()


def test_worker_takes_several_jobs_only_when_all_workers_are_busy(
    epoll_ctx: AioContext,
) -> None:
    pool = ThreadPool(epoll_ctx, workers_max=1)
    gate = threading.Event()
    seen: list[Any] = []
    pool.submit(gate.wait, (), seen.append)
    for _ in range(20):
        pool.submit(int, (), seen.append)
    gate.set()
    poll_until(epoll_ctx, seen, 21)
    pool.close()
    assert seen[1:] == [0] * 20


@pytest.mark.parametrize(
    ("workers", "waiting", "queued", "extra"),
    [(1, 0, 5, 0), (2, 0, 5, 2), (2, 3, 5, 1), (2, 5, 5, 0), (2, 0, 100, 7), (1, 0, 0, 0)],
    ids=["may start one", "share", "less those who wait", "all wait", "bound", "empty"],
)
def test_share_of_a_worker(
    epoll_ctx: AioContext, workers: int, waiting: int, queued: int, extra: int
) -> None:
    pool = ThreadPool(epoll_ctx, workers_max=2)
    pool._workers.update(threading.Thread() for _ in range(workers))
    pool._waiting, pool._queued = waiting, queued
    assert pool._extra_jobs() == extra
    pool._workers.clear()
    pool.close()


def test_job_does_not_lie_behind_a_busy_worker_while_another_may_be_started(
    epoll_ctx: AioContext, pool: ThreadPool
) -> None:
    """Three jobs wait for the fourth: with fewer than four workers this would hang."""
    seen: list[Any] = []

    def open_all(gates: list[threading.Event]) -> None:
        for gate in gates:
            gate.set()

    for _ in range(200):
        gates = [threading.Event() for _ in range(4)]
        seen.clear()
        for gate in gates[1:]:
            pool.submit(gate.wait, (20,), seen.append)
        pool.submit(partial(open_all, gates), (), seen.append)
        poll_until(epoll_ctx, seen, 4)
        assert seen.count(True) == 3


def test_system_without_threads_to_spare_is_survived(
    epoll_ctx: AioContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ThreadPool(epoll_ctx, workers_max=4)
    seen: list[Any] = []
    gate = threading.Event()
    pool.submit(gate.wait, (), seen.append)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    pool.submit(int, (), seen.append)
    assert pool.workers_count == 1
    gate.set()
    poll_until(epoll_ctx, seen, 2)
    with pytest.raises(RuntimeError, match="start new thread"):
        ThreadPool(epoll_ctx).submit(int, (), seen.append)
    pool.close()


def test_run_is_shielded_from_cancellation(epoll_ctx: AioContext, pool: ThreadPool) -> None:
    gate = threading.Event()
    ran: list[int] = []

    def job() -> None:
        gate.wait()
        ran.append(1)

    task = epoll_ctx.spawn(pool.run(job))
    task.cancel()
    epoll_ctx.poll(blocking=False)
    assert not task.done()
    gate.set()
    while not task.done():
        epoll_ctx.poll(blocking=True)
    assert task.cancelled()
    assert ran == [1]


def test_close_runs_what_is_queued_joins_and_delivers(epoll_ctx: AioContext) -> None:
    pool = ThreadPool(epoll_ctx, workers_max=2)
    seen: list[int] = []
    for _ in range(50):
        pool.submit(int, ("3",), seen.append)
    workers = list(pool._workers)
    pool.close()
    pool.close()
    assert seen == [3] * 50
    assert pool.workers_count == 0
    assert not any(worker.is_alive() for worker in workers)


def test_submit_after_close_is_refused(epoll_ctx: AioContext) -> None:
    pool = ThreadPool(epoll_ctx)
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.submit(int, (), print)


def test_submit_while_the_last_worker_leaves_starts_another(epoll_ctx: AioContext) -> None:
    pool = ThreadPool(epoll_ctx, workers_max=1, idle_timeout_s=30)
    epoll_ctx.run(pool.run(int))
    while not pool._waiting:
        pass  # The worker is on its way to its sleep.
    (worker,) = pool._workers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "current_thread", lambda: worker)
        assert pool._leave_if_unneeded()  # What the worker would do, at the worst moment.
    assert pool.workers_count == 0
    assert epoll_ctx.run(pool.run(int, "7")) == 7
    pool._queue.put(None)  # For the first one, which doesn't know that it has left.
    pool.close()
    worker.join()
