# SPDX-License-Identifier: Apache-2.0
"""kill -9 under write load: what was flushed is there, and the image is sound.

SIGKILL takes the daemon's memory and leaves the kernel's: it proves that a flush reply is never
sent before the data and the metadata that finds it have left the process, and that what is half
done never damages what was done. Each test kills the same image several times and goes on from
what it found.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.e2e.block_writer import BLOCK_BYTES, BlockWriter
from tests.e2e.conftest import Serve
from tests.e2e.raw_nbd import RawNbd
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer

BLOCKS = 4096
KILLS = 4
WRITES_MIN, WRITES_MAX = 20, 400

# Format, qcow2 options, --cache, --aio. Small clusters make much metadata: L1, L2 and refcount
# tables all grow.
CASES = {
    "raw-writeback": ("raw", {}, "writeback", None),
    "raw-direct": ("raw", {}, "direct", "native"),
    "qcow2-writeback": ("qcow2", {}, "writeback", None),
    "qcow2-direct": ("qcow2", {}, "direct", "native"),
    "qcow2-direct-threads": ("qcow2", {}, "direct", "threads"),
    "qcow2-512-byte-clusters": ("qcow2", {"cluster_size": 512}, "writeback", None),
    "qcow2-4k-clusters-direct": ("qcow2", {"cluster_size": 4096}, "direct", "native"),
    "qcow2-2m-clusters": ("qcow2", {"cluster_size": 2 << 20}, "writeback", None),
}


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize("case", CASES)
def test_kill_under_write_load_keeps_every_flushed_byte(
    direct_dir: Path, serve: Serve, random_seed: int, case: str
) -> None:
    require_peer("qemu-img")
    fmt, options, cache, aio = CASES[case]
    rng = random.Random(f"{random_seed}-{case}")
    image = direct_dir / f"disk.{fmt}"
    QemuImg.create(image, BLOCKS * BLOCK_BYTES, fmt=fmt, options=dict(options))
    writer = BlockWriter(BLOCKS, rng)
    for _ in range(KILLS):
        server = serve(image, fmt=fmt, cache=cache, aio=aio)
        with server, RawNbd.connected(server.socket_path, "disk") as client:
            writer.run(client, writes=rng.randint(WRITES_MIN, WRITES_MAX), at_end=server.kill)
        if fmt == "qcow2":
            found = QemuImg.check(image)
            assert (found.corruptions, found.errors) == (0, 0), found.text
        with (
            serve(image, fmt=fmt, cache=cache, aio=aio, read_only=True) as server,
            RawNbd.connected(server.socket_path, "disk") as client,
        ):
            writer.adopt(writer.find_generations(client, at_least=writer.flushed))


@pytest.mark.usefixtures("only_ours")
def test_restart_after_kill_takes_the_same_socket_path(tmp_path: Path, serve: Serve) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    with serve(image, fmt="raw") as server:
        server.kill()
        assert server.socket_path.exists()
    with serve(image, fmt="raw") as server, RawNbd.connected(server.socket_path, "disk") as client:
        assert client.read(0, 512) == bytes(512)
