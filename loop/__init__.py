# SPDX-License-Identifier: Apache-2.0
"""Floor 1: the event loop, coroutines, threads, and host file I/O. It knows nothing of blocks.

Where to start reading: `aio_context` says what a round is; `bottom_half`, `timer`, `fd_handlers`
and `coroutine` are its parts; `poller` and `clock` are its seams. `iothread` runs a context in a
thread of its own, `main_context` runs several in one. The names below are the public face; the
parts for host files are imported from their own modules (`host_file`, `memory_file`, `buffers`,
`linux_aio`). Each is loaded when it is first asked for: a command that ends after a few
milliseconds needs few of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext
    from blockemu.loop.bottom_half import BH
    from blockemu.loop.clock import Clock, ClockType, HostClock, MonotonicClock, VirtualClock
    from blockemu.loop.coroutine import (
        Cancelled,
        Future,
        NotDoneError,
        Task,
        current_task,
        run_in_context,
        run_on_fresh_stack,
        settled,
    )
    from blockemu.loop.event_notifier import EventNotifier
    from blockemu.loop.iothread import IOThread
    from blockemu.loop.main_context import MainContext, MainLoop
    from blockemu.loop.poller import (
        EpollPoller,
        MemoryPoller,
        Poller,
        PollParams,
        SleepsForeverError,
    )
    from blockemu.loop.signals import SignalWatcher
    from blockemu.loop.source import PollFD, Source
    from blockemu.loop.sync import Event, Mutex, Semaphore, WaitQueue, gather, sleep_ns, yield_now
    from blockemu.loop.thread_pool import ThreadPool
    from blockemu.loop.timer import Timer

__all__ = [
    "BH",
    "AioContext",
    "Cancelled",
    "Clock",
    "ClockType",
    "EpollPoller",
    "Event",
    "EventNotifier",
    "Future",
    "HostClock",
    "IOThread",
    "MainContext",
    "MainLoop",
    "MemoryPoller",
    "MonotonicClock",
    "Mutex",
    "NotDoneError",
    "PollFD",
    "PollParams",
    "Poller",
    "Semaphore",
    "SignalWatcher",
    "SleepsForeverError",
    "Source",
    "Task",
    "ThreadPool",
    "Timer",
    "VirtualClock",
    "WaitQueue",
    "current_task",
    "gather",
    "run_in_context",
    "run_on_fresh_stack",
    "settled",
    "sleep_ns",
    "yield_now",
]

_MODULES = {
    "aio_context": ("AioContext",),
    "bottom_half": ("BH",),
    "clock": (
        "Clock",
        "ClockType",
        "HostClock",
        "MonotonicClock",
        "VirtualClock",
    ),
    "coroutine": (
        "Cancelled",
        "Future",
        "NotDoneError",
        "Task",
        "current_task",
        "run_in_context",
        "run_on_fresh_stack",
        "settled",
    ),
    "event_notifier": ("EventNotifier",),
    "iothread": ("IOThread",),
    "main_context": (
        "MainContext",
        "MainLoop",
    ),
    "poller": (
        "EpollPoller",
        "MemoryPoller",
        "Poller",
        "PollParams",
        "SleepsForeverError",
    ),
    "signals": ("SignalWatcher",),
    "source": (
        "PollFD",
        "Source",
    ),
    "sync": (
        "Event",
        "Mutex",
        "Semaphore",
        "WaitQueue",
        "gather",
        "sleep_ns",
        "yield_now",
    ),
    "thread_pool": ("ThreadPool",),
    "timer": ("Timer",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A name of the public face, from its own module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found
