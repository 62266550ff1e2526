# SPDX-License-Identifier: Apache-2.0
"""IOThread: a thread whose only work is to run one AioContext.

It exists so that the I/O of one export doesn't wait for the main loop's work, or for another
export's. The kernel knows the thread by its name too: `top -H` and `perf` show which one is busy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from blockemu.loop.aio_context import AioContext
from blockemu.loop.poller import PollParams

KERNEL_NAME_MAX = 15
"""Bytes of a thread's name that the kernel keeps."""


POLL_MAX_NS = 100_000
"""How long to look for work by default. On a virtual machine QEMU's 32768 ns end before a client
that waits for one reply at a time has even woken up, which takes 40 us and more; then its next
request finds us asleep. Measured with one such client on two cores: 2.4 times the IOPS of 32768 ns,
for the same CPU time per request; with clients that keep both cores busy, no loss."""


def default_poll_params() -> PollParams:
    """Those of an IOThread on this machine: on one core, looking keeps the work from being made."""
    return PollParams(max_ns=POLL_MAX_NS if len(os.sched_getaffinity(0)) > 1 else 0)


class IOThread:
    """A thread that polls `ctx` from `start()` to `stop()`.

    `ctx` exists from the beginning, so BHs may be scheduled before the start. `stop()` closes it.
    Context: any one thread makes, starts and stops it.
    """

    def __init__(
        self,
        name: str,
        *,
        context_factory: Callable[[str], AioContext] = AioContext,
        poll_params: PollParams | None = None,
    ) -> None:
        self.name = name
        self.poll_params = poll_params or default_poll_params()
        self.ctx = context_factory(name)
        self._stopping = False
        self._error: BaseException | None = None
        self._running = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def thread_id(self) -> int | None:
        """The kernel's id of the thread; None before the start."""
        return self._thread.native_id if self._thread is not None else None

    def start(self) -> None:
        """Start the thread, and return once it is home of `ctx`."""
        assert self._thread is None, f"iothread {self.name} is started already"
        # A daemon thread, lest a main thread that fails on its way to `stop()` hangs at its exit.
        self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        self._thread.start()
        self._running.wait()

    def stop(self) -> None:
        """End the loop after the round that it is in, and wait for the thread. Twice is fine.

        What its context still has to do is dropped, so its users must have left before.
        Raises: what made the loop end by itself, if something did.
        """
        thread = self._thread
        if thread is None:
            self.ctx.close()
            return
        assert thread is not threading.current_thread(), "an iothread can't wait for itself"
        if thread.is_alive():
            self.ctx.schedule_oneshot(self._stop_at_home)
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _stop_at_home(self) -> None:
        self._stopping = True

    def _main(self) -> None:
        ctx = self.ctx
        ctx.adopt()
        ctx.set_poll_params(self.poll_params)
        _set_kernel_name(self.name)
        self._running.set()
        try:
            ctx.run_until(lambda: self._stopping)
        except BaseException as error:
            self._error = error
        finally:
            ctx.close()


def _set_kernel_name(name: str) -> None:
    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    try:
        comm.write_bytes(name.encode()[:KERNEL_NAME_MAX])
    except OSError:
        pass  # No /proc here. The name is a courtesy.
