# SPDX-License-Identifier: Apache-2.0
"""libnbd's command-line clients: nbdinfo and nbdcopy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.peers.qemu import run_tool


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
    def map(uri: str, context: str) -> list[tuple[int, int, int]]:
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
