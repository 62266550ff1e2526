# SPDX-License-Identifier: Apache-2.0
"""Maps that are made while something runs that they mustn't cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.drain import DrainedSection
from blockemu.drivers.map_slot import MapSlot
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.img.create import CreateRequest, create_image
from blockemu.loop.aio_context import AioContext
from blockemu.loop.host_file import PosixFiles
from tests.unit.drivers.conftest import scripted_node
from tests.unit.drivers.test_direct_map import make_map
from tests.unit.drivers.test_node import release_all, settle

MIB = 1 << 20


def test_map_that_is_made_during_an_unaligned_write_is_held(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx, alignment=512)
    driver.gated = True
    older, newer = make_map(), make_map()
    for direct_map in (older, newer):
        direct_map.publish(0, 0, writable=True)
    node.add_map(older)
    write = ctx.spawn(node.pwritev(100, memoryview(b"x")))
    settle(ctx)
    assert older.lookup_read(0, 512) == -1
    node.add_map(newer)
    assert newer.lookup_read(0, 512) == -1
    release_all(ctx, driver, write)
    assert older.lookup_read(0, 512) == 0
    assert newer.lookup_read(0, 512) == 0


def open_node(ctx: AioContext, path: Path, fmt: str) -> BlockDriverState:
    create_image(CreateRequest.from_user(str(path), str(MIB), fmt=fmt))
    file = {"driver": "file", "filename": str(path)}
    options = file if fmt == "file" else {"driver": fmt, "file": file}
    node = ctx.run(Opener(files=PosixFiles(), ctx=ctx).open(options))
    assert isinstance(node, BlockDriverState)
    return node


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_no_map_is_made_of_the_old_size_during_a_resize(
    ctx: AioContext, tmp_path: Path, fmt: str
) -> None:
    node = open_node(ctx, tmp_path / "disk", fmt)
    backend = BlockBackend("disk", node, writable=True)
    assert backend.direct_map is not None
    resize = ctx.spawn(node.truncate(2 * MIB))
    seen = []
    while not resize.done():
        seen.append(backend.direct_map)
        ctx.poll(blocking=True)
    assert seen
    assert not any(seen)
    direct_map = backend.direct_map
    assert direct_map is not None
    assert direct_map._length == 2 * MIB
    ctx.run(backend.close())


def test_a_drained_backend_gives_no_map(ctx: AioContext, tmp_path: Path) -> None:
    node = open_node(ctx, tmp_path / "disk", "raw")
    backend = BlockBackend("disk", node, writable=True)

    async def drop_in_a_drained_section() -> None:
        async with DrainedSection(node):
            await node.driver.drop_direct_map()  # type: ignore[attr-defined]
            assert backend.direct_map is None

    ctx.run(drop_in_a_drained_section())
    assert backend.direct_map is not None
    ctx.run(backend.close())


def test_slot_without_a_map_to_make_has_none(ctx: AioContext) -> None:
    slot = MapSlot(lambda: None)
    assert slot.get() is None
    ctx.run(slot.drop())
