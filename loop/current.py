# SPDX-License-Identifier: Apache-2.0
"""Which AioContext is running in this thread.

One thread may be home to several contexts (the main thread runs two), but it dispatches one at a
time; `running.ctx` is that one. It lies in a file of its own because coroutines need it and the
context needs coroutines.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext


class _Running(threading.local):
    ctx: AioContext | None = None


running = _Running()


def running_context() -> AioContext:
    """The context that runs in this thread.

    Raises: RuntimeError outside of any context's dispatch.
    """
    ctx = running.ctx
    if ctx is None:
        raise RuntimeError("no AioContext is running in this thread")
    return ctx


def is_only_thread() -> bool:
    """Whether the process has no other Python thread. Context: any thread."""
    return threading.active_count() == 1
