# SPDX-License-Identifier: Apache-2.0
"""What qcow2 publishes, and that it takes back what it is about to change."""

from __future__ import annotations

import pytest

from blockemu.drivers import bitmap_commands
from blockemu.drivers.direct_map import DirectMap
from blockemu.drivers.driver import RequestFlags
from blockemu.loop.sync import yield_now
from tests.peers.qemu import QemuImg, run_tool
from tests.unit.drivers.qcow2.support import MIB, Disk, Images

CLUSTER = 65536


def mapped(disk: Disk) -> DirectMap:
    found = disk.driver.direct_map()
    assert found is not None
    return found


@pytest.fixture
def disk(images: Images) -> Disk:
    images.create("image", 16 * MIB)
    return images.open("image")


def test_written_cluster_is_published_where_its_bytes_lie(images: Images, disk: Disk) -> None:
    direct = mapped(disk)
    disk.write(2 * CLUSTER, b"hello".ljust(CLUSTER, b"."))
    host = direct.lookup_write(2 * CLUSTER, 512)
    assert images["image"].content[host : host + 5] == b"hello"
    assert direct.lookup_read(2 * CLUSTER + 512, 512) == host + 512
    assert direct.lookup_read(3 * CLUSTER, 512) == -1


def test_read_publishes_after_reopening(images: Images, disk: Disk) -> None:
    disk.write(0, b"x" * (4 * CLUSTER))
    disk.close()
    disk = images.open("image", read_only=True)
    direct = mapped(disk)
    disk.read(100, 3 * CLUSTER)
    assert direct.lookup_read(0, 4 * CLUSTER) >= 0
    assert direct.lookup_write(0, 512) == -1


def test_unallocated_zero_and_compressed_clusters_are_not_published(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("c")
    raw = folder / "raw"
    raw.write_bytes(b"abc" * MIB)
    run_tool(["qemu-img", "convert", "-c", "-O", "qcow2", "-f", "raw", raw, folder / "image"])
    images.load("image", folder / "image")
    disk = images.open("image")
    direct = mapped(disk)
    disk.ctx.run(disk.node.pwrite_zeroes(0, CLUSTER))
    disk.read(0, 3 * MIB)
    assert not len(direct)


def test_nothing_is_writable_while_a_bitmap_records(disk: Disk) -> None:
    before = mapped(disk)
    disk.write(0, b"x" * CLUSTER)
    assert before.lookup_write(0, 512) >= 0
    bitmap = disk.ctx.run(bitmap_commands.add(disk.node, "b"))
    assert before.lookup_write(0, 512) == -1
    during = mapped(disk)
    for offset in (0, CLUSTER):
        disk.write(offset, b"y" * CLUSTER)
        assert during.lookup_write(offset, 512) == -1
        assert during.lookup_read(offset, 512) >= 0
    assert bitmap.count() == 2 * CLUSTER
    disk.ctx.run(bitmap_commands.disable(disk.node, "b"))
    after = mapped(disk)
    disk.write(0, b"z" * CLUSTER)
    assert after.lookup_write(0, 512) >= 0
    assert bitmap.count() == 2 * CLUSTER


def test_shared_cluster_is_not_writable_and_moves_when_written(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("s")
    QemuImg.create(folder / "image", MIB)
    run_tool(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 128k", folder / "image"])
    run_tool(["qemu-img", "snapshot", "-c", "s", folder / "image"])
    images.load("image", folder / "image")
    disk = images.open("image")
    direct = mapped(disk)
    disk.read(0, 512)
    old = direct.lookup_read(0, 512)
    assert old >= 0
    assert direct.lookup_write(0, 512) == -1
    disk.write(0, b"new")
    assert direct.lookup_write(0, 512) not in (-1, old)
    assert direct.lookup_read(0, 512) == direct.lookup_write(0, 512)


@pytest.mark.parametrize("change", ["zero", "unmap", "discard"])
def test_mapping_is_withdrawn_and_its_users_waited_for(disk: Disk, change: str) -> None:
    direct = mapped(disk)
    disk.write(0, b"x" * (3 * CLUSTER))
    pin = direct.pin()

    async def act() -> None:
        if change == "discard":
            await disk.node.pdiscard(CLUSTER, CLUSTER)
        else:
            flags = RequestFlags.MAY_UNMAP if change == "unmap" else RequestFlags.NONE
            await disk.node.pwrite_zeroes(CLUSTER, CLUSTER, flags)

    task = disk.ctx.spawn(act())
    disk.ctx.run(yield_now())
    assert not task.done()
    assert direct.lookup_read(CLUSTER, 512) == -1
    assert direct.lookup_read(0, 512) >= 0
    direct.unpin(pin)
    while not task.done():
        disk.ctx.poll(blocking=True)
    task.result()
    assert disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)


def test_map_is_dropped_on_resize_and_made_again(disk: Disk) -> None:
    direct = mapped(disk)
    disk.write(0, b"x" * CLUSTER)
    disk.ctx.run(disk.node.truncate(32 * MIB))
    assert direct.lookup_read(0, 512) == -1
    again = mapped(disk)
    assert again is not direct
    disk.write(31 * MIB, b"y" * CLUSTER)
    assert again.lookup_write(31 * MIB, 512) >= 0


def test_clusters_smaller_than_the_block_of_the_file_are_not_mapped(images: Images) -> None:
    images.create("small", MIB, cluster_size=512)
    images.files._direct_alignment = 4096
    assert images.open("small", direct=True).driver.direct_map() is None


def test_users_of_a_shared_cluster_are_waited_for_before_it_moves(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("s")
    QemuImg.create(folder / "image", MIB)
    run_tool(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 128k", folder / "image"])
    run_tool(["qemu-img", "snapshot", "-c", "s", folder / "image"])
    images.load("image", folder / "image")
    disk = images.open("image")
    direct = mapped(disk)
    disk.read(0, 512)
    pin = direct.pin()
    task = disk.ctx.spawn(disk.node.pwritev(0, memoryview(b"new")))
    disk.ctx.run(yield_now())
    assert not task.done()
    assert direct.lookup_read(0, 512) == -1
    direct.unpin(pin)
    while not task.done():
        disk.ctx.poll(blocking=True)
    task.result()
