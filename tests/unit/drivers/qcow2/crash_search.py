# SPDX-License-Identifier: Apache-2.0
"""Random workloads on small disks, where every host cluster is used over and over, and a power cut
after each of the host's operations.

Every sector that is written says whose it is and when it was written: its own number and a serial
number. So a sector that shows another one's data is told from one that shows its own old data.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any, NamedTuple

from blockemu.drivers.driver import RequestFlags
from blockemu.loop.sync import gather
from tests.peers.qemu import QemuImg
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import SECTOR, CutDisk, GuestHistory, Recorder
from tests.unit.drivers.qcow2.support import Disk, Images, in_place

KINDS = (
    "write", "write", "write", "write", "zero", "unmap", "unmap", "discard", "discard", "discard",
    "compress", "flush",
)  # fmt: skip
WITH_SNAPSHOTS = (*KINDS, "snapshot")
ROUNDS = 8
TASKS = 6
ZEROES = bytes(SECTOR)

FORMATS: tuple[dict[str, Any], ...] = (
    {"cluster_size": 512},
    {"cluster_size": 1024, "refcount_bits": 64},
    {"cluster_size": 2048, "refcount_bits": 1},
    {"cluster_size": 4096},
    {"cluster_size": 4096, "lazy_refcounts": "on"},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "refcount_bits": 8},
)
TINY_CACHES = {"l2_cache_size": 2048, "refcount_cache_size": 2048, "l2_cache_entry_size": 512}


class Found(NamedTuple):
    """What a search has looked at."""

    operations: int
    cuts: int


class Search:
    """One workload. Everything is the seed's doing."""

    def __init__(self, images: Images, seed: str, *, kinds: tuple[str, ...] = KINDS) -> None:
        self.rng = rng = random.Random(seed)
        self.images = images
        self.kinds = kinds
        self.options = rng.choice(FORMATS)
        self.sectors = rng.choice((24, 64, 128)) * max(self.options["cluster_size"] // 4096, 1)
        images.create("image", self.sectors * SECTOR, **self.options)
        self.recorder = Recorder(images["image"], rng)
        caches = TINY_CACHES if rng.random() < 0.3 else {}
        self.disk: Disk = images.open("image", discard="unmap", **caches)
        self.disk.driver.image.compressor.offload = in_place
        self._serial = 0
        self._is_at_snapshots = False

    def run(self) -> None:
        """The workload, to its end."""
        for _ in range(ROUNDS):
            self.images.ctx.run(gather(*(self._request() for _ in range(TASKS))))
        self.disk.close()

    async def _request(self) -> None:
        rng, node = self.rng, self.disk.node
        kind = rng.choice(self.kinds)
        if kind == "flush":
            number = self.recorder.note("flush-start")
            await node.flush()
            self.recorder.note("flush-end", number)
            return
        if kind == "snapshot":
            await self._snapshot()
            return
        first = rng.randrange(self.sectors)
        count = min(rng.choice((1, 2, 8, 8, 20, 64)), self.sectors - first)
        if kind in ("discard", "compress"):  # whole clusters, so that what becomes of it is known
            size = self.disk.driver.cluster_size // SECTOR
            end = (first + count) // size * size
            first = min(-(-first // size) * size, end)
            count = end - first
            if not count:
                return
        offset, length = first * SECTOR, count * SECTOR
        self._serial += 1
        value = self._serial.to_bytes(8, "big") if kind in ("write", "compress") else ZEROES
        number = self.recorder.note("start", first=first, count=count, value=value)
        if kind in ("write", "compress"):
            data = b"".join(expand(sector, value) for sector in range(first, first + count))
            compressed = RequestFlags.WRITE_COMPRESSED if kind == "compress" else RequestFlags.NONE
            await node.pwritev(offset, memoryview(data), compressed)
        elif kind == "discard":
            await node.pdiscard(offset, length)
        else:
            flags = RequestFlags.MAY_UNMAP if kind == "unmap" else RequestFlags.NONE
            await node.pwrite_zeroes(offset, length, flags)
        self.recorder.note("end", number)

    async def _snapshot(self) -> None:
        """One is made, or the oldest goes: nothing that the guest sees."""
        driver = self.disk.driver
        if self.options.get("refcount_bits") == 1 or self._is_at_snapshots:
            return
        self._is_at_snapshots = True
        if len(driver.snapshots) > 1:
            await driver.snapshot_delete(driver.snapshots[0].id)
        else:
            await driver.snapshot_create("now")
        self._is_at_snapshots = False

    def judge(self, *, cuts_max: int | None = None, ask_qemu: Path | None = None) -> Found:
        """Cut after each of the host's operations, or after some of them; then look."""
        operations = self.recorder.operations
        disk = CutDisk(self.recorder.content, operations, self.recorder.flush_starts)
        history = GuestHistory(self.sectors)
        events = list(self.recorder.events)
        cuts = [at for at in range(1, len(operations) + 1) if operations[at - 1].kind != "read"]
        if cuts_max is not None and len(cuts) > cuts_max:
            cuts = sorted(self.rng.sample(cuts, cuts_max))
        asked = self.rng.choice(cuts)
        for cut in cuts:
            while events and events[0].at <= cut:
                history.play(events.pop(0))
            image = disk.after_cut(cut, self.rng)
            judged = Checker(image)
            assert not judged.corruptions, (cut, judged.corruptions[:5])
            self._compare(judged.read(), history, cut)
            if ask_qemu is not None and cut == asked:
                ask_qemu.write_bytes(image)
                verdict = QemuImg.check(ask_qemu)
                assert (verdict.corruptions, verdict.errors) == (0, 0), verdict.text
        return Found(len(operations), len(cuts))

    def _compare(self, content: bytes, history: GuestHistory, cut: int) -> None:
        for sector, values in enumerate(history.values):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            if any(found == expand(sector, value) for _, value in reversed(values)):
                continue
            owner, serial = struct.unpack_from(">QQ", found)
            known = [int.from_bytes(value, "big") for _, value in values]
            raise AssertionError(
                f"{self.options}: after {cut} operations sector {sector} holds write {serial} of"
                f" sector {owner}; possible are its own {known}"
            )


def expand(sector: int, value: bytes) -> bytes:
    """What a sector holds after the write that put `value` there."""
    if len(value) == SECTOR:
        return value
    return (sector.to_bytes(8, "big") + value) * (SECTOR // 16)
