# SPDX-License-Identifier: Apache-2.0
"""The roofline contestant: a bare C loop, compiled when the benchmark runs.

It does what any server of the protocol must (native/roofline.c says what that is) and nothing
that a storage daemon is for. The others' share of its speed is what their structure costs, on this
machine and in this minute; no other number says that.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from tests.peers.process import ServerFailed, ServerProcess

SOURCE = Path(__file__).parent / "native" / "roofline.c"
COMPILE_TIMEOUT_S = 60.0


def compiler() -> str | None:
    """The C compiler's path: $CC, or cc."""
    return shutil.which(os.environ.get("CC") or "cc")


@functools.cache
def _folder() -> Path:
    """Where the program lies until we end: not beside the images, whose place may be noexec."""
    folder = tempfile.TemporaryDirectory(prefix="roofline-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def compiled() -> Path:
    """The program, compiled at the first call.

    Raises: ServerFailed, with the compiler's words.
    """
    program = _folder() / "roofline"
    done = subprocess.run(
        [compiler() or "cc", "-O2", "-Wall", "-o", str(program), str(SOURCE)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise ServerFailed("the roofline doesn't compile", done.stderr)
    return program


class Roofline(ServerProcess):
    """One raw file on a unix socket, under whatever name the client asks for."""

    def __init__(self, image: Path, *, socket_path: Path, export: str = "disk") -> None:
        command = [str(compiled()), str(image), str(socket_path)]
        super().__init__(command, socket_path=socket_path, export=export)

    def start(self) -> Self:
        """See ServerProcess."""
        self._spawn(self.command)
        self.read_line()
        return self
