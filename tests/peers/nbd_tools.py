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
