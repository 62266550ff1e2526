# SPDX-License-Identifier: Apache-2.0
"""A notifier is set or clear, whichever poller it wakes, and never writes to a stranger."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from blockemu.loop import EventNotifier, MemoryPoller
from blockemu.loop.poller import Notifier


@pytest.fixture(params=["eventfd", "memory"])
def notifier(request: pytest.FixtureRequest, poller: MemoryPoller) -> Iterator[Notifier]:
    made: Notifier = EventNotifier() if request.param == "eventfd" else poller.new_notifier()
    yield made
    made.close()


def test_notifier_is_clear_when_made(notifier: Notifier) -> None:
    assert not notifier.test_and_clear()


def test_notifier_many_sets_count_as_one(notifier: Notifier) -> None:
    notifier.set()
    notifier.set()
    assert notifier.test_and_clear()
    assert not notifier.test_and_clear()


def test_notifier_fd_polls_readable_only_while_set() -> None:
    notifier = EventNotifier()
    poll = select.poll()
    poll.register(notifier.fd, select.POLLIN)
    assert poll.poll(0) == []
    notifier.set()
    assert poll.poll(0) == [(notifier.fd, select.POLLIN)]
    notifier.test_and_clear()
    assert poll.poll(0) == []
    notifier.close()


def test_notifier_with_a_full_counter_stays_set() -> None:
    notifier = EventNotifier()
    os.eventfd_write(notifier.fd, 2**64 - 2)
    notifier.set()
    assert notifier.test_and_clear()
    notifier.close()


def test_notifier_set_after_close_writes_to_nobody() -> None:
    notifier = EventNotifier()
    fd = notifier.fd
    notifier.close()
    reused = os.eventfd(0, os.EFD_NONBLOCK)
    assert reused == fd
    notifier.set()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(reused)
    notifier.close()
    os.close(reused)
