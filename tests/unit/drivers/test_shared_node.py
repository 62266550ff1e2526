# SPDX-License-Identifier: Apache-2.0
"""Several backends on one node: what each lets the others do, and one drained section for all."""

from __future__ import annotations

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.child import Permission
from blockemu.drivers.drain import DrainedSection
from blockemu.drivers.errors import ImageError
from blockemu.loop.aio_context import AioContext
from tests.unit.drivers.conftest import ScriptedDriver, scripted_node


def test_two_writers_share_a_node_only_if_both_let_the_other_write(ctx: AioContext) -> None:
    node, _ = scripted_node(ctx)
    first = BlockBackend("first", node, writable=True, shared=Permission.ALL)
    with pytest.raises(ImageError, match="forbids"):
        BlockBackend("selfish", node, writable=False)
    second = BlockBackend("second", node, writable=True, shared=Permission.ALL)
    ctx.run(second.pwritev(0, memoryview(b"shared")))
    view = memoryview(bytearray(6))
    ctx.run(first.preadv(0, view))
    assert bytes(view) == b"shared"
    ctx.run(first.close())
    ctx.run(second.close())


def test_a_hold_keeps_the_node_open_and_asks_for_nothing(ctx: AioContext) -> None:
    node, driver = scripted_node(ctx)
    hold = BlockBackend("hold", node, writable=False, reads=False, shared=Permission.ALL)
    user = BlockBackend("user", node, writable=True)
    ctx.run(user.close())
    assert node.parents == [hold.root]
    calls = len(driver.calls)
    ctx.run(hold.close())
    assert (node.parents, len(driver.calls)) == ([], calls)


def test_a_backend_that_joins_a_drained_node_is_quiet_until_the_section_ends(
    ctx: AioContext,
) -> None:
    """It came in through the open door and wrote while the graph was being changed."""
    node, driver = scripted_node(ctx)
    told: list[str] = []

    async def work() -> None:
        section = DrainedSection(node)
        await section.begin()
        late = BlockBackend("late", node, writable=True)
        late.set_dev_ops(lambda: told.append("begin"), lambda: told.append("end"))
        write = ctx.spawn(late.pwritev(0, memoryview(b"x")))
        assert told == ["begin"]
        assert driver.calls == []
        section.leave_context()
        section.end()
        await write
        assert told == ["begin", "end"]
        await late.close()

    ctx.run(work())
    assert driver.calls[0][0] == "write"


def test_a_backend_that_leaves_a_drained_node_does_not_wait_for_itself(ctx: AioContext) -> None:
    node, _ = scripted_node(ctx)
    stays = BlockBackend("stays", node, writable=False, shared=Permission.ALL)
    leaves = BlockBackend("leaves", node, writable=False, shared=Permission.ALL)

    async def work() -> None:
        section = DrainedSection(node)
        await section.begin()
        closing = ctx.spawn(leaves.close())
        section.leave_context()
        section.end()
        await closing

    ctx.run(work())
    assert node.parents == [stays.root]
    assert isinstance(node.driver, ScriptedDriver)
    ctx.run(stays.close())
