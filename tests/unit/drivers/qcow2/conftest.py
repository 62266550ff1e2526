# SPDX-License-Identifier: Apache-2.0
"""Images in memory under a virtual clock, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import VirtualClock
from blockemu.loop.poller import MemoryPoller
from tests.unit.drivers.qcow2.support import Images


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    clock = VirtualClock()
    context = AioContext("simulated", clock=clock, poller=MemoryPoller(clock))
    context.adopt()
    yield context
    context.close()


@pytest.fixture
def images(ctx: AioContext) -> Images:
    return Images(ctx)
