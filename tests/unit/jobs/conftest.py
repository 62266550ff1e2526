# SPDX-License-Identifier: Apache-2.0
"""Images in memory, on a virtual clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import VirtualClock
from blockemu.loop.poller import MemoryPoller
from tests.unit.drivers.qcow2.support import Images


@pytest.fixture
def images() -> Iterator[Images]:
    clock = VirtualClock()
    ctx = AioContext("simulated", clock=clock, poller=MemoryPoller(clock))
    ctx.adopt()
    yield Images(ctx)
    ctx.close()
