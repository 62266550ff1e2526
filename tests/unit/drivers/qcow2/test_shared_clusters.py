# SPDX-License-Identifier: Apache-2.0
"""Requests that share a guest cluster, at once: no host cluster comes to belong to two of them.

Many short runs on disks of a few clusters: writes of parts of a cluster, compressed writes of all
of it, zeroes, discards, and snapshots that come and go meanwhile, on a disk that finishes its
operations in an order of its own. After each run the image is checked to the bit, and each sector
holds what one of its writers wrote; reads by the direct map's twin in C, which are under way at the
same time, find no less. `make crash` goes on for as many rounds as you like.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.qcow2.cluster_lock import ClusterLocks
from blockemu.loop.sync import gather, sleep_ns
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash_search import FORMATS, TINY_CACHES, expand
from tests.unit.drivers.qcow2.support import Disk, Images, Twin, in_place

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
RUNS = 150
"""In a round."""
TASKS = 16
BURSTS = 3
LOOKS = 3
SECTOR = 512
ZEROES = bytes(SECTOR)
KINDS = (
    "write", "write", "write", "write", "compress", "zero", "unmap", "discard", "discard", "flush",
    "read", "snapshot",
)  # fmt: skip


class Run:
    """One short run."""

    def __init__(self, images: Images, seed: str) -> None:
        self.rng = rng = random.Random(seed)
        self.images = images
        self.options = {**rng.choice(FORMATS)}
        self.cluster = self.options["cluster_size"] // SECTOR
        self.sectors = self.cluster * rng.choice((1, 2, 3, 6))
        self.has_snapshots = self.options.get("refcount_bits") != 1
        images.create("image", self.sectors * SECTOR, **self.options)
        images["image"].latency_ns = lambda kind, offset, length: rng.randrange(1, 1000)
        caches = TINY_CACHES if rng.random() < 0.2 else {}
        self.disk: Disk = images.open("image", discard="unmap", **caches)
        self.disk.driver.image.compressor.offload = in_place
        self.twin = Twin(self.disk)
        self.possible: list[set[bytes]] = [{ZEROES} for _ in range(self.sectors)]
        self._serial = 0
        self._is_at_snapshots = False

    def go(self) -> None:
        for _ in range(BURSTS):
            touched: dict[int, set[bytes]] = {}
            requests = [self._request(touched) for _ in range(TASKS)]
            looks = [self._look(touched) for _ in range(TASKS)]
            self.images.ctx.run(gather(*requests, *looks))
            self._compare(touched)
        self.disk.close()
        judged = Checker(self.images["image"].content)
        assert not judged.corruptions, (self.options, judged.corruptions[:5])
        assert not judged.leaks, (self.options, judged.leaks)

    async def _look(self, touched: dict[int, set[bytes]]) -> None:
        """Read by the twin, now and then."""
        rng = self.rng
        for _ in range(LOOKS):
            sector = rng.randrange(self.sectors)
            await sleep_ns(rng.randrange(1, 2000))
            found = await self.twin.read(sector * SECTOR, SECTOR, latency_ns=rng.randrange(1, 4000))
            if found is not None and found not in self.possible[sector]:
                assert found in touched.get(sector, ()), f"{self.options}: C reads {sector} wrong"

    async def _request(self, touched: dict[int, set[bytes]]) -> None:
        rng, node = self.rng, self.disk.node
        kind = rng.choice(KINDS)
        if kind == "flush":
            await node.flush()
            return
        if kind == "snapshot":
            await self._snapshot()
            return
        first = rng.randrange(self.sectors)
        count = rng.randrange(1, min(self.cluster * 2, self.sectors - first) + 1)
        if kind == "compress":
            end = -(-(first + count) // self.cluster) * self.cluster
            first = first // self.cluster * self.cluster
            count = end - first
        self._serial += 1
        value = self._serial.to_bytes(8, "big") if kind in ("write", "compress") else ZEROES
        offset, length = first * SECTOR, count * SECTOR
        sectors = range(first, first + count)
        if kind == "read":
            await node.preadv(offset, memoryview(bytearray(length)))
            return
        for sector in sectors:
            values = touched.setdefault(sector, set())
            values.add(expand(sector, value))
            if kind == "discard":  # what is no whole cluster stays
                values |= self.possible[sector]
        if kind in ("write", "compress"):
            flags = RequestFlags.WRITE_COMPRESSED if kind == "compress" else RequestFlags.NONE
            data = b"".join(expand(sector, value) for sector in sectors)
            await node.pwritev(offset, memoryview(data), flags)
        elif kind == "discard":
            await node.pdiscard(offset, length)
        else:
            flags = RequestFlags.MAY_UNMAP if kind == "unmap" else RequestFlags.NONE
            await node.pwrite_zeroes(offset, length, flags)

    async def _snapshot(self) -> None:
        """One is made, or the oldest goes."""
        driver = self.disk.driver
        if not self.has_snapshots or self._is_at_snapshots:
            return
        self._is_at_snapshots = True
        if len(driver.snapshots) > 1:
            await driver.snapshot_delete(driver.snapshots[0].id)
        else:
            await driver.snapshot_create("now")
        self._is_at_snapshots = False

    def _compare(self, touched: dict[int, set[bytes]]) -> None:
        content = self.disk.read(0, self.sectors * SECTOR)
        for sector, values in touched.items():
            self.possible[sector] = values
        for sector, possible in enumerate(self.possible):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            assert found in possible, f"{self.options}: sector {sector} holds {found[:16].hex()}"
            self.possible[sector] = {found}


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_requests_that_share_clusters_leave_each_to_one_owner(
    images: Images, seed: int, turn: int, tmp_path: Path
) -> None:
    seed = int(os.environ.get("BLOCKEMU_SEED", seed))
    print(f"seed {seed}: replay with BLOCKEMU_SEED={seed}")
    for number in range(RUNS):
        print(f"run {turn}-{number}")
        Run(images, f"{seed}-{turn}-{number}").go()
    images.check("image", tmp_path)


def test_runs_find_missing_locks(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check: who wants a cluster for itself shares it."""

    async def shared(self: ClusterLocks, first: int, last: int) -> object:
        return self.try_shared(first, last)

    monkeypatch.setattr(ClusterLocks, "exclusive", shared)
    monkeypatch.setattr(ClusterLocks, "try_upgrade", lambda self, held: True)
    failures = 0
    for number in range(60):
        try:
            Run(images, f"no-locks-{number}").go()
        except (AssertionError, OSError):
            failures += 1
    assert failures
