# SPDX-License-Identifier: Apache-2.0
"""``nbdkit`` with its file plugin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.peers.process import ServerProcess


class NbdKit(ServerProcess):
    """``nbdkit file``: one raw image on a unix socket, whatever export name the client asks for.

    `filters` are put in front of it; `extra` are further arguments, those of filters among them.
    """

    def __init__(
        self,
        image: Path,
        *,
        socket_path: Path,
        export: str = "",
        filters: Sequence[str] = (),
        extra: Sequence[str] = (),
    ) -> None:
        command = ["nbdkit", "-f", *(f"--filter={name}" for name in filters)]
        command += ["file", str(image), *extra]
        super().__init__(command, socket_path=socket_path, export=export)

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn_activated(self.command)
        return self
