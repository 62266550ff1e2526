# SPDX-License-Identifier: Apache-2.0
"""The choke point: ranges, alignment, read-modify-write, zeroes, FUA, permissions, drain."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Task
from tests.unit.drivers.conftest import ScriptedDriver, scripted_node


def settle(ctx: AioContext) -> None:
    while ctx.poll(blocking=False):
        pass


def release_all(ctx: AioContext, driver: ScriptedDriver, *tasks: Task[Any]) -> None:
    """Let gated calls through, oldest first, until all tasks are done."""
    while not all(task.done() for task in tasks):
        assert driver.waiting, "nothing to release: a task waits for something else"
        driver.waiting.pop(0).set_result(None)
        settle(ctx)


def test_aligned_request_reaches_the_driver_as_it_is(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx, alignment=512)
    ctx.run(node.pwritev(512, memoryview(b"a" * 1024)))
    assert driver.calls == [("write", 512, 1024)]


def test_unaligned_read_is_widened(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx, alignment=512)
    driver.content[1000:1003] = b"xyz"
    target = bytearray(3)
    ctx.run(node.preadv(1000, memoryview(target)))
    assert target == b"xyz"
    assert driver.calls == [("read", 512, 512)]


@pytest.mark.parametrize(
    ("offset", "length", "calls"),
    [
        (100, 10, [("read", 0, 512), ("write", 0, 512)]),
        (512, 10, [("read", 512, 512), ("write", 512, 512)]),
        (100, 924, [("read", 0, 512), ("write", 0, 1024)]),
        (100, 1000, [("read", 0, 512), ("read", 1024, 512), ("write", 0, 1536)]),
        (512, 600, [("read", 1024, 512), ("write", 512, 1024)]),
    ],
)
def test_unaligned_write_reads_only_the_blocks_it_keeps_bytes_of(
    ctx: AioContext, offset: int, length: int, calls: list[Any]
) -> None:
    node, driver = scripted_node(ctx, alignment=512)
    driver.content[:] = b"o" * len(driver.content)
    expected = bytearray(driver.content)
    expected[offset : offset + length] = b"n" * length
    ctx.run(node.pwritev(offset, memoryview(b"n" * length)))
    assert driver.calls == calls
    assert driver.content == expected


def test_write_that_ends_at_an_unaligned_end_isnt_widened_past_it(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx, size=1000, alignment=512)
    ctx.run(node.pwritev(990, memoryview(b"n" * 10)))
    assert driver.calls == [("read", 512, 512), ("write", 512, 488)]
    assert driver.content[990:] == b"n" * 10
    assert len(driver.content) == 1000


def test_overlapping_unaligned_writes_dont_lose_each_others_bytes(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx, alignment=512)
    driver.gated = True
    first = ctx.spawn(node.pwritev(10, memoryview(b"1")))
    second = ctx.spawn(node.pwritev(20, memoryview(b"2")))
    release_all(ctx, driver, first, second)
    assert driver.content[10:11] + driver.content[20:21] == b"12"


def test_aligned_write_waits_for_an_older_overlapping_unaligned_one(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx, alignment=512)
    driver.gated = True
    unaligned = ctx.spawn(node.pwritev(10, memoryview(b"1")))
    aligned = ctx.spawn(node.pwritev(0, memoryview(b"a" * 512)))
    elsewhere = ctx.spawn(node.pwritev(4096, memoryview(b"e" * 512)))
    settle(ctx)
    assert driver.calls == [("read", 0, 512), ("write", 4096, 512)]
    release_all(ctx, driver, unaligned, aligned, elsewhere)
    assert driver.content[:512] == b"a" * 512


@pytest.mark.parametrize("offset", [1024, 1030, 600])
def test_unaligned_write_short_of_a_ragged_end_keeps_the_size(ctx: AioContext, offset: int) -> None:
    """The rest of the last block was written, too, and the file grew to the whole block."""
    node, driver = scripted_node(ctx, size=1100, alignment=512)
    driver.content[:] = b"a" * 1100
    data = b"b" * (1060 - offset)
    ctx.run(node.pwritev(offset, memoryview(data)))
    assert driver.content == b"a" * offset + data + b"a" * 40


def test_aligned_write_waits_for_a_write_of_the_ragged_end_in_its_page(ctx: AioContext) -> None:
    """The ragged end goes through the page cache, which writes back whole pages."""
    node, driver = scripted_node(ctx, size=70_000, alignment=512)
    driver.gated = True
    tail = ctx.spawn(node.pwritev(69_990, memoryview(b"t" * 10)))
    in_its_page = ctx.spawn(node.pwritev(66_048, memoryview(b"a" * 512)))
    elsewhere = ctx.spawn(node.pwritev(0, memoryview(b"e" * 512)))
    settle(ctx)
    assert driver.calls == [("read", 69_632, 512), ("write", 0, 512)]
    release_all(ctx, driver, tail, in_its_page, elsewhere)
    assert driver.content[66_048:66_560] == b"a" * 512


def test_requests_past_the_end_fail_with_eio(ctx: AioContext) -> None:
    node, _ = scripted_node(ctx, size=4096)
    with pytest.raises(OSError) as caught:
        ctx.run(node.preadv(4090, memoryview(bytearray(10))))
    assert caught.value.errno == errno.EIO


def test_write_to_a_read_only_node_fails_with_eperm(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx, read_only=True)
    for attempt in (node.pwritev(0, memoryview(b"x")), node.pwrite_zeroes(0, 1)):
        with pytest.raises(OSError) as caught:
            ctx.run(attempt)
        assert caught.value.errno == errno.EPERM
    assert driver.calls == []


def test_zeroes_that_the_driver_cant_do_are_written(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx)
    driver.content[:] = b"o" * len(driver.content)
    ctx.run(node.pwrite_zeroes(5, 10))
    assert driver.content[4:16] == b"o" + bytes(10) + b"o"


def test_zeroes_without_fallback_fail_at_once(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx)
    with pytest.raises(OSError) as caught:
        ctx.run(node.pwrite_zeroes(0, 4096, RequestFlags.NO_FALLBACK))
    assert caught.value.errno == errno.ENOTSUP
    assert driver.calls == []


@pytest.mark.parametrize(("offset", "length"), [(5, 10), (500, 5000), (511, 514), (0, 5)])
def test_zeroes_without_fallback_change_nothing_when_they_fail(
    ctx: AioContext, offset: int, length: int
) -> None:
    """The ragged ends were written before the middle was found to be impossible."""
    node, driver = scripted_node(ctx, alignment=512)
    driver.content[:] = b"o" * len(driver.content)
    with pytest.raises(OSError) as caught:
        ctx.run(node.pwrite_zeroes(offset, length, RequestFlags.NO_FALLBACK))
    assert caught.value.errno == errno.ENOTSUP
    assert set(driver.content) == {ord("o")}


def test_zeroes_larger_than_the_buffer_are_written_in_parts(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx, size=3 << 20)
    driver.content[:] = b"o" * len(driver.content)
    ctx.run(node.pwrite_zeroes(1, (3 << 20) - 2))
    assert driver.content == b"o" + bytes((3 << 20) - 2) + b"o"
    assert max(call[2] for call in driver.calls) <= 1 << 20


def test_fua_is_a_flush_after_the_write(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx)
    ctx.run(node.pwritev(0, memoryview(b"x"), RequestFlags.FUA))
    assert driver.calls == [("write", 0, 1), ("flush",)]


def test_compressed_write_is_refused_by_a_driver_that_cant(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx)
    with pytest.raises(OSError, match="writes nothing compressed") as caught:
        ctx.run(node.pwritev(0, memoryview(b"x"), RequestFlags.WRITE_COMPRESSED))
    assert caught.value.errno == errno.ENOTSUP
    assert driver.calls == []
    assert node.in_flight == 0


def test_discard_passes_on_whole_blocks_only(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx, alignment=512)
    ctx.run(node.pdiscard(100, 1500))
    ctx.run(node.pdiscard(100, 500))
    assert driver.calls == [("discard", 512, 1024)]


def test_failed_request_isnt_in_flight_any_more(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx)

    async def fail(offset: int, view: memoryview) -> None:
        raise OSError(errno.EIO, "broken")

    driver.preadv = fail  # type: ignore[method-assign]
    with pytest.raises(OSError):
        ctx.run(node.preadv(0, memoryview(bytearray(1))))
    assert node.in_flight == 0


def test_two_writers_that_dont_share_are_refused(ctx: AioContext) -> None:
    node, _ = scripted_node(ctx)
    BlockBackend("first", node, writable=True)
    with pytest.raises(ImageError, match=r"scripted0: .*WRITE.*forbids"):
        BlockBackend("second", node, writable=True)
    assert len(node.parents) == 1


def test_reader_that_forbids_writes_keeps_a_writer_out(ctx: AioContext) -> None:
    node, _ = scripted_node(ctx)
    BlockBackend("reader", node, writable=False)
    with pytest.raises(ImageError):
        BlockBackend("writer", node, writable=True)
    BlockBackend("another reader", node, writable=False)


def test_child_without_write_permission_asserts(ctx: AioContext) -> None:
    node, _ = scripted_node(ctx)
    edge = BdrvChild(
        "file",
        node,
        parent=None,
        role=Role.DATA,
        perm=Permission.CONSISTENT_READ,
        shared=Permission.ALL,
    )
    with pytest.raises(AssertionError):
        edge.pwritev(0, memoryview(b"x"))


def test_drain_waits_for_requests_in_flight_and_keeps_new_ones_at_the_door(
    ctx: AioContext,
) -> None:
    node, driver = scripted_node(ctx)
    backend = BlockBackend("b", node, writable=True)
    driver.gated = True
    in_flight = ctx.spawn(backend.pwritev(0, memoryview(b"x")))
    drained = ctx.spawn(backend.drain())
    late = ctx.spawn(backend.pwritev(1, memoryview(b"y")))
    settle(ctx)
    assert not drained.done()
    assert driver.calls == [("write", 0, 1)]
    driver.gated = False
    driver.waiting.pop().set_result(None)
    settle(ctx)
    assert in_flight.done()
    assert drained.done()
    assert late.done()
    assert driver.calls == [("write", 0, 1), ("write", 1, 1)]


def test_drain_silences_external_fds_and_tells_the_user(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx)
    backend = BlockBackend("b", node, writable=True)
    told: list[str] = []
    backend.set_dev_ops(lambda: told.append("begin"), lambda: told.append("end"))
    driver.gated = True
    in_flight = ctx.spawn(backend.flush())
    drained = ctx.spawn(backend.drain())
    assert told == ["begin"]
    release_all(ctx, driver, in_flight, drained)
    assert told == ["begin", "end"]


def test_drain_that_is_cancelled_while_it_waits_opens_the_doors_again(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx)
    backend = BlockBackend("b", node, writable=True)
    driver.gated = True
    in_flight = ctx.spawn(backend.flush())
    drained = ctx.spawn(backend.drain())
    late = ctx.spawn(backend.flush())
    assert ctx.external_disabled
    drained.cancel()
    settle(ctx)
    assert drained.cancelled()
    assert not ctx.external_disabled
    release_all(ctx, driver, in_flight, late)


def test_backend_checks_size_and_right_to_write(ctx: AioContext) -> None:
    node, _ = scripted_node(ctx, size=4096)
    reader = BlockBackend("r", node, writable=False)
    for attempt, code in (
        (reader.preadv(4096, memoryview(bytearray(1))), errno.EINVAL),
        (reader.pwritev(0, memoryview(b"x")), errno.EPERM),
        (reader.pwritev(4096, memoryview(b"x")), errno.ENOSPC),
    ):
        with pytest.raises(OSError) as caught:
            ctx.run(attempt)
        assert caught.value.errno == code
