# SPDX-License-Identifier: Apache-2.0
"""A whole daemon in a thread of the test process: real sockets, real files, no signals."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Self

from blockemu.config import DaemonConfig
from blockemu.daemon import Daemon
from blockemu.notify import Notify, no_notify

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0


class DaemonThread:
    """As a context manager: running on entry, stopped in good order on exit.

    Raises: on entry, what kept it from starting; on exit, what went wrong at its end.
    """

    def __init__(self, config: DaemonConfig, *, notify: Notify = no_notify) -> None:
        self._config = config
        self._notify = notify
        self._started: queue.SimpleQueue[list[str] | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="daemon under test")
        self._error: BaseException | None = None
        self.daemon: Daemon
        self.lines: list[str] = []

    @property
    def uris(self) -> list[str]:
        """The URI of each export, as announced."""
        return [line.split()[0] for line in self.lines]

    def __enter__(self) -> Self:
        self._thread.start()
        answer = self._started.get(timeout=READY_TIMEOUT_S)
        if isinstance(answer, BaseException):
            self._thread.join(STOP_TIMEOUT_S)
            raise answer
        self.lines = answer
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it, and wait until it has ended."""
        self.daemon.stop()
        self.join()

    def join(self) -> None:
        """Wait until it has ended. Raises: what it ended with."""
        self._thread.join(STOP_TIMEOUT_S)
        assert not self._thread.is_alive(), "the daemon doesn't end"
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _main(self) -> None:
        try:
            self.daemon = Daemon(self._config, notify=self._notify)
            self.daemon.run(on_ready=self._started.put)
        except BaseException as error:
            self._error = error
            self._started.put(error)
