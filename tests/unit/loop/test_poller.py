# SPDX-License-Identifier: Apache-2.0
"""What all pollers promise, and what is special about each. test_native_poll.py has more."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockemu.loop import EpollPoller, MemoryPoller, Poller, SleepsForeverError, VirtualClock
from blockemu.loop.native_poller import NativePoller
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
    yield from kernel_rig(EpollPoller())


def native_rig() -> Iterator[Rig]:
    yield from kernel_rig(NativePoller())


def kernel_rig(poller: Poller) -> Iterator[Rig]:
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


@pytest.fixture(params=[epoll_rig, native_rig, memory_rig], ids=["epoll", "native", "memory"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    yield from request.param()


@pytest.fixture(params=[epoll_rig, native_rig], ids=["epoll", "native"])
def real_rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A poller that sleeps in the kernel, and a socket."""
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


def test_negative_timeout_does_not_wait(real_rig: Rig) -> None:
    assert real_rig.poller.wait(-5) == []


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


def test_closed_poller_has_no_descriptor(real_rig: Rig) -> None:
    real_rig.poller.close()
    with pytest.raises(ValueError, match="closed"):
        real_rig.poller.fileno()
    with pytest.raises(ValueError, match="closed"):
        real_rig.poller.wait(0)


def test_idle_poller_has_no_work_of_its_own(rig: Rig) -> None:
    rig.poller.set_interest(rig.fd, IN)
    rig.make_readable()
    rig.poller.set_external_silent(True)
    rig.poller.set_external_silent(False)
    assert not rig.poller.has_work()
    assert rig.poller.wait(0) == [(rig.fd, IN)]


def test_descriptor_that_cannot_be_polled_is_refused(real_rig: Rig, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(PermissionError):
            real_rig.poller.set_interest(file.fileno(), IN)
        real_rig.poller.set_interest(file.fileno(), 0)


def test_epoll_fd_polls_readable_when_something_is_ready(real_rig: Rig) -> None:
    real_rig.poller.set_interest(real_rig.fd, IN)
    outer = select.poll()
    outer.register(real_rig.poller.fileno(), select.POLLIN)
    assert outer.poll(0) == []
    real_rig.make_readable()
    assert outer.poll(0) == [(real_rig.poller.fileno(), select.POLLIN)]


def test_epoll_bounds_the_events_of_a_wait(real_rig: Rig) -> None:
    fds = [os.eventfd(1) for _ in range(300)]
    for fd in fds:
        real_rig.poller.set_interest(fd, IN)
    first, second = real_rig.poller.wait(None), real_rig.poller.wait(None)
    assert len(first) == len(second) == 256
    assert {fd for fd, _ in first + second} == set(fds)
    for fd in fds:
        real_rig.poller.set_interest(fd, 0)
        os.close(fd)


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


def test_epoll_survives_a_descriptor_that_was_closed_too_early(real_rig: Rig) -> None:
    poller = real_rig.poller
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


def test_epoll_takes_any_timeout(real_rig: Rig) -> None:
    real_rig.poller.set_interest(real_rig.fd, OUT)
    assert real_rig.poller.wait(TIMEOUT_NS_MAX * 10**9) == [(real_rig.fd, OUT)]


def test_epoll_goes_on_waiting_after_a_signal(real_rig: Rig) -> None:
    """PEP 475: Python's handler runs, then the wait goes on."""
    signals: list[int] = []

    def handle(number: int, frame: object) -> None:
        signals.append(number)
        if len(signals) == 3:
            real_rig.make_readable()

    done = threading.Event()

    def send() -> None:
        while not done.wait(0.001):
            os.kill(os.getpid(), signal.SIGUSR1)

    real_rig.poller.set_interest(real_rig.fd, IN)
    previous = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        assert real_rig.poller.wait(30 * 10**9) == [(real_rig.fd, IN)]
        real_rig.make_unreadable()
        signals.clear()
        assert real_rig.poller.wait(None) == [(real_rig.fd, IN)]
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, previous)


def test_exception_of_a_signal_handler_leaves_the_wait(real_rig: Rig) -> None:
    def interrupt(number: int, frame: object) -> None:
        done.set()
        raise KeyboardInterrupt

    done = threading.Event()

    def send() -> None:
        while not done.wait(0.001):
            os.kill(os.getpid(), signal.SIGUSR1)

    def start_and_wait() -> None:
        thread.start()
        real_rig.poller.wait(None)

    previous = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=send)
    try:
        with pytest.raises(KeyboardInterrupt):
            start_and_wait()
    finally:
        # One more may be on its way.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        thread.join()
        signal.signal(signal.SIGUSR1, previous)


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
