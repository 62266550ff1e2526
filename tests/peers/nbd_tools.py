# SPDX-License-Identifier: Apache-2.0
"""libnbd's command-line clients: nbdinfo, nbdcopy and nbdfuse."""

from __future__ import annotations

import json
import os
import select
import subprocess
import threading
from pathlib import Path
from typing import Any, Self

from tests.peers.qemu import ToolFailed, ToolResult, run_tool

FUSE_TIMEOUT_S = 30.0


class NbdInfo:
    """``nbdinfo``, a call each."""

    @staticmethod
    def size(uri: str) -> int:
        """``--size``."""
        return int(run_tool(["nbdinfo", "--size", uri]).stdout)

    @staticmethod
    def describe(uri: str) -> dict[str, Any]:
        """``--json`` of one export; content isn't looked at."""
        found: dict[str, Any] = json.loads(
            run_tool(["nbdinfo", "--no-content", "--json", uri]).stdout
        )
        export: dict[str, Any] = found["exports"][0]
        return export

    @staticmethod
    def dirty_ranges(uri: str, bitmap: str) -> list[tuple[int, int]]:
        """``--map`` of QEMU's meta context of a dirty bitmap: (offset, length) of what is dirty,
        neighbours as one."""
        context = f"qemu:dirty-bitmap:{bitmap}"
        listing = run_tool(["nbdinfo", f"--map={context}", "--json", uri]).stdout
        found: list[tuple[int, int]] = []
        for extent in json.loads(listing):
            offset, length = extent["offset"], extent["length"]
            if not extent["type"]:
                continue
            if found and sum(found[-1]) == offset:
                offset, length = found[-1][0], found[-1][1] + length
                found.pop()
            found.append((offset, length))
        return found

    @staticmethod
    def map(uri: str, context: str = "base:allocation") -> list[tuple[int, int, int]]:
        """``--map`` of a meta context: (offset, length, state), neighbours that are alike as
        one."""
        found: list[tuple[int, int, int]] = []
        listing = run_tool(["nbdinfo", f"--map={context}", "--json", uri]).stdout
        for extent in json.loads(listing):
            offset, length, state = extent["offset"], extent["length"], extent["type"]
            if found and found[-1][2] == state:
                offset, length = found[-1][0], found[-1][1] + length
                found.pop()
            found.append((offset, length, state))
        return found

    @staticmethod
    def contexts(uri: str) -> list[str]:
        """The meta contexts that can be chosen, in their order."""
        return list(NbdInfo.describe(uri)["contexts"])

    @staticmethod
    def export_names(uri: str) -> list[str]:
        """``--list``."""
        listing = run_tool(["nbdinfo", "--no-content", "--list", "--json", uri]).stdout
        return [export["export-name"] for export in json.loads(listing)["exports"]]


class NbdCopy:
    """``nbdcopy``."""

    @staticmethod
    def copy(source: str | Path, target: str | Path, *options: str) -> None:
        """Copy everything, then flush."""
        run_tool(["nbdcopy", "--flush", *options, source, target])


class NbdFuse:
    """``nbdfuse``: an export as the file `self.file`, within a `with`."""

    def __init__(self, uri: str, folder: Path) -> None:
        """`folder` is made, to be mounted on."""
        self.file = folder / "nbd"
        self._folder = folder
        # It writes its process id there when clients may come: a pipe wakes who waits for that.
        self._ready = folder.with_suffix(".ready")
        self._command = ["nbdfuse", "--pidfile", str(self._ready), str(folder), uri]
        self._process: subprocess.Popen[str]

    def __enter__(self) -> Self:
        self._folder.mkdir()
        os.mkfifo(self._ready)
        with open(os.open(self._ready, os.O_RDONLY | os.O_NONBLOCK), "rb") as ready:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            found, _, _ = select.select([ready], [], [], FUSE_TIMEOUT_S)
        if not found:
            self._process.kill()
            _, said = self._process.communicate()
            raise ToolFailed(self._command, ToolResult(self._process.returncode, "", said))
        # Who waits for a file of its doesn't hear signals, but gets an error when it has ended.
        self._alarm = threading.Timer(FUSE_TIMEOUT_S, self._process.kill)
        self._alarm.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Unmount it; all that was written is flushed then.

        Raises: ToolFailed when it says that something went wrong.
        """
        self._alarm.cancel()
        run_tool(["fusermount3", "-u", self._folder])
        _, said = self._process.communicate(timeout=FUSE_TIMEOUT_S)
        if self._process.returncode != 0:
            raise ToolFailed(self._command, ToolResult(self._process.returncode, "", said))
