# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT under load: a clean end, all that was acknowledged on disk; and READY=1."""

from __future__ import annotations

import random
import signal
import socket
from pathlib import Path

import pytest

from tests.e2e.block_writer import BLOCK_BYTES, BlockWriter
from tests.e2e.conftest import Serve
from tests.e2e.raw_nbd import RawNbd
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer

BLOCKS = 4096
pytestmark = pytest.mark.usefixtures("only_ours")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("cache", ["writeback", "direct"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_under_load_keeps_every_acknowledged_write(
    direct_dir: Path, serve: Serve, random_seed: int, number: signal.Signals, cache: str, fmt: str
) -> None:
    require_peer("qemu-img")
    image = QemuImg.create(direct_dir / f"disk.{fmt}", BLOCKS * BLOCK_BYTES, fmt=fmt)
    rng = random.Random(f"{random_seed}-{number}-{cache}-{fmt}")
    writer = BlockWriter(BLOCKS, rng)
    with serve(image, fmt=fmt, cache=cache) as server:
        client = RawNbd.connected(server.socket_path, "disk")
        with client:
            writer.run(client, writes=300, at_end=lambda: server.send_signal(number))
            assert server.wait() == 0, server.stderr
    assert "Traceback" not in server.stderr
    if fmt == "qcow2":
        found = QemuImg.check(image)
        assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
    with (
        serve(image, fmt=fmt, cache=cache, read_only=True) as server,
        RawNbd.connected(server.socket_path, "disk") as client,
    ):
        writer.find_generations(client, at_least=writer.acknowledged)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_when_idle_ends_with_status_0_and_removes_the_socket(
    tmp_path: Path, serve: Serve, number: signal.Signals
) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    with serve(image, fmt="raw") as server, RawNbd.connected(server.socket_path, "disk"):
        server.stop(number)
    assert not server.socket_path.exists()
    assert server.stderr == ""


def test_notify_socket_gets_ready(tmp_path: Path, run_dir: Path, serve: Serve) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    notify_path = run_dir / "notify.sock"
    server = serve(image, fmt="raw")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(notify_path))
        inbox.settimeout(30)
        server.environment["NOTIFY_SOCKET"] = str(notify_path)
        with server:
            assert "READY=1" in inbox.recv(4096).decode().splitlines()
            with RawNbd.connected(server.socket_path, "disk") as client:
                assert client.read(0, 512) == bytes(512)
