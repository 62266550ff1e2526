# SPDX-License-Identifier: Apache-2.0
"""Content to put into images, and what must hold of an image that was served."""

from __future__ import annotations

import random
from pathlib import Path

from tests.peers.qemu import QemuImg

MIB = 1 << 20


def make_content(path: Path, *, size_bytes: int, seed: int = 7) -> Path:
    """A raw file with data, zeroes and holes in runs of odd lengths."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        position = 0
        while position < size_bytes:
            length = min(rng.randrange(1, size_bytes // 8), size_bytes - position)
            kind = rng.choice(["data", "data", "zeroes", "hole"])
            if kind == "data":
                file.write(rng.randbytes(length))
            elif kind == "zeroes":
                file.write(bytes(length))
            else:
                file.seek(length, 1)
            position += length
        file.truncate(size_bytes)
    return path


def assert_sound(image: Path, fmt: str, *, leaks_allowed: bool = False) -> None:
    """qemu-img finds nothing wrong with an image; leaks only where a daemon was killed."""
    if fmt == "qcow2":
        found = QemuImg.check(image)
        assert (found.corruptions, found.errors) == (0, 0), found.text
        assert found.leaks == 0 or leaks_allowed, found.text
