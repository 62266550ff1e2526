# SPDX-License-Identifier: Apache-2.0
"""Every cluster size with every width of reference counts: the same little life of an image.

The sizes above 64 KiB, which take long, have every other width each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from blockemu.drivers.driver import RequestFlags
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, Images

CLUSTER_BITS = range(9, 22)
REFCOUNT_BITS = (1, 2, 4, 8, 16, 32, 64)
MATRIX = [
    (cluster_bits, refcount_bits)
    for cluster_bits in CLUSTER_BITS
    for at, refcount_bits in enumerate(REFCOUNT_BITS)
    if cluster_bits <= 16 or (at + cluster_bits) % 2
]
CLUSTERS = 5
"""Of the disk, and a sector."""
SMALL = 16 * KIB
"""Clusters up to here are judged by our own checker, which is quick for small ones only."""


class Life:
    """What was done to the disk, and to an array of bytes beside it."""

    def __init__(self, images: Images, cluster: int, refcount_bits: int) -> None:
        self.cluster = cluster
        self.model = bytearray(CLUSTERS * cluster + 512)
        images.create("image", len(self.model), cluster_size=cluster, refcount_bits=refcount_bits)
        self.disk = images.open("image", discard="unmap")
        self.run = images.ctx.run

    def write(self, offset: int, data: bytes) -> None:
        self.disk.write(offset, data)
        self.model[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        flags = RequestFlags.MAY_UNMAP if unmap else RequestFlags.NONE
        self.run(self.disk.node.pwrite_zeroes(offset, length, flags))
        self.model[offset : offset + length] = bytes(length)

    def discard(self, first: int, count: int) -> None:
        offset, length = first * self.cluster, count * self.cluster
        self.run(self.disk.node.pdiscard(offset, length))
        self.model[offset : offset + length] = bytes(length)

    def resize(self, length: int) -> None:
        self.run(self.disk.node.truncate(length))
        del self.model[length:]
        self.model.extend(bytes(length - len(self.model)))

    def compare(self) -> None:
        assert self.disk.read(0, len(self.model)) == self.model


@pytest.mark.parametrize(("cluster_bits", "refcount_bits"), MATRIX)
def test_life_of_an_image(
    images: Images, cluster_bits: int, refcount_bits: int, tmp_path: Path
) -> None:
    cluster = 1 << cluster_bits
    life = Life(images, cluster, refcount_bits)
    life.write(100, b"a" * (3 * cluster))
    life.zero(cluster + 7, cluster, unmap=False)
    life.zero(2 * cluster, cluster, unmap=True)
    life.write(4 * cluster - 3, b"b" * (cluster + 515))
    before = bytes(life.model)
    if refcount_bits > 1:
        life.run(life.disk.driver.snapshot_create("then"))
    life.write(cluster // 2, b"c" * cluster)
    life.discard(4, 1)
    life.disk.flush()
    life.write(3 * cluster, b"d" * 512)
    life.compare()
    if refcount_bits > 1:
        changed = bytes(life.model)
        life.run(life.disk.driver.snapshot_create("now"))
        life.run(life.disk.driver.snapshot_apply("then"))
        life.model[:] = before
        life.compare()
        life.run(life.disk.driver.snapshot_apply("now"))
        life.model[:] = changed
        life.run(life.disk.driver.snapshot_delete("then"))
        life.run(life.disk.driver.snapshot_delete("now"))
    life.resize(9 * cluster)
    life.write(7 * cluster + 5, b"e" * cluster)
    life.resize(7 * cluster + 512)
    life.resize(8 * cluster)
    life.compare()
    life.disk.close()
    if cluster <= SMALL:
        judged = Checker(images["image"].content)
        assert not judged.corruptions
        assert not judged.leaks
        assert judged.read() == life.model
    if cluster > SMALL or refcount_bits in (1, 64):
        images.check("image", tmp_path)
    if refcount_bits in (1, 64):
        images.compare("image", life.model, tmp_path)
