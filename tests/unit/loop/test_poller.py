# SPDX-License-Identifier: Apache-2.0
"""What both pollers promise, and what is special about each."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from blockemu.loop import EpollPoller, MemoryPoller, Poller, SleepsForeverError, VirtualClock
from blockemu.loop.poller import TIMEOUT_NS_MAX

IN, OUT, HUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP


@dataclass
class Rig:
    """A poller and one descriptor that can be made readable, unreadable, and hung up."""

    poller: Poller
    fd: int
    make_readable: Callable[[], object]
    make_unreadable: Callable[[], object]
    hang_up: Callable[[], object]


def epoll_rig() -> Iterator[Rig]:
    poller = EpollPoller()
    near, far = socket.socketpair()
    yield Rig(
        poller,
        near.fileno(),
        lambda: far.send(b"x"),
        lambda: near.recv(1),
        far.close,
    )
    near.close()
    far.close()
    poller.close()


def memory_rig() -> Iterator[Rig]:
    poller = MemoryPoller(VirtualClock())
    poller.ready(7, OUT)
    yield Rig(
        poller,
        7,
        lambda: poller.ready(7, IN | OUT),
        lambda: poller.ready(7, OUT),
        lambda: poller.ready(7, IN | OUT | HUP),
    )
    poller.close()


@pytest.fixture(params=[epoll_rig, memory_rig], ids=["epoll", "memory"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    yield from request.param()


def test_wait_reports_only_what_was_asked_for(rig: Rig) -> None:
    rig.make_readable()
    assert rig.poller.wait(0) == []
    rig.poller.set_interest(rig.fd, IN)
    assert rig.poller.wait(0) == [(rig.fd, IN)]
    rig.poller.set_interest(rig.fd, OUT)
    assert rig.poller.wait(0) == [(rig.fd, OUT)]
    rig.poller.set_interest(rig.fd, IN | OUT)
    assert rig.poller.wait(0) == [(rig.fd, IN | OUT)]


def test_wait_reports_a_ready_descriptor_again_and_again(rig: Rig) -> None:
    rig.poller.set_interest(rig.fd, IN)
    rig.make_readable()
    assert rig.poller.wait(None) == rig.poller.wait(None) == [(rig.fd, IN)]
    rig.make_unreadable()
    assert rig.poller.wait(0) == []


def test_interest_zero_removes_the_descriptor(rig: Rig) -> None:
    rig.poller.set_interest(rig.fd, IN)
    rig.make_readable()
    rig.poller.set_interest(rig.fd, 0)
    rig.poller.set_interest(rig.fd, 0)
    assert rig.poller.wait(0) == []


def test_hang_up_is_reported_unasked(rig: Rig) -> None:
    rig.poller.set_interest(rig.fd, OUT)
    rig.hang_up()
    assert rig.poller.wait(0) == [(rig.fd, OUT | HUP)]


def test_wait_with_a_timeout_returns_nothing_when_it_is_up(rig: Rig) -> None:
    rig.poller.set_interest(rig.fd, IN)
    assert rig.poller.wait(1) == []


def test_negative_timeout_does_not_wait(rig: Rig) -> None:
    if isinstance(rig.poller, EpollPoller):
        assert rig.poller.wait(-5) == []


def test_odd_interest_is_refused(rig: Rig) -> None:
    with pytest.raises(AssertionError):
        rig.poller.set_interest(rig.fd, HUP)


def test_notifier_of_a_poller_wakes_it_from_another_thread(rig: Rig) -> None:
    poller = rig.poller
    if isinstance(poller, MemoryPoller):
        poller = MemoryPoller(VirtualClock(), threads_wait_s=30)
    notifier = poller.new_notifier()
    poller.set_interest(notifier.fd, IN)
    thread = threading.Thread(target=notifier.set)
    thread.start()
    assert poller.wait(None) == [(notifier.fd, IN)]
    thread.join()
    assert notifier.test_and_clear()
    poller.set_interest(notifier.fd, 0)
    notifier.close()


def test_closing_twice_is_fine(rig: Rig) -> None:
    rig.poller.close()
    rig.poller.close()


def test_epoll_fd_polls_readable_when_something_is_ready() -> None:
    for rig in epoll_rig():
        rig.poller.set_interest(rig.fd, IN)
        outer = select.poll()
        outer.register(rig.poller.fileno(), select.POLLIN)
        assert outer.poll(0) == []
        rig.make_readable()
        assert outer.poll(0) == [(rig.poller.fileno(), select.POLLIN)]


class CountingEpoll:
    """select.epoll with a diary."""

    def __init__(self) -> None:
        self.real = select.epoll()
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name in ("register", "modify", "unregister"):
            self.calls.append(name)
        return getattr(self.real, name)


def test_epoll_set_is_modified_only_when_interest_differs() -> None:
    for rig in epoll_rig():
        assert isinstance(rig.poller, EpollPoller)
        epoll = CountingEpoll()
        rig.poller._epoll.close()
        rig.poller._epoll = epoll  # type: ignore[assignment]
        for events in (IN, IN, IN | OUT, IN | OUT, 0, 0):
            rig.poller.set_interest(rig.fd, events)
        assert epoll.calls == ["register", "modify", "unregister"]


def test_epoll_survives_a_descriptor_that_was_closed_too_early() -> None:
    poller = EpollPoller()
    near, far = socket.socketpair()
    fd = near.fileno()
    poller.set_interest(fd, IN)
    near.close()
    poller.set_interest(fd, 0)
    again, other = socket.socketpair()
    assert again.fileno() == fd
    poller.set_interest(fd, IN)
    again.close()
    third, fourth = socket.socketpair()
    assert third.fileno() == fd
    poller.set_interest(fd, OUT)
    assert poller.wait(0) == [(fd, OUT)]
    for sock in (far, other, third, fourth):
        sock.close()
    poller.close()


def test_epoll_takes_any_timeout() -> None:
    for rig in epoll_rig():
        rig.poller.set_interest(rig.fd, OUT)
        assert rig.poller.wait(TIMEOUT_NS_MAX * 10**9) == [(rig.fd, OUT)]


def test_memory_poller_sleeps_by_moving_its_clock(
    poller: MemoryPoller, clock: VirtualClock
) -> None:
    assert poller.wait(12_345) == []
    assert clock.now_ns() == 12_345


def test_memory_poller_refuses_a_sleep_that_would_never_end(poller: MemoryPoller) -> None:
    with pytest.raises(SleepsForeverError):
        poller.wait(None)


def test_memory_poller_bounds_the_events_of_a_wait(poller: MemoryPoller) -> None:
    for fd in range(1000):
        poller.set_interest(fd, IN)
        poller.ready(fd, IN)
    assert len(poller.wait(0)) == 256
