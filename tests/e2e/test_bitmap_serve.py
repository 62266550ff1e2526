# SPDX-License-Identifier: Apache-2.0
"""What clients write to an image that is served is in its bitmaps, whichever way it takes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.raw_nbd import RawNbd
from tests.peers.qemu import QemuImg, run_tool
from tests.peers.requirement import require_peer
from tests.unit.drivers.qcow2.checker import Checker

GRANULARITY = 4096
DISK_BYTES = 16 << 20


@pytest.mark.usefixtures("only_ours")
def test_served_image_has_every_write_in_its_bitmap(
    tmp_path: Path, serve: Serve, random_seed: int
) -> None:
    require_peer("qemu-img")
    rng = random.Random(random_seed)
    image = QemuImg.create(tmp_path / "disk.qcow2", DISK_BYTES)
    run_tool(["qemu-img", "bitmap", "--add", "-g", str(GRANULARITY), image, "b"])
    dirty: set[int] = set()
    for _ in range(2):
        with (
            serve(image, fmt="qcow2") as server,
            RawNbd.connected(server.socket_path, "disk") as client,
        ):
            for _ in range(100):
                offset = rng.randrange(DISK_BYTES // 512 - 16) * 512
                length = rng.choice((512, 4096, 8192))
                client.read(offset, length)  # so that its place is known, as far as that goes
                client.write(offset, b"w" * length)
                dirty.update(range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1))
            client.flush()
        assert Checker(image.read_bytes()).bitmaps() == {"b": (2, sorted(dirty))}
    verdict = QemuImg.check(image)
    assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text
