# SPDX-License-Identifier: Apache-2.0
"""The daemon under test, as its users start it: ``python -m blockemu serve``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.peers.process import ServerProcess


class BlockemuDaemon(ServerProcess):
    """``blockemu serve`` on a unix socket; ready when it has said so on stdout."""

    def __init__(
        self,
        *images: Path | str,
        fmt: str | None,
        socket_path: Path,
        export: str | None = None,
        cache: str | None = None,
        aio: str | None = None,
        read_only: bool = False,
        extra: Sequence[str] = (),
    ) -> None:
        command = [sys.executable, "-m", "blockemu", "serve", *(str(image) for image in images)]
        command += ["--socket", str(socket_path)]
        for flag, value in (("-f", fmt), ("--name", export), ("--cache", cache), ("--aio", aio)):
            if value is not None:
                command += [flag, value]
        if read_only:
            command.append("--read-only")
        super().__init__([*command, *extra], socket_path=socket_path, export=export or "")

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn(self.command)
        self.read_line()
        return self
