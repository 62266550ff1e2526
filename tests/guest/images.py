# SPDX-License-Identifier: Apache-2.0
"""What the host finds in an image when guest and daemon have ended."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.images import assert_sound
from tests.guest.files import run_program
from tests.peers.qemu import QemuImg


def assert_sound_inside(
    image: Path, *, fmt: str, folder: Path, leaks_allowed: bool = False
) -> None:
    """So is the file system on it, which was unmounted. `folder` is for a copy."""
    assert_sound(image, fmt, leaks_allowed=leaks_allowed)
    disk = folder / "file-system"
    QemuImg.convert(image, disk, source_fmt=fmt, target_fmt="raw")
    run_program("e2fsck", "-fn", str(disk))
