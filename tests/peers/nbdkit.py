# SPDX-License-Identifier: Apache-2.0
"""``nbdkit`` with its file plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from tests.peers.process import ServerProcess


class NbdKit(ServerProcess):
    """``nbdkit file``: one raw image on a unix socket, whatever export name the client asks for."""

    def __init__(self, image: Path, *, socket_path: Path, export: str = "") -> None:
        super().__init__(
            ["nbdkit", "-f", "file", str(image)], socket_path=socket_path, export=export
        )

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn_activated(self.command)
        return self
