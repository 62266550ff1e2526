# SPDX-License-Identifier: Apache-2.0
"""Flushes that share an fdatasync, and what is left after one fails."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from blockemu.loop.aio_context import AioContext
from blockemu.loop.group_flush import GroupFlush


class Disk:
    """Takes fdatasync calls, and finishes them when the test says so."""

    def __init__(self) -> None:
        self.pending: list[Callable[[Any], None]] = []
        self.calls = 0

    def submit(
        self, fn: Callable[[int], None], args: tuple[int], done: Callable[[Any], None]
    ) -> None:
        self.calls += 1
        self.pending.append(done)

    def finish(self, outcome: Any = None) -> None:
        self.pending.pop(0)(outcome)


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    ctx = AioContext("test")
    yield ctx
    ctx.close()


def outcomes(ctx: AioContext, tasks: list[Any]) -> list[int]:
    """0 or the errno of each task, -1 for one that isn't done."""
    ctx.poll(blocking=False)
    found = []
    for task in tasks:
        if not task.done():
            found.append(-1)
            continue
        error = task.exception()
        assert error is None or isinstance(error, OSError)
        found.append(0 if error is None else error.errno or -2)
    return found


def test_flushes_during_a_sync_share_the_next_one(ctx: AioContext) -> None:
    disk, flushes = Disk(), GroupFlush(0, "file", sticky=True)
    tasks = [ctx.spawn(flushes.flush(disk.submit)) for _ in range(4)]
    assert disk.calls == 1
    disk.finish()
    assert outcomes(ctx, tasks) == [0, -1, -1, -1]
    assert disk.calls == 2
    disk.finish()
    assert outcomes(ctx, tasks) == [0, 0, 0, 0]
    assert disk.calls == 2


def test_flush_after_quiet_starts_at_once(ctx: AioContext) -> None:
    disk, flushes = Disk(), GroupFlush(0, "file", sticky=True)
    for calls in (1, 2):
        task = ctx.spawn(flushes.flush(disk.submit))
        assert disk.calls == calls
        disk.finish()
        assert outcomes(ctx, [task]) == [0]


def test_failure_through_page_cache_stays(ctx: AioContext) -> None:
    disk, flushes = Disk(), GroupFlush(0, "file", sticky=True)
    tasks = [ctx.spawn(flushes.flush(disk.submit)) for _ in range(3)]
    disk.finish(OSError(errno.EIO, "I/O error"))
    tasks.append(ctx.spawn(flushes.flush(disk.submit)))
    assert outcomes(ctx, tasks) == [errno.EIO] * 4
    assert disk.calls == 1
    assert flushes.failed_errno == errno.EIO
    error = tasks[0].exception()
    assert isinstance(error, OSError)
    assert error.filename == "file"


def test_failure_of_direct_file_is_reported_once(ctx: AioContext) -> None:
    disk, flushes = Disk(), GroupFlush(0, "file", sticky=False)
    tasks = [ctx.spawn(flushes.flush(disk.submit)) for _ in range(2)]
    disk.finish(OSError(errno.ENOSPC, "full"))
    disk.finish()
    assert outcomes(ctx, tasks) == [errno.ENOSPC, 0]
    assert flushes.failed_errno == 0


def test_flush_that_the_kernel_refuses_reports_errno(ctx: AioContext) -> None:
    flushes = GroupFlush(12345, "file", sticky=False)
    with pytest.raises(OSError) as caught:
        ctx.run(flushes.flush(ctx.thread_pool.submit))
    assert caught.value.errno == errno.EBADF
