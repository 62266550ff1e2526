# SPDX-License-Identifier: Apache-2.0
"""A server that goes to the background once it serves, and the file that says which process it is.

Going to the background is a fork before anything has a thread. The parent stays until the child
says that it serves, so whoever started it may connect; a child that fails first has said so on
stderr, and its exit status becomes the parent's.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable

FAILED = 1


def go_to_background() -> Callable[[], None]:
    """Fork. The parent never returns. In the child, call what is returned when it serves: it lets
    go of the terminal, of stdio and of the working directory, and ends the parent.

    Context: the only thread of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    told, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        _wait_for(child, told)
    os.close(told)
    os.setsid()

    def detach() -> None:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.write(tell, b"\0")
        os.close(tell)

    return detach


def _wait_for(child: int, told: int) -> None:
    if os.read(told, 1):
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os._exit(max(os.waitstatus_to_exitcode(status), 0) or FAILED)


class PidFile:
    """A file with our process id, locked while we live, so that no other of its name starts."""

    def __init__(self, path: str) -> None:
        """Raises: OSError; BlockingIOError, when a living process has it."""
        self._path = os.path.abspath(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{os.getpid()}\n".encode())
        except BaseException:
            os.close(self._fd)
            raise

    def remove(self) -> None:
        """Remove it; others may have done so."""
        try:
            os.unlink(self._path)
        except OSError:
            pass
        os.close(self._fd)
