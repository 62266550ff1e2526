# SPDX-License-Identifier: Apache-2.0
"""Servers with a control socket, and a client that keeps that socket's thread busy.

The same client, pipelining as many commands as both daemons queue for one client, loads both
daemons' main threads: blockemu's and qemu-storage-daemon's.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.peers.process import ServerFailed, ServerProcess
from tests.peers.qemu import QemuStorageDaemon

COMMAND = b'{"execute": "query-version"}\n'
PIPELINED = 8
"""Commands in flight: both daemons stop reading at this many unanswered ones of a client."""

ANSWER_TIMEOUT_S = 30.0
RECEIVE_BYTES = 65536


class BusyDaemon(ServerProcess):
    """blockemu, with a main thread that is busy with Python code when told to (busy_daemon.py)."""

    def __init__(self, image: Path, *, socket_path: Path, control_path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.busy_daemon"]
        command += ["--socket", str(socket_path), "--control", str(control_path), str(image)]
        super().__init__(command, socket_path=socket_path, export="disk")
        self.control_path = control_path

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn(self.command, stdin=subprocess.PIPE)
        self.read_line()
        return self

    def set_busy(self, *, busy: bool) -> None:
        """Returns when it is so. Raises: ServerFailed."""
        word = "busy" if busy else "idle"
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{word}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ServerFailed("the busy daemon has ended", self.stderr) from None
        while self.read_line() != word:
            pass


class ControlledQsd(QemuStorageDaemon):
    """qemu-storage-daemon with its export on an iothread, and a second monitor on a socket."""

    def __init__(self, image: Path, *, socket_path: Path, control_path: Path, aio: str) -> None:
        super().__init__(image, fmt="raw", socket_path=socket_path, aio=aio)
        # Before the monitor on stdio, whose greeting says that all before it took effect.
        at = self.command.index("--chardev")
        chardev = f"socket,id=control,path={control_path},server=on,wait=off"
        self.command[at:at] = ["--chardev", chardev, "--monitor", "chardev=control"]
        self.control_path = control_path


class QmpLoad:
    """query-version at full speed, from a thread, while in the `with`."""

    def __init__(self, control_path: Path) -> None:
        self._path = control_path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        self._thread = threading.Thread(target=self._flood, name="qmp-load", daemon=True)
        self._stopping = False
        self._answered = 0
        self._elapsed_s = 0.0
        self.per_s = 0.0
        """Commands answered per second; known after the `with`."""

    def _receive_lines(self, count: int) -> None:
        seen = 0
        while seen < count:
            data = self._socket.recv(RECEIVE_BYTES)
            if not data:
                raise ConnectionError("the daemon hung up")
            seen += data.count(b"\n")

    def check(self) -> None:
        """To be called under load. qemu-storage-daemon may end with its client, not before.

        Raises: ServerFailed, when the commands aren't answered any more.
        """
        if not self._thread.is_alive():
            raise ServerFailed("the control connection broke under load", "")

    def _flood(self) -> None:
        begun = time.monotonic()
        try:
            while not self._stopping:
                self._socket.sendall(COMMAND * PIPELINED)
                self._receive_lines(PIPELINED)
                self._answered += PIPELINED
        except OSError:
            return  # whether that is too early is `check`'s business
        finally:
            self._elapsed_s = time.monotonic() - begun

    def __enter__(self) -> Self:
        try:
            self._socket.connect(str(self._path))
            self._receive_lines(1)
            self._socket.sendall(b'{"execute": "qmp_capabilities"}\n')
            self._receive_lines(1)
        except OSError as error:
            self._socket.close()
            raise ServerFailed(f"the control socket doesn't answer: {error}", "") from error
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        self._thread.join()
        self._socket.close()
        self.per_s = self._answered / max(self._elapsed_s, 1e-9)
