# SPDX-License-Identifier: Apache-2.0
"""Another width for refcounts: after a power cut at any point the image has the old or the new one,
and is clean. What qemu-img makes of the results: tests/unit/img/test_amend.py."""

from __future__ import annotations

import random

import pytest

from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.qcow2.header import parse
from blockemu.drivers.qcow2.refcount_bits import change_refcount_bits
from blockemu.loop.memory_file import MemoryImage
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import CutDisk, Recorder
from tests.unit.drivers.qcow2.support import KIB, Images

DISK_BYTES = 200 * KIB
CUTS = 150


def change(images: Images, bits: int) -> None:
    async def run() -> None:
        node = await images.opener.open({"driver": "file", "filename": "image"})
        edge = BdrvChild(
            "file", node, parent=None, role=Role.DATA | Role.METADATA,
            perm=Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE,
            shared=Permission.CONSISTENT_READ, owner="test",
        )  # fmt: skip
        node.add_parent(edge)
        try:
            await change_refcount_bits("image", edge, bits)
        finally:
            node.remove_parent(edge)
            await node.close()

    images.ctx.run(run())


def guest_view(images: Images) -> bytes:
    disk = images.open("image", read_only=True)
    data = disk.read(0, DISK_BYTES)
    disk.close()
    return data


@pytest.mark.parametrize("cluster_size", [512, 4096])
@pytest.mark.parametrize(("old", "new"), [(16, 1), (16, 64), (1, 8), (64, 16)])
def test_power_cut_leaves_one_width_and_a_clean_image(
    images: Images, seed: int, cluster_size: int, old: int, new: int
) -> None:
    rng = random.Random(seed)
    images.create("image", DISK_BYTES, cluster_size=cluster_size, refcount_bits=old)
    disk = images.open("image")
    for _ in range(12):
        length = rng.choice((512, 3000, 9000))
        disk.write(rng.randrange((DISK_BYTES - length) // 512) * 512, rng.randbytes(length))
    disk.close()
    expected = guest_view(images)
    recorder = Recorder(images["image"], rng)
    change(images, new)
    operations = recorder.operations
    cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
    cuts = [rng.randrange(len(operations) + 1) for _ in range(CUTS)]
    cuts += [*range(max(len(operations) - 6, 0), len(operations) + 1)] * 5
    widths = set()
    for cut in sorted(cuts):
        left = bytes(cut_disk.after_cut(cut, rng))
        assert not Checker(left).corruptions, cut
        widths.add(1 << parse("image", left).refcount_order)
        images.files.images["image"] = MemoryImage(left)
        assert guest_view(images) == expected, cut
    assert widths == {old, new}
    assert not Checker(left).leaks


def test_width_that_it_has_already_writes_nothing(images: Images) -> None:
    images.create("image", DISK_BYTES)
    change(images, 16)
    assert not images["image"].operations("write", "zero")
