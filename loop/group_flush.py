# SPDX-License-Identifier: Apache-2.0
"""One fdatasync for many flushes, and what to do after one fails.

At most one fdatasync of a file runs at a time. Flushes that arrive meanwhile can't use it (it may
have passed their data already), so they wait for the next one, all of them for the same: n clients
that flush at once cost two calls, not n. Databases call it group commit.

A failed fdatasync. The kernel reports a lost write once for each open file, marks the pages clean,
and the next fdatasync succeeds over data that never reached the disk. All clients of an export
share one open file, so the others would be told that their data is safe. Hence, where the page
cache lies in between (`sticky`), every flush after a failed one fails with the same errno until the
file is opened anew. `failed_errno` shows it; nothing else is remembered, and reads and writes go
on. Under O_DIRECT the data isn't in that cache: an error belongs to the flush that met it.

One at a time also means that no flush can overtake the failure of another.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from blockemu.loop.coroutine import Future

# Runs a function in a worker, and then hands its result or exception to the callback.
Submit = Callable[[Callable[[int], None], tuple[int], Callable[[Any], None]], None]


class GroupFlush:
    """The flushes of one open file. Context: home thread of the file's context."""

    __slots__ = ("_fd", "_path", "_running", "_waiting", "failed_errno", "sticky")

    def __init__(self, fd: int, path: str, *, sticky: bool) -> None:
        self._fd = fd
        self._path = path
        self.sticky = sticky
        self._running = False
        self._waiting: list[Future[None]] = []
        self.failed_errno = 0
        """Of the fdatasync after which this file can't promise anything; 0 for none."""

    async def flush(self, submit: Submit) -> None:
        """What was written before this call is on stable storage when it returns.

        Suspends: until an fdatasync that began after this call is done.
        Raises: OSError.
        """
        self._check()
        future: Future[None] = Future(shielded=True)
        self._waiting.append(future)
        if not self._running:
            self._start(submit)
        await future

    def _start(self, submit: Submit) -> None:
        batch, self._waiting = self._waiting, []
        self._running = True

        def finished(outcome: Any) -> None:
            self._running = False
            if isinstance(outcome, OSError):
                outcome = self._failed(outcome)
            if self._waiting:
                self._start(submit)
            for future in batch:
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(None)

        submit(os.fdatasync, (self._fd,), finished)

    def _failed(self, error: OSError) -> OSError:
        if self.sticky:
            self.failed_errno = error.errno or errno.EIO
            later, self._waiting = self._waiting, []
            for future in later:
                future.set_exception(self._earlier())
        return OSError(error.errno, error.strerror, self._path)

    def _check(self) -> None:
        if self.failed_errno:
            raise self._earlier()

    def _earlier(self) -> OSError:
        code = self.failed_errno
        reason = f"{os.strerror(code)} (an earlier flush failed; written data may be lost)"
        return OSError(code, reason, self._path)
