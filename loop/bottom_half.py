# SPDX-License-Identifier: Apache-2.0
"""Bottom halves: "call this soon, from the loop".

A BH is the loop's cheapest promise: after `schedule()`, by whichever thread, its callback runs once
in the home thread of its context. Any number of schedules before that run count as one. The order
is first scheduled, first run; one that is scheduled while a round runs its BHs (by itself, say)
waits for the next round, so that BHs can't starve file descriptors.

How a schedule can't get lost. The queue holds the BHs to look at, and `_queued` is a lock whose
only use is that trying to acquire it is an atomic test-and-set: held means "is in the queue". A
thread that schedules first sets the flag, then queues the BH unless it is queued. The loop first
marks it as no longer queued, then looks at the flag and clears it. So if the scheduler found it
still queued, the loop's look at the flag comes after the flag was set; and if the loop looked
before, the scheduler finds it not queued and queues it. The worst that can happen is a BH in the
queue whose flag is clear, and that one is skipped. `cancel()` relies on the same: it only clears
the flags.

Waking the sleeper is the second half of a schedule; see `AioContext.notify`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

IDLE_POLL_NS = 10_000_000
"""An idle BH waits for other work, but no longer than this."""


class BH:
    """A callback that any thread can schedule. Made by `AioContext.new_bh`."""

    __slots__ = ("_callback", "_ctx", "_deleted", "_idle", "_queued", "_urgent", "name")

    def __init__(self, ctx: AioContext, callback: Callable[[], None], name: str) -> None:
        self.name = name
        self._ctx = ctx
        self._callback = callback
        self._urgent = False
        self._idle = False
        self._deleted = False
        self._queued = threading.Lock()

    def schedule(self) -> None:
        """Run the callback in the next round. After `delete()` it does nothing.

        Context: any thread.
        """
        self._urgent = True
        self._enqueue()

    def schedule_idle(self) -> None:
        """Run the callback in the next round, but don't hurry: a sleep goes on, up to 10 ms.

        A BH that is scheduled both ways runs once, urgently.
        Context: any thread.
        """
        self._idle = True
        self._enqueue()

    def cancel(self) -> None:
        """Forget schedules that have not run yet.

        Context: the home thread gets a guarantee; another thread may come too late, or race with
        the next schedule.
        """
        self._urgent = False
        self._idle = False

    def delete(self) -> None:
        """Never run again. Allowed from inside its own callback. Twice is fine.

        Context: any thread, with `cancel`'s guarantee.
        """
        self._deleted = True
        self.cancel()

    @property
    def scheduled(self) -> bool:
        """Whether the callback is due to run, idly or not."""
        return self._urgent or self._idle

    def _enqueue(self) -> None:
        if self._deleted:
            self.cancel()
            return
        ctx = self._ctx
        if self._queued.acquire(blocking=False):
            ctx._bh_queue.append(self)
        if ctx._notify_me:
            ctx._notifier.set()

    def _take(self) -> Callable[[], None] | None:
        # Popped by the home thread. The order of these lines is the argument in the module's text.
        self._queued.release()
        if (self._urgent or self._idle) and not self._deleted:
            self._urgent = False
            self._idle = False
            return self._callback
        return None


class OneshotBH:
    """A BH that nobody can cancel: scheduled when it is made, gone when it has run."""

    __slots__ = ("_callback",)

    _urgent = True
    _idle = False

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback

    def _take(self) -> Callable[[], None]:
        return self._callback
