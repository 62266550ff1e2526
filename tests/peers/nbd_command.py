# SPDX-License-Identifier: Apache-2.0
"""qemu-nbd and blockemu nbd by the same command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.peers.process import ServerProcess

PROGRAMS = {
    "qemu-nbd": ("qemu-nbd",),
    "blockemu": (sys.executable, "-m", "blockemu", "nbd"),
}


class NbdCommand(ServerProcess):
    """One of PROGRAMS with these words, on a socket that it is started with (LISTEN_FDS)."""

    def __init__(
        self, program: str, words: Sequence[str | Path], *, socket_path: Path, export: str = ""
    ) -> None:
        command = [*PROGRAMS[program], *(str(word) for word in words)]
        super().__init__(command, socket_path=socket_path, export=export)

    def start(self) -> Self:
        """See ServerProcess. A client may connect at once; it waits for the server to be ready."""
        self._spawn_activated(self.command)
        return self
