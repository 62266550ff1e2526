# SPDX-License-Identifier: Apache-2.0
"""The memory engine's own gifts: the log, faults, and latency on a virtual clock."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import VirtualClock
from blockemu.loop.memory_file import MemoryFile, MemoryFiles, Operation
from blockemu.loop.poller import MemoryPoller
from blockemu.loop.sync import gather


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def ctx(clock: VirtualClock) -> Iterator[AioContext]:
    ctx = AioContext("test", clock=clock, poller=MemoryPoller(clock))
    yield ctx
    ctx.close()


@pytest.fixture
def file(ctx: AioContext) -> Iterator[MemoryFile]:
    files = MemoryFiles()
    files.add("disk", bytes(64))
    file = files.open("disk", read_only=False, direct=False, aio="threads")
    file.attach(ctx)
    yield file
    file.close()


def test_log_tells_what_happened_in_order(ctx: AioContext, file: MemoryFile) -> None:
    async def use() -> None:
        await file.write(3, memoryview(b"abc"))
        await file.flush()
        await file.discard(0, 2)
        await file.write_zeroes(60, 10, unmap=True)
        await file.truncate(65)

    ctx.run(use())
    assert file.image.log == [
        Operation("write", 3, 3, b"abc"),
        Operation("flush", 0, 0),
        Operation("discard", 0, 2),
        Operation("zero", 60, 10),
        Operation("truncate", 0, 65),
    ]
    assert [operation.offset for operation in file.image.operations("write", "zero")] == [3, 60]


def test_fault_fails_operation_and_changes_nothing(ctx: AioContext, file: MemoryFile) -> None:
    file.image.fault = lambda kind, offset, length: errno.ENOSPC if kind == "write" else 0
    with pytest.raises(OSError) as caught:
        ctx.run(file.write(0, memoryview(b"abc")))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "disk")
    assert file.image.content == bytes(64)
    assert file.image.log == []
    ctx.run(file.flush())


def test_fault_enotsup_of_discard_is_swallowed(ctx: AioContext, file: MemoryFile) -> None:
    file.image.fault = lambda kind, offset, length: errno.ENOTSUP
    ctx.run(file.discard(0, 8))
    with pytest.raises(OSError):
        ctx.run(file.write_zeroes(0, 8, unmap=False))


def test_latency_lets_requests_overtake(
    ctx: AioContext, file: MemoryFile, clock: VirtualClock
) -> None:
    file.image.latency_ns = lambda kind, offset, length: 1_000_000_000 if offset == 0 else 1000
    assert not file.writes_inline

    async def use() -> None:
        await gather(file.write(0, memoryview(b"slow")), file.write(8, memoryview(b"fast")))

    ctx.run(use())
    assert [operation.data for operation in file.image.log] == [b"fast", b"slow"]
    assert clock.now_ns() == 1_000_000_000


def test_latency_none_makes_writes_inline_again(ctx: AioContext, file: MemoryFile) -> None:
    file.image.latency_ns = lambda kind, offset, length: 5
    file.image.latency_ns = None
    assert file.writes_inline
    assert file.start_write(0, memoryview(b"x"), lambda result: None) == 1


def test_two_opens_share_content(ctx: AioContext) -> None:
    files = MemoryFiles()
    one = files.open("new", read_only=False, direct=False, aio="native", create=True)
    two = files.open("new", read_only=True, direct=True, aio="native")
    one.attach(ctx)
    ctx.run(one.write(0, memoryview(b"shared")))
    assert two.size_bytes() == 6
    assert (one.request_alignment, two.request_alignment) == (1, 512)
    one.close()
    two.close()
