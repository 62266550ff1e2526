# SPDX-License-Identifier: Apache-2.0
"""The daemon under test, as its users start it: ``python -m blockemu serve``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from urllib.parse import quote, urlsplit

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


class BlockemuTcpDaemon(ServerProcess):
    """``blockemu serve`` of one image on 127.0.0.1, for clients that have no unix sockets."""

    def __init__(
        self,
        image: Path,
        *,
        fmt: str,
        port: int = 0,
        export: str = "disk",
        extra: Sequence[str] = (),
    ) -> None:
        """`port`: 0 is any free one, which `port` says once started."""
        command = [sys.executable, "-m", "blockemu", "serve", str(image), "-f", fmt]
        command += ["--name", export, "--port", str(port), *extra]
        super().__init__(command, socket_path=Path(os.devnull), export=export)
        self.port = port

    @property
    def uri(self) -> str:
        """See ServerProcess."""
        return self.export_uri(self.export)

    def export_uri(self, export: str) -> str:
        """See ServerProcess."""
        return f"nbd://127.0.0.1:{self.port}/{quote(export, safe='')}"

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn(self.command)
        port = urlsplit(self.read_line().split()[0]).port
        assert port is not None
        self.port = port
        return self
