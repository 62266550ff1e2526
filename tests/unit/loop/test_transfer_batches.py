# SPDX-License-Identifier: Apache-2.0
"""How requests are gathered into jobs, and what each of them is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockemu.loop import AioContext
from blockemu.loop.transfer_batches import BYTES_MAX, TransferBatches

BLOCK = 4096


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """16 blocks; block n is filled with byte n."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * BLOCK for number in range(16)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def jobs(epoll_ctx: AioContext, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each job has had."""
    counts: list[int] = []
    pool = epoll_ctx.thread_pool
    submit = pool.submit

    def counting(fn: Any, args: tuple[Any, ...], done: Any) -> None:
        counts.append(args[1])
        submit(fn, args, done)

    monkeypatch.setattr(pool, "submit", counting)
    return counts


def poll_until(ctx: AioContext, results: list[int], count: int) -> None:
    while len(results) < count:
        ctx.poll(blocking=True)


def test_requests_of_a_round_are_one_job(epoll_ctx: AioContext, fd: int, jobs: list[int]) -> None:
    writes = TransferBatches(is_write=True, requests_max=8)
    results: list[int] = []
    for number in range(5):
        view = memoryview(bytes([100 + number]) * BLOCK)
        writes.stage(epoll_ctx, fd, number * BLOCK, view, 0, results.append)
    assert jobs == []
    poll_until(epoll_ctx, results, 5)
    assert (jobs, results) == ([5], [BLOCK] * 5)
    assert os.pread(fd, 6 * BLOCK, 0)[::BLOCK] == bytes([100, 101, 102, 103, 104, 5])


def test_full_batch_leaves_at_once(epoll_ctx: AioContext, fd: int, jobs: list[int]) -> None:
    reads = TransferBatches(is_write=False, requests_max=4)
    views = [memoryview(bytearray(BLOCK)) for _ in range(9)]
    results: list[int] = []
    for number, view in enumerate(views):
        reads.stage(epoll_ctx, fd, number * BLOCK, view, 0, results.append)
    assert jobs == [4, 4]
    poll_until(epoll_ctx, results, 9)
    assert jobs == [4, 4, 1]
    assert [view[0] for view in views] == list(range(9))


def test_large_requests_are_jobs_of_their_own(
    epoll_ctx: AioContext, fd: int, jobs: list[int]
) -> None:
    writes = TransferBatches(is_write=True, requests_max=8)
    results: list[int] = []
    for _ in range(3):
        writes.stage(epoll_ctx, fd, 0, memoryview(bytes(BYTES_MAX)), 0, results.append)
    assert jobs == [1, 1, 1]
    poll_until(epoll_ctx, results, 3)


def test_batches_in_turn_wait_for_the_one_before(
    epoll_ctx: AioContext, fd: int, jobs: list[int]
) -> None:
    writes = TransferBatches(is_write=True, requests_max=8, in_turn=True)
    results: list[int] = []
    for number in range(4):
        view = memoryview(bytes([number]) * BYTES_MAX)
        writes.stage(epoll_ctx, fd, number * BYTES_MAX, view, 0, results.append)
    assert jobs == [1]
    poll_until(epoll_ctx, results, 4)
    assert (jobs, results) == ([1, 3], [BYTES_MAX] * 4)
    assert os.pread(fd, 4 * BYTES_MAX, 0)[::BYTES_MAX] == bytes(range(4))


def test_error_in_the_middle_stays_with_its_request(epoll_ctx: AioContext, fd: int) -> None:
    writes = TransferBatches(is_write=True, requests_max=8)
    results: list[int] = []
    for where in (fd, 12345, fd):
        writes.stage(epoll_ctx, where, 0, memoryview(b"w" * BLOCK), 0, results.append)
    poll_until(epoll_ctx, results, 3)
    assert results == [BLOCK, -errno.EBADF, BLOCK]


def test_read_goes_on_behind_what_is_there_up_to_the_end(epoll_ctx: AioContext, fd: int) -> None:
    reads = TransferBatches(is_write=False, requests_max=8)
    view = memoryview(bytearray(3 * BLOCK))
    results: list[int] = []
    reads.stage(epoll_ctx, fd, 14 * BLOCK, view, BLOCK, results.append)
    poll_until(epoll_ctx, results, 1)
    assert results == [2 * BLOCK]
    assert bytes(view[::BLOCK]) == bytes([0, 15, 0])


def test_done_that_raises_loses_no_other(epoll_ctx: AioContext, fd: int) -> None:
    """Not even with an exception handler that raises, which this context has."""
    writes = TransferBatches(is_write=True, requests_max=8)
    results: list[int] = []

    def broken(result: int) -> None:
        raise RuntimeError("broken")

    for done in (broken, results.append):
        writes.stage(epoll_ctx, fd, 0, memoryview(bytes(BLOCK)), 0, done)
    with pytest.raises(RuntimeError, match="broken"):
        poll_until(epoll_ctx, results, 1)
    poll_until(epoll_ctx, results, 1)
