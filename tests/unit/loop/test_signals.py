# SPDX-License-Identifier: Apache-2.0
"""Signals arrive as calls from the loop, and all is as before once nobody watches."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from blockemu.loop import AioContext, SignalWatcher

WATCHED = (signal.SIGUSR1, signal.SIGUSR2)


def test_signal_calls_back_from_the_loop_not_from_the_handler(epoll_ctx: AioContext) -> None:
    seen: list[tuple[int, AioContext | None]] = []
    watcher = SignalWatcher(
        epoll_ctx, WATCHED, lambda signum: seen.append((signum, AioContext.current()))
    )
    os.kill(os.getpid(), signal.SIGUSR1)
    assert seen == []
    epoll_ctx.poll(blocking=True)
    os.kill(os.getpid(), signal.SIGUSR2)
    epoll_ctx.poll(blocking=True)
    assert seen == [(signal.SIGUSR1, epoll_ctx), (signal.SIGUSR2, epoll_ctx)]
    watcher.close()


def test_signal_ends_a_sleep(epoll_ctx: AioContext) -> None:
    seen: list[int] = []
    watcher = SignalWatcher(epoll_ctx, WATCHED, seen.append)
    thread = threading.Thread(
        target=lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    )
    thread.start()
    while not seen:
        epoll_ctx.poll(blocking=True)
    thread.join()
    watcher.close()


def test_other_signals_are_not_reported(epoll_ctx: AioContext) -> None:
    other_handled: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda signum, frame: other_handled.append(signum))
    watcher = SignalWatcher(
        epoll_ctx, (signal.SIGUSR1,), lambda signum: pytest.fail(f"reported {signum}")
    )
    os.kill(os.getpid(), signal.SIGUSR2)
    epoll_ctx.poll(blocking=True)
    assert other_handled == [signal.SIGUSR2]
    watcher.close()
    signal.signal(signal.SIGUSR2, previous)


def test_close_puts_the_handlers_back(epoll_ctx: AioContext) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    watcher = SignalWatcher(epoll_ctx, WATCHED, print)
    assert signal.getsignal(signal.SIGUSR1) is not before
    watcher.close()
    watcher.close()
    assert signal.getsignal(signal.SIGUSR1) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_close_from_the_callback_ends_the_reports(epoll_ctx: AioContext) -> None:
    seen: list[int] = []

    def callback(signum: int) -> None:
        seen.append(signum)
        watcher.close()

    watcher = SignalWatcher(epoll_ctx, WATCHED, callback)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR2)
    epoll_ctx.poll(blocking=True)
    assert len(seen) == 1


def test_second_watcher_is_refused_and_the_first_goes_on(epoll_ctx: AioContext) -> None:
    seen: list[int] = []
    watcher = SignalWatcher(epoll_ctx, WATCHED, seen.append)
    with pytest.raises(RuntimeError, match="watched already"):
        SignalWatcher(epoll_ctx, WATCHED, seen.append)
    os.kill(os.getpid(), signal.SIGUSR1)
    epoll_ctx.poll(blocking=True)
    assert seen == [signal.SIGUSR1]
    watcher.close()
