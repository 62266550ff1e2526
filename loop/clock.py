# SPDX-License-Identifier: Apache-2.0
"""Clocks: where the loop gets the time from.

Time is a seam. Everything above this floor asks its AioContext for the time and arms timers on it,
so a test or a simulation that hands in a `VirtualClock` decides how fast time passes: a timer that
waits for an hour fires at once, and always in the same order. `time` is imported here and nowhere
else.

All clocks count whole nanoseconds in a Python int, so nothing is rounded and nothing wraps.
"""

from __future__ import annotations

import enum
import time
from typing import Protocol


class ClockType(enum.Enum):
    """Which clock a timer goes by.

    REALTIME never jumps and runs while guests or exports are paused: time-outs and retries.
    VIRTUAL is the devices' time. Nothing here stops it yet, so it reads as REALTIME does.
    HOST is the wall clock, which jumps when somebody sets it: only for what must match a calendar.
    """

    REALTIME = 0
    VIRTUAL = 1
    HOST = 2


class Clock(Protocol):
    """Anything that can say what time it is."""

    def now_ns(self) -> int:
        """Nanoseconds since some fixed moment.

        Context: any thread.
        """


class MonotonicClock:
    """The machine's monotonic clock: the one that a daemon runs by."""

    __slots__ = ()

    # A staticmethod of the C function itself: reading the clock costs no Python frame.
    now_ns = staticmethod(time.monotonic_ns)


class HostClock:
    """The wall clock, in nanoseconds since 1970."""

    __slots__ = ()

    now_ns = staticmethod(time.time_ns)


thread_cpu_ns = time.thread_time_ns
"""Nanoseconds of processor time that the calling thread has used: to measure how quick a
computation is here. Context: any thread."""


def local_time_text(seconds: int) -> str:
    """A moment of the wall clock, in seconds since 1970, as people here read it:
    `2024-02-29 23:59:59`, in the machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


class VirtualClock:
    """A clock that stands still until it is told to move. It starts at 0."""

    __slots__ = ("_now_ns",)

    def __init__(self) -> None:
        self._now_ns = 0

    def now_ns(self) -> int:
        """Nanoseconds since this clock was made.

        Context: any thread.
        """
        return self._now_ns

    def advance_ns(self, delta_ns: int) -> None:
        """Move forward by `delta_ns`, which may be 0.

        Raises: ValueError for a negative step; use `set_ns` to test clocks that jump.
        """
        if delta_ns < 0:
            raise ValueError(f"a clock does not advance by {delta_ns} ns")
        self._now_ns += delta_ns

    def set_ns(self, value_ns: int) -> None:
        """Jump to `value_ns`, backwards too: what setting the wall clock does."""
        self._now_ns = value_ns
