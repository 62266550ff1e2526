# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own programs in C (native/), compiled when they are first needed."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.peers.process import ServerFailed

SOURCES = Path(__file__).parent / "native"
COMPILE_TIMEOUT_S = 60.0


def compiler() -> str | None:
    """The C compiler's path: $CC, or cc."""
    return shutil.which(os.environ.get("CC") or "cc")


@functools.cache
def _folder() -> Path:
    """Where programs lie until we end: not beside the images, whose place may be noexec."""
    folder = tempfile.TemporaryDirectory(prefix="benchmarks-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def compiled(name: str) -> Path:
    """The program made of native/`name`.c, compiled at the first call.

    Raises: ServerFailed, with the compiler's words.
    """
    program = _folder() / name
    done = subprocess.run(
        [compiler() or "cc", "-O2", "-Wall", "-o", str(program), str(SOURCES / f"{name}.c")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise ServerFailed(f"{name}.c doesn't compile", done.stderr)
    return program
