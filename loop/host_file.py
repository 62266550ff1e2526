# SPDX-License-Identifier: Apache-2.0
"""Host files, as the floors above import them: the seam (file_engine.py) and the real engine.

A module of its own because the engine's files need the seam, and nobody needs a cycle.
"""

from __future__ import annotations

from blockemu.loop.file_engine import Done, FileEngine, HostFile
from blockemu.loop.posix_files import PosixFiles

__all__ = ["Done", "FileEngine", "HostFile", "PosixFiles"]
