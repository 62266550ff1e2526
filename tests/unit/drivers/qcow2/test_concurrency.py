# SPDX-License-Identifier: Apache-2.0
"""Requests that overlap in time, on a disk that finishes them in an order of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.loop.sync import gather
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, Images, in_place

DISK = 512 * KIB
SECTOR = 512
ROUNDS = 12
TASKS = 24
KINDS = (
    "write", "write", "write", "compress", "compress", "zero", "unmap", "discard", "read", "flush",
)  # fmt: skip


class Mix:
    """Random requests at once; afterwards each sector holds what one of its writers wrote."""

    def __init__(self, images: Images, path: str, rng: random.Random, **options: Any) -> None:
        self.rng = rng
        self.images = images
        images[path].latency_ns = lambda kind, offset, length: rng.randrange(1, 1000)
        self.disk = images.open(path, **options)
        self.disk.driver.image.compressor.offload = in_place
        self.possible: list[set[bytes]] = [{bytes(SECTOR)} for _ in range(DISK // SECTOR)]
        self.stamp = 0

    def round(self) -> None:
        touched: dict[int, set[bytes]] = {}
        works = [self._request(touched) for _ in range(TASKS)]
        self.images.ctx.run(gather(*works))
        for sector, values in touched.items():
            if b"" in values:  # discarded: what it was, or zeroes
                values = (values - {b""}) | self.possible[sector] | {bytes(SECTOR)}
            self.possible[sector] = values
        self.verify()

    async def _request(self, touched: dict[int, set[bytes]]) -> None:
        rng, node = self.rng, self.disk.node
        first = rng.randrange(DISK // SECTOR)
        count = min(rng.choice((1, 2, 8, 9, 40, 130)), DISK // SECTOR - first)
        offset, length = first * SECTOR, count * SECTOR
        kind = rng.choice(KINDS)
        if kind == "compress":  # whole clusters
            size = self.disk.driver.cluster_size
            end = -(-(offset + length) // size) * size
            offset -= offset % size
            length = end - offset
            first, count = offset // SECTOR, length // SECTOR
        stamped, zeroes = self._stamped(), bytes(SECTOR)
        values = {"write": stamped, "compress": stamped, "zero": zeroes, "unmap": zeroes}
        value = values.get(kind)
        if kind in values or kind == "discard":
            for sector in range(first, first + count):
                touched.setdefault(sector, set()).add(value if value is not None else b"")
        if kind == "write":
            assert value is not None
            await node.pwritev(offset, memoryview(value * count))
        elif kind == "compress":
            assert value is not None
            await node.pwritev(offset, memoryview(value * count), RequestFlags.WRITE_COMPRESSED)
        elif kind == "discard":
            await node.pdiscard(offset, length)
        elif kind == "read":
            await node.preadv(offset, memoryview(bytearray(length)))
        elif kind == "flush":
            await node.flush()
        else:
            flags = RequestFlags.MAY_UNMAP if kind == "unmap" else RequestFlags.NONE
            await node.pwrite_zeroes(offset, length, flags)

    def _stamped(self) -> bytes:
        self.stamp += 1
        return self.stamp.to_bytes(8, "big") * (SECTOR // 8)

    def verify(self) -> None:
        content = self.disk.read(0, DISK)
        for sector, possible in enumerate(self.possible):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            assert found in possible, f"sector {sector}"
            self.possible[sector] = {found}


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096},
        {"cluster_size": 65536},
        {"cluster_size": 4096, "compat": "0.10"},
        {"cluster_size": 512, "refcount_bits": 64},
        {"cluster_size": 1024, "refcount_bits": 1},
        {"cluster_size": 16384, "extended_l2": "on"},
    ],
    ids=str,
)
def test_overlapping_requests_leave_each_cluster_to_one_owner(
    images: Images, seed: int, options: dict[str, Any], tmp_path: Path
) -> None:
    images.create("image", DISK, **options)
    mix = Mix(images, "image", random.Random(seed))
    for _ in range(ROUNDS):
        mix.round()
    assert not len(mix.disk.driver.image.locks)
    mix.disk.close()
    judged = Checker(images["image"].content)
    assert not judged.corruptions
    assert not judged.leaks
    images.check("image", tmp_path)


def test_caches_of_a_few_slices_change_nothing_but_speed(
    images: Images, seed: int, tmp_path: Path
) -> None:
    images.create("image", DISK, cluster_size=512)
    mix = Mix(
        images, "image", random.Random(seed),
        l2_cache_size=2048, refcount_cache_size=2048, l2_cache_entry_size=512,
    )  # fmt: skip
    for _ in range(ROUNDS):
        mix.round()
        assert mix.disk.driver.image.writer.l2.bytes_used <= 3 * 2048
    mix.disk.close()
    images.check("image", tmp_path)
