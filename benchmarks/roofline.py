# SPDX-License-Identifier: Apache-2.0
"""The roofline contestant: a bare C loop, compiled when the benchmark runs.

It does what any server of the protocol must (native/roofline.c says what that is) and nothing
that a storage daemon is for. The others' share of its speed is what their structure costs, on this
machine and in this minute; no other number says that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from benchmarks.native_programs import compiled
from tests.peers.process import ServerProcess


class Roofline(ServerProcess):
    """One raw file on a unix socket, under whatever name the client asks for."""

    def __init__(self, image: Path, *, socket_path: Path, export: str = "disk") -> None:
        command = [str(compiled("roofline")), str(image), str(socket_path)]
        super().__init__(command, socket_path=socket_path, export=export)

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn(self.command)
        self.read_line()
        return self
