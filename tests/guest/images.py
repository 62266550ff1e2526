# SPDX-License-Identifier: Apache-2.0
"""What the host finds in an image when guest and daemon have ended."""

from __future__ import annotations

from pathlib import Path

from tests.guest.files import run_program
from tests.peers.qemu import QemuImg


def assert_sound_image(image: Path, *, fmt: str, killed: bool = False) -> None:
    """qemu-img finds nothing wrong, nor anything lost unless the daemon was `killed`."""
    if fmt == "qcow2":
        found = QemuImg.check(image)
        assert (found.corruptions, found.errors) == (0, 0), found.text
        assert found.leaks == 0 or killed, found.text


def assert_sound(image: Path, *, fmt: str, folder: Path, killed: bool = False) -> None:
    """So does e2fsck: a file system that was unmounted. `folder` is for a copy of it."""
    assert_sound_image(image, fmt=fmt, killed=killed)
    disk = folder / "file-system"
    QemuImg.convert(image, disk, source_fmt=fmt, target_fmt="raw")
    run_program("e2fsck", "-fn", str(disk))
