# SPDX-License-Identifier: Apache-2.0
"""Several clients at the same few clusters at once: none comes to belong to two guest clusters.

Each client has requests under way on parts of clusters that the others change, too: writes, zeroes,
trims. Then qemu-img checks the image, and each sector must hold what somebody wrote to it.
A round is a run of a second for each kind of image; `make crash` goes on for as many as you like.
"""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.peers.libnbd import require_libnbd
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
CLIENTS = 4
DEPTH = 12
RUN_S = 0.7
SECTOR = 512
CLUSTERS = 24

IMAGES: dict[str, dict[str, Any]] = {
    "64k": {"cluster_size": 65536},
    "4k": {"cluster_size": 4096},
}


class Client(threading.Thread):
    """Batches of random requests, until the time is over."""

    def __init__(self, uri: str, number: int, rng: random.Random, cluster: int) -> None:
        super().__init__(name=f"client {number}")
        self.error: BaseException | None = None
        self.requests = 0
        self._nbd = require_libnbd()
        self._uri = uri
        self._number = number
        self._rng = rng
        self._sectors = cluster // SECTOR

    def run(self) -> None:
        try:
            handle = self._nbd.NBD()
            handle.connect_uri(self._uri)
            end = time.monotonic() + RUN_S
            while time.monotonic() < end:
                kept = [self._start(handle) for _ in range(DEPTH)]
                while handle.aio_in_flight() > 0:
                    handle.poll(-1)
                for cookie, _ in kept:
                    assert handle.aio_command_completed(cookie)
                self.requests += DEPTH
            handle.shutdown()
        except BaseException as error:
            self.error = error

    def _start(self, handle: Any) -> tuple[int, Any]:
        rng = self._rng
        first = rng.randrange(CLUSTERS * self._sectors)
        count = min(rng.randint(1, 2 * self._sectors), CLUSTERS * self._sectors - first)
        kind = rng.random()
        if kind < 0.5:
            stamp = self._number << 32 | rng.getrandbits(32)
            data = b"".join(
                struct.pack(">QQ", sector, stamp) * (SECTOR // 16)
                for sector in range(first, first + count)
            )
            buffer = self._nbd.Buffer.from_bytearray(bytearray(data))
            return handle.aio_pwrite(buffer, first * SECTOR), buffer
        if kind < 0.75:
            flags = self._nbd.CMD_FLAG_NO_HOLE if rng.random() < 0.5 else 0
            return handle.aio_zero(count * SECTOR, first * SECTOR, flags=flags), None
        if kind < 0.97:
            return handle.aio_trim(count * SECTOR, first * SECTOR), None
        return handle.aio_flush(), None


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize("turn", range(ROUNDS))
@pytest.mark.parametrize("name", IMAGES)
def test_clients_that_share_clusters_leave_each_to_one_owner(
    tmp_path: Path, serve: Serve, random_seed: int, name: str, turn: int
) -> None:
    require_peer("qemu-img")
    require_libnbd()
    cluster = IMAGES[name]["cluster_size"]
    image = tmp_path / "disk.qcow2"
    QemuImg.create(image, CLUSTERS * cluster, options=dict(IMAGES[name]))
    with serve(image, fmt="qcow2") as server:
        clients = [
            Client(server.uri, number, random.Random(f"{random_seed}-{turn}-{number}"), cluster)
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert not [client.error for client in clients if client.error]
    print(f"{sum(client.requests for client in clients)} requests")
    found = QemuImg.check(image)
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
    raw = tmp_path / "disk.raw"
    QemuImg.convert(image, raw, source_fmt="qcow2", target_fmt="raw")
    content = raw.read_bytes()
    for sector in range(len(content) // SECTOR):
        data = content[sector * SECTOR : (sector + 1) * SECTOR]
        owner = int.from_bytes(data[:8], "big")
        assert data == data[:16] * (SECTOR // 16), f"sector {sector} is torn"
        assert owner == sector or not any(data), f"sector {sector} holds data of {owner}"
