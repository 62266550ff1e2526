# SPDX-License-Identifier: Apache-2.0
"""Contexts in which time and descriptors are the test's, and one on the machine's own epoll."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from blockemu.loop import AioContext, MainContext, MemoryPoller, VirtualClock
from blockemu.loop.main_context import virtual_poll


def raise_it(what: str, error: Exception) -> None:
    """An exception handler: what goes wrong in a callback fails the test."""
    raise error


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def poller(clock: VirtualClock) -> MemoryPoller:
    return MemoryPoller(clock)


@pytest.fixture
def ctx(clock: VirtualClock, poller: MemoryPoller) -> Iterator[AioContext]:
    context = AioContext("test", clock=clock, poller=poller)
    context.exception_handler = raise_it
    yield context
    context.close()


@pytest.fixture
def epoll_ctx(clock: VirtualClock) -> Iterator[AioContext]:
    context = AioContext("epoll", clock=clock)
    context.exception_handler = raise_it
    yield context
    context.close()


@pytest.fixture
def context(clock: VirtualClock) -> Iterator[MainContext]:
    made = MainContext(clock=clock, poll=virtual_poll(clock))
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)
