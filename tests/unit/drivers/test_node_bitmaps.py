# SPDX-License-Identifier: Apache-2.0
"""Nodes mark what is written in the bitmaps that record, and no direct map leads past them."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockemu.drivers import bitmap_commands
from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.dirty_bitmap import DirtyBitmap
from blockemu.drivers.errors import ImageError
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.sync import yield_now
from tests.unit.drivers.conftest import ScriptedDriver, scripted_node

KIB = 1024


def recording(
    ctx: AioContext, *, alignment: int = 1
) -> tuple[BlockDriverState, ScriptedDriver, DirtyBitmap]:
    node, driver = scripted_node(ctx, alignment=alignment)
    return node, driver, ctx.run(bitmap_commands.add(node, "b", granularity=4 * KIB))


def write(ctx: AioContext, node: BlockDriverState, offset: int, length: int) -> None:
    ctx.run(node.pwritev(offset, memoryview(b"w" * length)))


@pytest.mark.parametrize("alignment", [1, 4096])
def test_write_zeroes_and_discard_are_marked(ctx: AioContext, alignment: int) -> None:
    node, _, bitmap = recording(ctx, alignment=alignment)
    write(ctx, node, 4 * KIB + 5, 10)
    ctx.run(node.pwrite_zeroes(16 * KIB, 5 * KIB))
    ctx.run(node.pdiscard(64 * KIB, 4 * KIB))
    ctx.run(node.preadv(128 * KIB, memoryview(bytearray(KIB))))
    wanted = [(4 * KIB, 4 * KIB), (16 * KIB, 8 * KIB), (64 * KIB, 4 * KIB)]
    assert list(bitmap.ranges()) == wanted


def test_discard_that_is_not_passed_on_marks_nothing(ctx: AioContext) -> None:
    node, _, bitmap = recording(ctx)
    node.unmap = False
    ctx.run(node.pdiscard(0, 64 * KIB))
    assert not bitmap.count()


def test_bit_cleared_while_a_write_is_under_way_is_set_again(ctx: AioContext) -> None:
    node, driver, bitmap = recording(ctx)
    driver.gated = True

    async def scenario() -> None:
        task = ctx.spawn(node.pwritev(0, memoryview(b"x" * KIB)))
        while not driver.waiting:
            await yield_now()
        bitmap.clear()
        driver.waiting.pop().set_result(None)
        await task
        assert bitmap.count() == 4 * KIB

    ctx.run(scenario())


def test_failed_write_is_marked(ctx: AioContext) -> None:
    node, driver, bitmap = recording(ctx)
    driver.gated = True

    async def scenario() -> None:
        task = ctx.spawn(node.pwritev(0, memoryview(b"x" * KIB)))
        while not driver.waiting:
            await yield_now()
        driver.waiting.pop().set_exception(OSError(5, "no"))
        with pytest.raises(OSError, match="no"):
            await task

    ctx.run(scenario())
    assert bitmap.count() == 4 * KIB


def test_disabled_bitmap_stays_as_it_is(ctx: AioContext) -> None:
    node, _, bitmap = recording(ctx)
    write(ctx, node, 0, KIB)
    ctx.run(bitmap_commands.disable(node, "b"))
    write(ctx, node, 64 * KIB, KIB)
    ctx.run(bitmap_commands.enable(node, "b"))
    write(ctx, node, 128 * KIB, KIB)
    assert list(bitmap.ranges()) == [(0, 4 * KIB), (128 * KIB, 4 * KIB)]
    ctx.run(bitmap_commands.remove(node, "b"))
    assert not node.dirty_bitmaps
    assert node.maps_writes


def test_names_that_are_wrong_are_refused(ctx: AioContext) -> None:
    node, _, bitmap = recording(ctx)
    for name, granularity, reason in (
        ("b", 512, "already exists: b"), ("", 512, "cannot be empty"),
        ("c", 256, "at least 512"), ("c", 1000, "power of 2"), ("c", 1 << 32, "2 GiB"),
        ("x" * 1024, 512, "too long"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=reason):
            ctx.run(bitmap_commands.add(node, name, granularity=granularity))
    with pytest.raises(ImageError, match="Can't store persistent bitmaps to scripted0"):
        ctx.run(bitmap_commands.add(node, "c", persistent=True))
    with pytest.raises(ImageError, match="'c' not found"):
        ctx.run(bitmap_commands.clear(node, "c"))
    bitmap.busy = True
    with pytest.raises(ImageError, match="currently in use by another operation"):
        ctx.run(bitmap_commands.remove(node, "b"))
    small, _ = scripted_node(ctx, size=KIB)
    other = ctx.run(bitmap_commands.add(small, "b"))
    bitmap.busy = False
    with pytest.raises(ImageError, match="different sizes"):
        ctx.run(bitmap_commands.merge(node, "b", other))


@pytest.mark.parametrize("on_file", [False, True], ids=["format", "file"])
def test_node_with_a_recording_bitmap_maps_no_writes(
    ctx: AioContext, opener: Opener, tmp_path: Path, on_file: bool
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    opener = Opener(files=opener.files, ctx=ctx)
    node = ctx.run(opener.open_image(str(path), fmt="raw", read_only=False, direct=False,
                                     aio="threads"))  # fmt: skip
    backend = BlockBackend("disk", node, writable=True)
    before = backend.direct_map
    assert before is not None
    assert before.lookup_write(0, 512) == 0
    marked = node.children["file"].node if on_file else node
    bitmap = ctx.run(bitmap_commands.add(marked, "b"))
    during = backend.direct_map
    assert during is not None
    assert before.lookup_write(0, 512) == -1
    assert during.lookup_write(0, 512) == -1
    assert during.lookup_read(0, 512) == 0
    ctx.run(backend.pwritev(0, memoryview(b"x")))
    assert bitmap.count() == 64 * KIB
    ctx.run(bitmap_commands.remove(marked, "b"))
    after = backend.direct_map
    assert after is not None
    assert after.lookup_write(0, 512) == 0
    ctx.run(backend.close())


def test_enabling_waits_for_writes_that_go_past_the_node(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    opener = Opener(files=opener.files, ctx=ctx)
    node = ctx.run(opener.open_image(str(path), fmt="raw", read_only=False, direct=False,
                                     aio="threads"))  # fmt: skip
    backend = BlockBackend("disk", node, writable=True)

    async def scenario() -> None:
        direct = backend.direct_map
        assert direct is not None
        pin = direct.pin()
        task = ctx.spawn(bitmap_commands.add(node, "b"))
        for _ in range(5):
            await yield_now()
        assert not task.done()
        direct.unpin(pin)
        await task

    ctx.run(scenario())
    ctx.run(backend.close())


def test_bitmap_grows_with_a_file_that_is_written_past_its_end(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"")
    opener = Opener(files=opener.files, ctx=ctx)
    node = ctx.run(opener.open({"driver": "file", "filename": str(path)}))
    bitmap = ctx.run(bitmap_commands.add(node, "b", granularity=4 * KIB))
    write(ctx, node, 8 * KIB, KIB)
    assert list(bitmap.ranges()) == [(8 * KIB, KIB)]
    ctx.run(node.truncate(4 * KIB))
    ctx.run(node.truncate(64 * KIB))
    assert not bitmap.count()
    ctx.run(node.close())
