# SPDX-License-Identifier: Apache-2.0
"""A server as a child process: started, known to be ready, stopped, its last words kept.

Ready is never guessed by polling: either the child prints a line, or it inherits a listening
socket (the kernel then queues early clients), which is systemd's socket activation and is spoken
by ``nbdkit`` and ``qemu-nbd``. stderr goes to an unlinked file, so that a talkative server can't
block on a full pipe.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0

# Runs the command line behind it with file descriptor 3 = the listening socket, as sd_listen_fds(3)
# wants it.
ACTIVATE = (
    "import os,sys; fd=int(sys.argv[1]); os.dup2(fd,3); os.set_inheritable(3,True);"
    "os.environ.update(LISTEN_FDS='1',LISTEN_PID=str(os.getpid()));"
    "os.execvp(sys.argv[2],sys.argv[2:])"
)


class ServerFailed(Exception):
    """The server ended too early, or didn't end as asked; carries what it wrote to stderr."""

    def __init__(self, what: str, stderr: str) -> None:
        super().__init__(f"{what}; stderr: {stderr.strip() or '(empty)'}")
        self.stderr = stderr


def nbd_uri(socket_path: Path, export: str = "") -> str:
    """The NBD URI of an export on a unix socket."""
    return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(socket_path))}"


class ServerProcess:
    """One running server on a unix socket; subclasses say the command line.

    As a context manager it starts on entry; on exit it is stopped cleanly, or killed if the body
    raised.
    """

    def __init__(self, command: Sequence[str], *, socket_path: Path, export: str = "") -> None:
        self.command = list(command)
        self.socket_path = socket_path
        self.export = export
        self.environment: dict[str, str] = {}
        self.stdout_lines: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the child)
        self._stderr_text = ""
        self._pending = b""

    @property
    def uri(self) -> str:
        """The NBD URI of the (first) export."""
        return nbd_uri(self.socket_path, self.export)

    def export_uri(self, export: str) -> str:
        """The NBD URI of any export of this server."""
        return nbd_uri(self.socket_path, export)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The child; only while started."""
        assert self._process is not None, "the server has not been started"
        return self._process

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the child lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def stderr(self) -> str:
        """Everything that the child has written to stderr so far; also after the `with`."""
        if not self._stderr.closed:
            self._stderr_text = os.pread(self._stderr.fileno(), 1 << 20, 0).decode(errors="replace")
        return self._stderr_text

    def start(self) -> Self:
        """Start the child and return when a client may connect.

        Raises: ServerFailed when it ends before that.
        """
        self._spawn(self.command)
        return self

    def _spawn(
        self,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        assert self._process is None, "started twice"
        environment: Mapping[str, str] = {**os.environ, **self.environment}
        self._process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pass_fds=pass_fds,
            env=environment,
            # A ^C in the terminal is for the test runner; servers are stopped by it.
            start_new_session=True,
        )

    def _spawn_activated(self, command: Sequence[str]) -> None:
        """Start `command` with a listening socket on descriptor 3."""
        self.socket_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self.socket_path))
            listener.listen(64)
            fd = listener.fileno()
            self._spawn(
                [sys.executable, "-I", "-S", "-c", ACTIVATE, str(fd), *command], pass_fds=[fd]
            )

    def read_line(self, timeout_s: float = READY_TIMEOUT_S) -> str:
        """The next line of the child's stdout.

        Raises: ServerFailed when the child ends or stays silent.
        """
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ServerFailed(f"no line on stdout within {timeout_s:g} s", self.stderr)
                chunk = os.read(fd, 65536)
                if not chunk:
                    code = self.process.wait(STOP_TIMEOUT_S)
                    raise ServerFailed(
                        f"{self.command[0]} ended with {code} before it was ready", self.stderr
                    )
                self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        self.stdout_lines.append(line.decode(errors="replace"))
        return self.stdout_lines[-1]

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the child."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The child's exit status; negative signal number when a signal ended it.

        Raises: ServerFailed when it doesn't end in time; it is killed then.
        """
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise ServerFailed(
                f"{self.command[0]} did not end within {timeout_s:g} s", self.stderr
            ) from None
        finally:
            for pipe in (self.process.stdout, self.process.stdin):
                if pipe is not None:
                    pipe.close()
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop the child cleanly.

        Raises: ServerFailed unless it exits with 0.
        """
        if self._process is None:
            return
        if self.running:
            self.send_signal(number)
        code = self.wait()
        if code != 0:
            raise ServerFailed(
                f"{self.command[0]} exited with {code} after {number.name}", self.stderr
            )

    def kill(self) -> None:
        """End the child with SIGKILL, as a power cut for its memory."""
        if self.running:
            self.process.kill()
        self.wait()

    def peak_rss_kib(self) -> int | None:
        """The child's peak resident memory so far; None once it has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return None
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
        return None

    def discard(self) -> None:
        """End the child whatever its state and let go of everything; for callers without `with`."""
        if self._process is not None:
            self.kill()
        self._close_stderr()

    def _close_stderr(self) -> None:
        _ = self.stderr  # read for the last time, and kept
        self._stderr.close()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.discard()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self.running:
                self.stop()
            else:
                self.kill()
                if error is not None and self.stderr:
                    error.add_note(f"{self.command[0]} wrote: {self.stderr}")
        finally:
            self._close_stderr()
