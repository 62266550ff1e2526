# SPDX-License-Identifier: Apache-2.0
"""A backend that writes through: each write is on stable storage before it is acknowledged."""

from __future__ import annotations

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.loop.aio_context import AioContext
from tests.unit.drivers.conftest import scripted_node


@pytest.mark.parametrize("write_through", [False, True])
def test_each_write_is_flushed_if_written_through(ctx: AioContext, write_through: bool) -> None:
    node, driver = scripted_node(ctx)
    backend = BlockBackend("disk", node, writable=True, write_through=write_through)
    ctx.run(backend.pwritev(0, memoryview(bytes(512))))
    ctx.run(backend.pwrite_zeroes(512, 512))
    flushes = [call for call in driver.calls if call == ("flush",)]
    assert len(flushes) == (2 if write_through else 0)
    assert [call[0] for call in driver.calls if call[0] != "flush"] == ["write", "write"]
    if write_through:
        assert driver.calls[-1] == ("flush",)
    assert backend.direct_map is None
    ctx.run(backend.close())
