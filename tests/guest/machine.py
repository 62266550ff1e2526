# SPDX-License-Identifier: Apache-2.0
"""A virtual machine that runs what a test tells it.

QEMU in plain emulation (TCG): no KVM, so that it is the same everywhere, with Debian's kernel,
which boots in some 3 s. The guest's first serial port is the kernel's console and goes to a file,
the second one speaks with `agent`, the script that runs commands. Its network is QEMU's user mode:
what listens on the host's 127.0.0.1 is 10.0.2.2 there.

Whatever goes wrong in a guest is told with its whole console.
"""

from __future__ import annotations

import base64
import os
import selectors
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

QEMU = "qemu-system-x86_64"
HOST = "10.0.2.2"
CPU = "qemu64,+rdrand"  # with a source of randomness: mkfs would wait for one
# Long enough for a machine that is busy with other things, too.
BOOT_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 100.0
MEMORY_MIB = 192
READ_BYTES = 65536


class GuestFailed(Exception):
    """A command in a guest failed, or the guest did; what it said, and its console."""

    def __init__(self, what: str, output: str, console: str) -> None:
        super().__init__(
            f"{what}\n--- it printed:\n{output.strip() or '(nothing)'}\n--- the console:\n{console}"
        )
        self.output = output


class Guest:
    """As a context manager: booted on entry, its power cut on exit unless it is off by then."""

    def __init__(
        self,
        *,
        kernel: Path,
        initrd: Path,
        console: Path,
        drives: tuple[str, ...] = (),
        root: str | None = None,
    ) -> None:
        """`drives`: each QEMU's -drive; `root`: which of the guest's devices to boot from."""
        line = "console=ttyS0 panic=-1 quiet loglevel=6" + (f" root={root}" if root else "")
        # Two processors: the kernel's nbd driver uses as many connections at a time.
        machine = ["-accel", "tcg", "-cpu", CPU, "-smp", "2", "-m", str(MEMORY_MIB)]
        machine += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        network = ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
        self._command = [QEMU, *machine, *network, "-kernel", str(kernel), "-initrd", str(initrd)]
        self._command += ["-append", line, "-serial", f"file:{console}", "-serial", "stdio"]
        for drive in drives:
            self._command += ["-drive", drive]
        self._console = console
        self._process: subprocess.Popen[bytes]
        self._pending = b""
        self._number = 0
        self._hangs = False

    @property
    def running(self) -> bool:
        """Whether it is on."""
        return self._process.poll() is None

    @property
    def usable(self) -> bool:
        """Whether it is on and has ended all that it was told to run."""
        return self.running and not self._hangs

    @property
    def console(self) -> str:
        """What the kernel has written so far."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._read_until(b"=ready\n", BOOT_TIMEOUT_S, "didn't boot")
        except BaseException:
            self.cut_power()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut_power()

    def run(self, script: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """What a shell script printed, stderr included. It ends at its first command that fails.

        Raises: GuestFailed when it exits with another status than 0, or stays silent.
        """
        code, output = self.attempt(f"set -e\n{script}", timeout_s=timeout_s)
        if code != 0:
            raise self._failure(f"the guest's command exited with {code}: {script}", output)
        return output

    def attempt(self, script: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
        """The exit status of a shell script, and what it printed.

        Raises: GuestFailed when it doesn't end in time; the guest is of no use then.
        """
        self._number += 1
        coded = base64.b64encode(script.encode()).decode()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._number} {coded}\n".encode())
        self._process.stdin.flush()
        mark = f"\n=exit {self._number} ".encode()
        output = self._read_until(mark, timeout_s, f"didn't end this: {script}")
        code = self._read_until(b"\n", timeout_s, "didn't say how it ended")
        return int(code), output.decode(errors="replace")

    def power_off(self) -> None:
        """Shut down as an administrator does: file systems are unmounted first.

        Raises: GuestFailed when it isn't off in time.
        """
        assert self._process.stdin is not None
        self.attempt("sync; umount -a -r; (sleep 0.1; poweroff -f) >/dev/null 2>&1 &")
        try:
            self._process.wait(COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._failure("the guest doesn't power off", "") from None

    def cut_power(self) -> None:
        """Off, at once; what the guest hasn't written yet is lost."""
        if self.running:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _failure(self, what: str, output: str) -> GuestFailed:
        return GuestFailed(what, output, self.console)

    def _read_until(self, mark: bytes, timeout_s: float, failure: str) -> bytes:
        """What comes before `mark`, which is taken, too."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while mark not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._hangs = True
                    what = f"within {timeout_s:g} s the guest {failure}"
                    raise self._failure(what, self._pending.decode(errors="replace"))
                data = os.read(fd, READ_BYTES)
                if not data:
                    code = self._process.wait()
                    what = f"{QEMU} exited with {code}; the guest {failure}"
                    raise self._failure(what, self._pending.decode(errors="replace"))
                self._pending += data
        before, self._pending = self._pending.split(mark, 1)
        return before
