# SPDX-License-Identifier: Apache-2.0
"""The images under test: every block really written, one copy per server.

Holes would be served without touching the disk, unallocated clusters without touching the file,
and two servers on one file would lock each other out. The page-cache images lie on tmpfs, where
nothing but the server's own work is measured; the O_DIRECT ones on a filesystem that takes
O_DIRECT.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmarks.workloads import MIB, Setting
from tests.peers.qemu import QemuImg


def takes_direct_io(folder: Path) -> bool:
    """Whether a file in `folder` can be opened with O_DIRECT."""
    probe = folder / f".direct-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def make_master(folder: Path, setting: Setting, size_bytes: int) -> Path:
    """A fully written image of `setting`, to be copied per server."""
    raw = folder / "master.raw"
    if not raw.exists():
        block = os.urandom(MIB)
        with raw.open("wb") as file:
            for index in range(size_bytes // MIB):
                file.write(index.to_bytes(8, "big") + block[8:])
    if setting.fmt == "raw":
        return raw
    packed = folder / f"master.{setting.fmt}"
    if not packed.exists():
        QemuImg.convert(raw, packed, source_fmt="raw", target_fmt=setting.fmt)
    return packed


def copy_image(master: Path, target: Path, *, direct: bool) -> Path:
    """A private copy of `master`; written back to the disk for the O_DIRECT settings."""
    shutil.copyfile(master, target)
    if direct:
        fd = os.open(target, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return target
