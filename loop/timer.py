# SPDX-License-Identifier: Apache-2.0
"""Timers: call this when the clock says so.

Each clock of a context has a TimerList: a heap of (deadline, sequence, timer). Re-arming or
cancelling leaves the old entry in the heap, where it is recognised by its sequence number and
thrown away when it comes up, or when such litter makes up more than half of the heap: arming is
then always O(log n), and a heap is at most twice as large as the number of armed timers (above a
small minimum).

Timers with one deadline run in the order in which they were armed. A timer that is armed while a
round runs its timers, for a time that has come already, waits for the next round: a timer that
re-arms itself for "now" can't stop the loop. Such entries are parked beside the heap until the
phase ends, where a nested poll, which is a round of its own, finds them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockemu.loop.clock import Clock

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

LITTER_MIN = 64
"""Dead entries below this number are not worth a clean-up."""


class TimerList:
    """All timers of one context on one clock. Context: home thread."""

    __slots__ = ("_heap", "_litter", "_parked", "_sequence", "clock")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._heap: list[tuple[int, int, Timer]] = []
        self._parked: list[tuple[int, int, Timer]] = []
        self._sequence = itertools.count(1)
        self._litter = 0

    def deadline_ns(self) -> int | None:
        """When the nearest timer is due, on this list's clock; None when none is armed."""
        if self._parked:
            self._unpark()
        heap = self._heap
        while heap:
            deadline_ns, sequence, timer = heap[0]
            if timer._sequence == sequence:
                return deadline_ns
            heapq.heappop(heap)
            self._litter -= 1
        return None

    def run(self, report: Callable[[str, Exception], None]) -> bool:
        """Call what is due. True when there was something."""
        deadline_ns = self.deadline_ns()
        if deadline_ns is None:
            return False
        now_ns = self.clock.now_ns()
        if deadline_ns > now_ns:
            return False
        heap = self._heap
        newest = next(self._sequence)
        try:
            while heap and heap[0][0] <= now_ns:
                entry = heapq.heappop(heap)
                _, sequence, timer = entry
                if timer._sequence != sequence:
                    self._litter -= 1
                elif sequence > newest:
                    self._parked.append(entry)
                else:
                    timer._sequence = 0
                    try:
                        timer._callback()
                    except Exception as error:
                        report(f"timer callback {timer._callback!r}", error)
        finally:
            self._unpark()
        return True

    def _unpark(self) -> None:
        while self._parked:
            heapq.heappush(self._heap, self._parked.pop())

    def _add(self, timer: Timer, deadline_ns: int) -> None:
        timer._sequence = sequence = next(self._sequence)
        heapq.heappush(self._heap, (deadline_ns, sequence, timer))

    def _forget(self, timer: Timer) -> None:
        timer._sequence = 0
        self._litter += 1
        if self._litter > LITTER_MIN and self._litter * 2 > len(self._heap):
            self._unpark()
            # In place: `run` may be walking this very list.
            self._heap[:] = [entry for entry in self._heap if entry[2]._sequence == entry[1]]
            heapq.heapify(self._heap)
            self._litter = 0


class Timer:
    """A callback with a deadline. Made by `AioContext.new_timer`; not armed at first.

    Context: home thread, all of it.
    """

    __slots__ = ("_callback", "_ctx", "_list", "_sequence")

    def __init__(self, ctx: AioContext, timers: TimerList, callback: Callable[[], None]) -> None:
        self._ctx = ctx
        self._list = timers
        self._callback = callback
        self._sequence = 0

    @property
    def armed(self) -> bool:
        """Whether the callback is still to come. False inside the callback, until armed again."""
        return self._sequence != 0

    def arm(self, deadline_ns: int) -> None:
        """Call back once the clock reaches `deadline_ns`, instead of what was armed before."""
        ctx = self._ctx
        ctx.assert_home()
        if self._sequence:
            self._list._forget(self)
        self._list._add(self, deadline_ns)
        if ctx._notify_me:
            ctx._notifier.set()  # The time-out of a main loop has been computed already.

    def cancel(self) -> None:
        """Don't call back. Fine when it isn't armed."""
        self._ctx.assert_home()
        if self._sequence:
            self._list._forget(self)
