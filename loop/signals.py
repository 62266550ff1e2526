# SPDX-License-Identifier: Apache-2.0
"""SignalWatcher: signals as events of an AioContext.

A signal handler in Python runs between two bytecodes of whatever the main thread is doing, and may
then break what it finds half done. So the handlers that are installed here do nothing; the
interpreter's C code writes the signal's number into a pipe (`signal.set_wakeup_fd`), which is
safe at any moment, and the loop reads it when its turn comes.

Signals and that wake-up descriptor belong to the process, so there can be one watcher at a time; a
second one finds the place taken and says so. `close()` puts back what was there before.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

READ_BYTES_MAX = 256
"""Signals taken per round; a byte each."""


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    """A handler must exist, or the signal's default action would end the process."""


class SignalWatcher:
    """Calls `callback(signum)` in `ctx` for each of `signals` that arrives.

    As the kernel does, it may merge equal signals that come in quick succession.
    Context: main thread, which is the home of `ctx`. The callback runs as an fd handler.
    Raises: RuntimeError when another watcher, or somebody else, has taken the wake-up descriptor.
    """

    def __init__(
        self,
        ctx: AioContext,
        signals: Iterable[signal.Signals],
        callback: Callable[[int], None],
    ) -> None:
        self._ctx = ctx
        self._callback = callback
        self._signals = frozenset(signals)
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closed = False
        # A full pipe means that many signals wait to be read: one more says nothing new.
        previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        if previous_fd != -1:
            signal.set_wakeup_fd(previous_fd)
            os.close(self._read_end)
            os.close(self._write_end)
            raise RuntimeError("signals are being watched already")
        self._previous: dict[int, Any] = {
            number: signal.signal(number, _do_nothing) for number in sorted(self._signals)
        }
        ctx.set_fd_handler(self._read_end, read=self._on_readable)

    def _on_readable(self) -> None:
        try:
            numbers = os.read(self._read_end, READ_BYTES_MAX)
        except BlockingIOError:
            return
        for number in numbers:
            # The wake-up descriptor hears of every signal that has a Python handler, SIGINT's too.
            if number in self._signals and not self._closed:
                self._callback(number)

    def close(self) -> None:
        """Handle the signals as before. Allowed from the callback. Twice is fine.

        Context: main thread.
        """
        if self._closed:
            return
        self._closed = True
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        self._ctx.set_fd_handler(self._read_end)
        os.close(self._read_end)
        os.close(self._write_end)
