# SPDX-License-Identifier: Apache-2.0
"""Linux AIO: batches, the queue of our own, errors, and callbacks that misbehave."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockemu.loop import linux_aio
from blockemu.loop._libaio import lib
from blockemu.loop.aio_context import AioContext
from blockemu.loop.buffers import Buffer
from blockemu.loop.linux_aio import AIO_MAX_BATCH, IO_CMD_PREAD, LinuxAio

BLOCK = 4096


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    ctx = AioContext("test")
    yield ctx
    ctx.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of 64 blocks; block n is filled with byte n."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * BLOCK for number in range(64)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


class CountingLibrary:
    """The C library, with io_submit's calls counted, or its answers made up."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.submits = 0
        self.reaps = 0
        self.refusals = 0
        """So many submits find no room."""

    def aio_queue_submit(self, queue: Any) -> int:
        self.submits += 1
        if self.refusals:
            self.refusals -= 1
            return 0
        return int(self._real.aio_queue_submit(queue))

    def aio_queue_reap(self, queue: Any) -> int:
        self.reaps += 1
        return int(self._real.aio_queue_reap(queue))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> CountingLibrary:
    library = CountingLibrary(lib)
    monkeypatch.setattr(linux_aio, "lib", library)
    return library


def poll_until(ctx: AioContext, condition: Callable[[], bool]) -> None:
    while not condition():
        ctx.poll(blocking=True)


def read_blocks(
    aio: LinuxAio, fd: int, numbers: range, done: Callable[[int], None]
) -> list[Buffer]:
    buffers = [Buffer(BLOCK) for _ in numbers]
    for buffer, number in zip(buffers, numbers, strict=True):
        offset = number * BLOCK
        aio.queue(IO_CMD_PREAD, fd, buffer.address, BLOCK, offset, done, view=buffer.view)
    return buffers


@pytest.mark.parametrize("user_ring", [True, False])
def test_read_moves_data(ctx: AioContext, fd: int, user_ring: bool) -> None:
    aio = LinuxAio(ctx, user_ring=user_ring)
    results: list[int] = []
    buffers = read_blocks(aio, fd, range(3, 6), results.append)
    poll_until(ctx, lambda: len(results) == 3)
    assert results == [BLOCK] * 3
    assert [buffer.view[0] for buffer in buffers] == [3, 4, 5]
    aio.close()


def test_write_moves_data(ctx: AioContext, fd: int) -> None:
    aio = LinuxAio(ctx)
    results: list[int] = []
    buffer = Buffer(BLOCK)
    buffer.view[:] = b"w" * BLOCK
    aio.queue_write(fd, buffer.address, BLOCK, 2 * BLOCK, results.append)
    poll_until(ctx, lambda: bool(results))
    assert os.pread(fd, BLOCK, 2 * BLOCK) == b"w" * BLOCK
    aio.close()


def test_done_never_runs_inside_queue(ctx: AioContext, fd: int) -> None:
    aio = LinuxAio(ctx)
    results: list[int] = []
    read_blocks(aio, fd, range(1), results.append)
    assert results == []
    poll_until(ctx, lambda: bool(results))
    aio.close()


def test_requests_of_a_round_leave_in_one_submit(
    ctx: AioContext, fd: int, library: CountingLibrary
) -> None:
    aio = LinuxAio(ctx)
    results: list[int] = []
    read_blocks(aio, fd, range(AIO_MAX_BATCH), results.append)
    poll_until(ctx, lambda: len(results) == AIO_MAX_BATCH)
    assert library.submits == 1
    aio.close()


def test_a_full_batch_leaves_before_the_round_ends(
    ctx: AioContext, fd: int, library: CountingLibrary
) -> None:
    aio = LinuxAio(ctx)
    results: list[int] = []
    read_blocks(aio, fd, range(2 * AIO_MAX_BATCH + 1), results.append)
    assert library.submits == 2
    assert results == []
    poll_until(ctx, lambda: len(results) == 2 * AIO_MAX_BATCH + 1)
    assert library.submits == 3
    aio.close()


def test_more_requests_than_slots_wait_their_turn(ctx: AioContext, fd: int) -> None:
    aio = LinuxAio(ctx, depth=2)
    results: list[int] = []
    buffers = read_blocks(aio, fd, range(50), results.append)
    assert aio.requests_in_flight == 50
    poll_until(ctx, lambda: len(results) == 50)
    assert [buffer.view[0] for buffer in buffers] == list(range(50))
    assert aio.requests_in_flight == 0
    aio.close()


def test_slots_are_reused_last_in_first_out(
    ctx: AioContext, fd: int, library: CountingLibrary
) -> None:
    aio = LinuxAio(ctx, depth=8)
    results: list[int] = []
    for count in range(1, 6):
        read_blocks(aio, fd, range(1), results.append)
        assert [slot for slot, request in enumerate(aio._requests) if request] == [0]
        while len(results) < count:
            ctx.poll(blocking=True)
    aio.close()


def test_full_ring_is_no_error_and_is_tried_again(
    ctx: AioContext, fd: int, library: CountingLibrary
) -> None:
    aio = LinuxAio(ctx)
    library.refusals = 3
    results: list[int] = []
    read_blocks(aio, fd, range(4), results.append)
    poll_until(ctx, lambda: len(results) == 4)
    assert results == [BLOCK] * 4
    assert library.submits == 4
    aio.close()


def test_request_that_io_submit_refuses_fails_alone(ctx: AioContext, fd: int) -> None:
    aio = LinuxAio(ctx)
    buffers = [Buffer(BLOCK) for _ in range(3)]
    results: list[list[int]] = [[], [], []]
    for buffer, where, result in zip(buffers, (fd, 12345, fd), results, strict=True):
        aio.queue_read(where, buffer.address, BLOCK, 0, result.append)
    poll_until(ctx, lambda: all(results))
    assert results == [[BLOCK], [-errno.EBADF], [BLOCK]]
    aio.close()


def test_short_read_goes_to_done_as_it_is(ctx: AioContext, fd: int) -> None:
    aio = LinuxAio(ctx)
    results: list[int] = []
    buffer = Buffer(2 * BLOCK)
    aio.queue_read(fd, buffer.address, 2 * BLOCK, 63 * BLOCK, results.append)
    poll_until(ctx, lambda: bool(results))
    assert results == [BLOCK]
    aio.close()


def test_short_read_goes_to_short_where_given(ctx: AioContext, fd: int) -> None:
    aio = LinuxAio(ctx)
    seen: list[tuple[int, int, int]] = []

    def short(offset: int, view: memoryview, result: int, done: Callable[[int], None]) -> None:
        seen.append((offset, len(view), result))
        done(-1)

    results: list[int] = []
    buffer = Buffer(2 * BLOCK)
    for offset in (63 * BLOCK, 0):
        aio.queue(
            IO_CMD_PREAD,
            fd,
            buffer.address,
            2 * BLOCK,
            offset,
            results.append,
            view=buffer.view,
            short=short,
        )
    poll_until(ctx, lambda: len(results) == 2)
    assert seen == [(63 * BLOCK, 2 * BLOCK, BLOCK)]
    assert sorted(results) == [-1, 2 * BLOCK]
    aio.close()


def test_done_may_queue_more(ctx: AioContext, fd: int) -> None:
    aio = LinuxAio(ctx, depth=2)
    buffer = Buffer(BLOCK)
    results: list[int] = []

    def again(result: int) -> None:
        results.append(result)
        if len(results) < 20:
            aio.queue_read(fd, buffer.address, BLOCK, 0, again)

    aio.queue_read(fd, buffer.address, BLOCK, 0, again)
    poll_until(ctx, lambda: len(results) == 20)
    aio.close()


def test_done_that_raises_is_reported_and_loses_no_other(ctx: AioContext, fd: int) -> None:
    errors: list[Exception] = []
    ctx.exception_handler = lambda what, error: errors.append(error)
    aio = LinuxAio(ctx, depth=4)
    results: list[int] = []

    def broken(result: int) -> None:
        results.append(result)
        raise RuntimeError("broken")

    buffers = read_blocks(aio, fd, range(10), broken)
    poll_until(ctx, lambda: len(results) == len(buffers))
    assert results == [BLOCK] * 10
    assert [str(error) for error in errors] == ["broken"] * 10
    aio.close()


def test_done_that_polls_gets_the_rest_of_its_batch(ctx: AioContext, fd: int) -> None:
    aio = LinuxAio(ctx)
    results: list[int] = []

    def waits_for_all(result: int) -> None:
        results.append(result)
        if len(results) == 1:
            poll_until(ctx, lambda: len(results) == 8)

    read_blocks(aio, fd, range(8), waits_for_all)
    poll_until(ctx, lambda: bool(results))
    assert results == [BLOCK] * 8
    aio.close()


def test_full_reap_comes_back_in_a_later_round(
    ctx: AioContext, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux_aio, "REAPS_PER_ROUND_MAX", 1)
    aio = LinuxAio(ctx, depth=1)
    results: list[int] = []
    read_blocks(aio, fd, range(5), results.append)
    poll_until(ctx, lambda: len(results) == 5)
    aio.close()


def test_close_refuses_while_in_flight(ctx: AioContext, fd: int) -> None:
    aio = LinuxAio(ctx)
    results: list[int] = []
    buffers = read_blocks(aio, fd, range(1), results.append)
    with pytest.raises(AssertionError, match="in flight"):
        aio.close()
    poll_until(ctx, lambda: len(results) == len(buffers))
    aio.close()
    aio.close()


def test_setup_beyond_the_hosts_limit_raises(ctx: AioContext) -> None:
    with pytest.raises(OSError, match="io_setup"):
        LinuxAio(ctx, depth=1 << 22)
