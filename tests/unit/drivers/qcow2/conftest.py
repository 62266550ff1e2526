# SPDX-License-Identifier: Apache-2.0
"""Images in memory, for the tests of this folder."""

from __future__ import annotations

import pytest

from blockemu.loop.aio_context import AioContext
from tests.unit.drivers.qcow2.support import Images


@pytest.fixture
def images(ctx: AioContext) -> Images:
    return Images(ctx)
