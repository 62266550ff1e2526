# SPDX-License-Identifier: Apache-2.0
"""EventNotifier: a wake-up that is a file descriptor.

It is Linux's eventfd: any thread sets it, the thread that polls its descriptor wakes, and any
number of sets before the next clear count as one. Setting costs a system call and, if somebody
sleeps, a wake-up of another thread, which is a hundred times dearer; that is why AioContext sets
its own one only when `notify_me` says so (see aio_context.py).
"""

from __future__ import annotations

import os
import threading


class EventNotifier:
    """An eventfd: `fd` polls readable from `set()` until `test_and_clear()`."""

    __slots__ = ("_lock", "fd")

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Between a thread's look at `fd` and its write, another thread could close the descriptor
        # and open a disk image under the same number; eight stray bytes would land in the image.
        # Hence a lock, and a re-entrant one because a signal handler may interrupt `set()` and call
        # it.
        self._lock = threading.RLock()

    def set(self) -> None:
        """Make `fd` readable. After `close()` it does nothing.

        Context: any thread, and Python signal handlers.
        """
        with self._lock:
            if self.fd >= 0:
                try:
                    os.eventfd_write(self.fd, 1)
                except BlockingIOError:
                    pass  # The counter is full, so it is readable: as good as set.

    def test_and_clear(self) -> bool:
        """True when it was set; it isn't any more.

        Context: the thread that polls it.
        """
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Give the descriptor back. Closing twice is fine.

        Context: the thread that polls it.
        """
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
