# SPDX-License-Identifier: Apache-2.0
"""QEMU's tools: qemu-img, qemu-io, qemu-nbd and qemu-storage-daemon."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.peers.process import ServerProcess

TOOL_TIMEOUT_S = 50.0


class ToolResult(NamedTuple):
    """How a tool ended."""

    code: int
    stdout: str
    stderr: str


class ToolFailed(Exception):
    """A tool exited with another status than 0."""

    def __init__(self, command: Sequence[str], result: ToolResult) -> None:
        said = f"{result.stderr.strip()} {result.stdout.strip()}".strip()
        super().__init__(f"{' '.join(command)} exited with {result.code}: {said}")
        self.result = result


def run_tool(
    command: Sequence[str | Path],
    *,
    check: bool = True,
    timeout_s: float = TOOL_TIMEOUT_S,
    home: Path | None = None,
    user: int | None = None,
) -> ToolResult:
    """Run a command to its end, with another `home`, or as another `user` by number.

    Raises: ToolFailed when `check` and it exits with another status than 0.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=None if home is None else {**os.environ, "HOME": str(home)},
        cwd=home,
        user=user,
    )
    result = ToolResult(done.returncode, done.stdout, done.stderr)
    if check and result.code != 0:
        raise ToolFailed(words, result)
    return result


class CheckResult(NamedTuple):
    """What ``qemu-img check`` says of an image."""

    corruptions: int
    leaks: int
    errors: int
    text: str


class QemuImg:
    """``qemu-img``, a call each."""

    @staticmethod
    def create(
        path: Path,
        size: int | None,
        *,
        fmt: str = "qcow2",
        options: dict[str, str | int] | None = None,
        backing: Path | None = None,
        backing_fmt: str | None = None,
    ) -> Path:
        """Create an image and return its path."""
        command: list[str | Path] = ["qemu-img", "create", "-q", "-f", fmt]
        if options:
            command += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
        if backing is not None:
            assert backing_fmt is not None
            command += ["-b", backing, "-F", backing_fmt]
        command.append(path)
        if size is not None:
            command.append(str(size))
        run_tool(command)
        return path

    @staticmethod
    def info(target: Path | str, *, fmt: str | None = None) -> dict[str, Any]:
        """``info --output=json``."""
        command: list[str | Path] = [
            "qemu-img",
            "info",
            "--output=json",
            *(["-f", fmt] if fmt else []),
            target,
        ]
        found: dict[str, Any] = json.loads(run_tool(command).stdout)
        return found

    @staticmethod
    def map(target: Path | str, *, fmt: str = "raw") -> list[dict[str, Any]]:
        """``map --output=json``."""
        found: list[dict[str, Any]] = json.loads(
            run_tool(["qemu-img", "map", "--output=json", "-f", fmt, target]).stdout
        )
        return found

    @staticmethod
    def convert(
        source: Path | str,
        target: Path | str,
        *,
        source_fmt: str,
        target_fmt: str,
        existing: bool = False,
    ) -> None:
        """``convert``; `existing` writes into a target that exists (-n)."""
        flags = ["-n"] if existing else []
        run_tool(
            ["qemu-img", "convert", *flags, "-f", source_fmt, "-O", target_fmt, source, target]
        )

    @staticmethod
    def compare(
        one: Path | str, other: Path | str, *, one_fmt: str = "raw", other_fmt: str = "raw"
    ) -> None:
        """``compare``.

        Raises: ToolFailed when the contents differ.
        """
        run_tool(["qemu-img", "compare", "-f", one_fmt, "-F", other_fmt, one, other])

    @staticmethod
    def check(path: Path) -> CheckResult:
        """``check`` of a qcow2 image; finding errors isn't a failure of the call."""
        result = run_tool(["qemu-img", "check", "--output=json", "-f", "qcow2", path], check=False)
        if result.code not in (0, 2, 3):
            raise ToolFailed(["qemu-img", "check", str(path)], result)
        found = json.loads(result.stdout)
        return CheckResult(
            found.get("corruptions", 0),
            found.get("leaks", 0),
            found.get("check-errors", 0),
            result.stdout,
        )


class QemuIo:
    """``qemu-io`` on one target."""

    def __init__(self, target: Path | str, *, fmt: str = "raw") -> None:
        self.target = target
        self.fmt = fmt

    def run(self, *commands: str, check: bool = True) -> str:
        """Run qemu-io commands; its stdout.

        Raises: ToolFailed when a command fails or a pattern doesn't verify (qemu-io says so and
        exits with 1).
        """
        words: list[str | Path] = ["qemu-io", "-f", self.fmt]
        for command in commands:
            words += ["-c", command]
        words.append(self.target)
        result = run_tool(words, check=False)
        failed = result.code != 0 or "failed" in result.stdout
        if check and failed:
            raise ToolFailed([str(word) for word in words], result)
        return result.stdout + result.stderr


class QemuNbd(ServerProcess):
    """``qemu-nbd``: one image on a unix socket."""

    def __init__(
        self,
        image: Path,
        *,
        fmt: str,
        socket_path: Path,
        export: str = "",
        read_only: bool = False,
        shared: int = 0,
        bitmaps: Iterable[str] = (),
        allocation_depth: bool = False,
    ) -> None:
        command = ["qemu-nbd", "-t", "-f", fmt, "-x", export, "-e", str(shared), "--discard=unmap"]
        for bitmap in bitmaps:
            command += ["-B", bitmap]
        command += ["-A"] if allocation_depth else []
        command += ["--detect-zeroes=off", *(["-r"] if read_only else []), str(image)]
        super().__init__(command, socket_path=socket_path, export=export)

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn_activated(self.command)
        return self


class QemuStorageDaemon(ServerProcess):
    """``qemu-storage-daemon`` with one export bound to an iothread."""

    def __init__(
        self,
        image: Path,
        *,
        fmt: str,
        socket_path: Path,
        export: str = "disk",
        aio: str = "threads",
        direct: bool = False,
        read_only: bool = False,
        iothread: bool = True,
        format_options: str = "",
    ) -> None:
        """`format_options`: more of the format node's, `key=value,...`."""
        cache = f"cache.direct={'on' if direct else 'off'}"
        access = f"read-only={'on' if read_only else 'off'}"
        command = ["qemu-storage-daemon", "--object", "iothread,id=io0"]
        command += [
            "--blockdev",
            f"file,node-name=proto,filename={image},aio={aio},{cache},{access},discard=unmap",
        ]
        more = f",{format_options}" if format_options else ""
        node = f"{fmt},node-name=disk,file=proto,{cache},{access},discard=unmap{more}"
        command += ["--blockdev", node]
        command += ["--nbd-server", f"addr.type=unix,addr.path={socket_path},max-connections=0"]
        writable = f"writable={'off' if read_only else 'on'}"
        thread = ",iothread=io0,fixed-iothread=on" if iothread else ""
        command += ["--export", f"nbd,id=exp,node-name=disk,name={export},{writable}{thread}"]
        # The monitor's greeting comes after the options before it took effect: it is the ready
        # line.
        command += ["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"]
        super().__init__(command, socket_path=socket_path, export=export)

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn(self.command, stdin=subprocess.PIPE)
        while "QMP" not in self.read_line():
            pass
        return self
