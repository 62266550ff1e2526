# SPDX-License-Identifier: Apache-2.0
"""Where computations run that take longer than a loop should wait: on the thread pool, or, in
simulations, where the same seed is to give the same run, in place.

Context: home thread of an AioContext.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from blockemu.loop.current import running_context

T = TypeVar("T")


class Offload(Protocol):
    """Runs `fn(*args)` and returns what it returns. Suspends: meanwhile. Raises: what `fn` does."""

    async def __call__(self, fn: Callable[..., T], *args: Any) -> T: ...


async def on_thread_pool(fn: Callable[..., T], *args: Any) -> T:
    """In a worker of the running context."""
    return await running_context().thread_pool.run(fn, *args)


async def in_place(fn: Callable[..., T], *args: Any) -> T:
    """Here and now."""
    return fn(*args)
