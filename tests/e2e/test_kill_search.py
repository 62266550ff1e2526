# SPDX-License-Identifier: Apache-2.0
"""kill -9 again and again, on small disks where every host cluster is used over and over.

The load is writes, zeroes and trims; the daemon lets go of what is trimmed (`--discard unmap`, the
default) and takes it for other blocks. Every block says whose it is and when it was written. After
each kill QEMU judges the image and copies it out: no corruption, everything that was flushed, no
block with another block's data. A round is some kills of each kind of image; `make crash` goes on
for as many rounds as you like, `BLOCKEMU_SEED` replays the load of a run (not its timing).
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.block_writer import BLOCK_BYTES, BlockWriter
from tests.e2e.conftest import Serve
from tests.e2e.raw_nbd import RawNbd
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
KILLS = 2
BLOCKS = 96
WRITES_MIN, WRITES_MAX = 10, 250
TRIMS_SHARE = 0.3

IMAGES: dict[str, dict[str, Any]] = {
    "4k": {"cluster_size": 4096},
    "16k-lazy-refcounts": {"cluster_size": 16384, "lazy_refcounts": "on"},
    "512": {"cluster_size": 512},
}


class CopiedOut:
    """What QEMU sees of an image."""

    def __init__(self, image: Path) -> None:
        raw = image.with_suffix(".raw")
        QemuImg.convert(image, raw, source_fmt="qcow2", target_fmt="raw")
        self._content = raw.read_bytes()

    def read(self, offset: int, length: int) -> bytes:
        return self._content[offset : offset + length]


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize("turn", range(ROUNDS))
@pytest.mark.parametrize("name", IMAGES)
def test_kill_between_trims_shows_no_block_anothers_data(
    tmp_path: Path, serve: Serve, random_seed: int, name: str, turn: int
) -> None:
    require_peer("qemu-img")
    rng = random.Random(f"{random_seed}-{name}-{turn}")
    image = tmp_path / "disk.qcow2"
    QemuImg.create(image, BLOCKS * BLOCK_BYTES, options=dict(IMAGES[name]))
    writer = BlockWriter(BLOCKS, rng, trims_share=TRIMS_SHARE)
    for _ in range(KILLS):
        server = serve(image, fmt="qcow2")
        with server, RawNbd.connected(server.socket_path, "disk") as client:
            writer.run(client, writes=rng.randint(WRITES_MIN, WRITES_MAX), at_end=server.kill)
        found = QemuImg.check(image)
        assert (found.corruptions, found.errors) == (0, 0), found.text
        writer.adopt(writer.find_generations(CopiedOut(image), at_least=writer.flushed))
