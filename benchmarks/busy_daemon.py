# SPDX-License-Identifier: Apache-2.0
"""blockemu's daemon with a main thread that can be kept busy: ``python -m benchmarks.busy_daemon``.

It is the daemon of ``blockemu serve``, embedded, and a callback in its main context that burns CPU
in Python code for `SLICE_S` and schedules itself again, as a job, a filter or a script in the main
thread might. Between two slices the loop does its other work, so that clients still connect.

A line ``busy`` or ``idle`` on stdin turns that on or off and is answered with the same line on
stdout; the end of stdin ends the daemon.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from blockemu.config import UnixAddress, serve_config
from blockemu.daemon import Daemon

SLICE_S = 0.1
"""Twenty times the interval in which CPython's threads hand over its lock, and a long time for a
request, yet short enough for a client to be let in."""

COMMAND_BYTES_MAX = 4096


def say(line: str) -> None:
    """To whoever holds our stdout."""
    print(line, flush=True)


class BusyTask:
    """The callback, and the orders it takes. Context: main context of `daemon`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._busy = False
        self._bh = daemon.main_ctx.new_bh(self._burn, name="busy")
        self._input = b""

    def begin(self) -> None:
        """Listen to stdin."""
        fd = sys.stdin.fileno()
        os.set_blocking(fd, False)
        self._daemon.main_ctx.set_fd_handler(fd, read=self._on_input)

    def _on_input(self) -> None:
        try:
            data = os.read(sys.stdin.fileno(), COMMAND_BYTES_MAX)
        except BlockingIOError:
            return
        if not data:
            self._end()
            return
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            self._busy = line == b"busy"
            if self._busy:
                self._bh.schedule()
            say(line.decode(errors="replace"))

    def _end(self) -> None:
        self._busy = False
        self._daemon.main_ctx.set_fd_handler(sys.stdin.fileno())
        self._daemon.stop()

    def _burn(self) -> None:
        """A slice of plain Python, which gives up the interpreter's lock only when asked to."""
        end = time.monotonic() + SLICE_S
        total = 0
        while time.monotonic() < end:
            for number in range(1000):
                total += number
        if self._busy:
            self._bh.schedule()


def main() -> None:
    """Serve until SIGTERM or the end of stdin."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy_daemon", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("image", type=Path, help="a raw image; its export is called disk")
    options = parser.parse_args()
    config = serve_config(
        [str(options.image)],
        names=["disk"],
        fmt="raw",
        address=UnixAddress(str(options.socket)),
        control_path=str(options.control),
    )
    daemon = Daemon(config)
    task = BusyTask(daemon)

    def ready(lines: list[str]) -> None:
        task.begin()
        say(lines[0])

    daemon.run(handle_signals=True, then_exit=True, on_ready=ready)


if __name__ == "__main__":
    main()
