# SPDX-License-Identifier: Apache-2.0
"""What write zeroes and discard make of each kind of cluster: the table in guest_erase.py."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.qcow2.cluster_map import Kind
from tests.peers.qemu import run_tool
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

CLUSTER = 4 * KIB
KEEP, UNMAP = RequestFlags.NONE, RequestFlags.MAY_UNMAP


def kinds(disk: Disk, clusters: int) -> list[Kind]:
    resolve = disk.driver.image.clusters.resolve
    return [disk.ctx.run(resolve(index * CLUSTER, 1)).kind for index in range(clusters)]


def prepared(images: Images, *, compat: str = "1.1", backing: bool = False) -> Disk:
    """Cluster 0 unallocated, 1 data, 2 zero and allocated, 3 zero."""
    options = {"backing_file": "base", "backing_fmt": "raw"} if backing else {}
    images.files.add("base", b"\xbb" * MIB)
    images.create("image", MIB, cluster_size=CLUSTER, compat=compat, **options)
    disk = images.open("image")
    disk.write(CLUSTER, b"x" * (3 * CLUSTER))
    if compat == "1.1":
        disk.ctx.run(disk.node.pwrite_zeroes(2 * CLUSTER, CLUSTER, KEEP))
        disk.ctx.run(disk.node.pdiscard(3 * CLUSTER, CLUSTER))
        disk.ctx.run(disk.node.pwrite_zeroes(3 * CLUSTER, CLUSTER, UNMAP))
    return disk


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("flags", [KEEP, UNMAP], ids=["keep", "unmap"])
def test_write_zeroes(images: Images, backing: bool, flags: RequestFlags) -> None:
    disk = prepared(images, backing=backing)
    bare = Kind.ZERO if backing else Kind.UNALLOCATED
    assert kinds(disk, 4) == [Kind.UNALLOCATED, Kind.DATA, Kind.ZERO_ALLOCATED, bare]
    disk.ctx.run(disk.node.pwrite_zeroes(0, 4 * CLUSTER, flags))
    held = Kind.ZERO if flags else Kind.ZERO_ALLOCATED
    assert kinds(disk, 4) == [bare, held, held, bare]
    assert disk.read(0, 4 * CLUSTER) == bytes(4 * CLUSTER)


@pytest.mark.parametrize("backing", [False, True])
def test_discard(images: Images, backing: bool) -> None:
    disk = prepared(images, backing=backing)
    disk.ctx.run(disk.node.pdiscard(0, 4 * CLUSTER))
    bare = Kind.ZERO if backing else Kind.UNALLOCATED
    assert kinds(disk, 4) == [Kind.UNALLOCATED, bare, bare, bare]
    assert disk.read(CLUSTER, 3 * CLUSTER) == bytes(3 * CLUSTER)
    assert disk.read(0, 1) == (b"\xbb" if backing else b"\0")


def test_version_2_unmaps_without_a_backing_file(images: Images) -> None:
    disk = prepared(images, compat="0.10")
    disk.ctx.run(disk.node.pwrite_zeroes(0, 3 * CLUSTER, KEEP | RequestFlags.NO_FALLBACK))
    disk.ctx.run(disk.node.pdiscard(3 * CLUSTER, CLUSTER))
    assert kinds(disk, 4) == [Kind.UNALLOCATED] * 4


def test_version_2_with_a_backing_file_writes_zeroes_and_keeps_on_discard(images: Images) -> None:
    disk = prepared(images, compat="0.10", backing=True)
    with pytest.raises(OSError) as caught:
        disk.ctx.run(disk.node.pwrite_zeroes(0, CLUSTER, UNMAP | RequestFlags.NO_FALLBACK))
    assert caught.value.errno == errno.ENOTSUP
    disk.ctx.run(disk.node.pwrite_zeroes(0, CLUSTER, UNMAP))
    disk.ctx.run(disk.node.pdiscard(CLUSTER, CLUSTER))
    assert kinds(disk, 2) == [Kind.DATA, Kind.DATA]
    assert disk.read(0, 2 * CLUSTER) == bytes(CLUSTER) + b"x" * CLUSTER


FAST = RequestFlags.NO_FALLBACK


@pytest.mark.parametrize(
    ("offset", "length", "fast"),
    [
        (0, 4 * CLUSTER, True),
        (CLUSTER, CLUSTER, True),
        (CLUSTER - 100, CLUSTER + 200, True),
        (CLUSTER + 10, 100, False),
        (CLUSTER, CLUSTER - 1, False),
        (CLUSTER // 2, CLUSTER, False),
        (2 * CLUSTER + 10, 100, True),  # zeroes already
        (3 * CLUSTER + 10, 10 * CLUSTER, True),
    ],
)
@pytest.mark.parametrize("flags", [KEEP, UNMAP], ids=["keep", "unmap"])
def test_fast_zeroes_are_of_whole_clusters_or_change_nothing(
    images: Images, offset: int, length: int, fast: bool, flags: RequestFlags
) -> None:
    disk = prepared(images)
    before = disk.read(0, MIB)
    if fast:
        disk.ctx.run(disk.node.pwrite_zeroes(offset, length, flags | FAST))
        assert disk.read(0, MIB) == (before[:offset] + bytes(length) + before[offset + length :])
    else:
        with pytest.raises(OSError) as caught:
            disk.ctx.run(disk.node.pwrite_zeroes(offset, length, flags | FAST))
        assert caught.value.errno == errno.ENOTSUP
        assert disk.read(0, MIB) == before


def test_zeroes_of_a_raw_data_file_arent_known_to_be_fast(images: Images) -> None:
    images.create("image", MIB, cluster_size=CLUSTER, data_file="data", data_file_raw=True)
    disk = images.open("image")
    with pytest.raises(OSError) as caught:
        disk.ctx.run(disk.node.pwrite_zeroes(0, MIB, FAST))
    assert caught.value.errno == errno.ENOTSUP


def test_parts_of_clusters_are_zeroed_and_not_discarded(images: Images) -> None:
    disk = prepared(images)
    disk.ctx.run(disk.node.pdiscard(CLUSTER + 10, 100))
    assert disk.read(CLUSTER, CLUSTER) == b"x" * CLUSTER
    disk.ctx.run(disk.node.pwrite_zeroes(CLUSTER + 10, 100))
    assert disk.read(CLUSTER, CLUSTER) == b"x" * 10 + bytes(100) + b"x" * (CLUSTER - 110)


def test_last_part_of_the_disk_counts_as_a_cluster(images: Images) -> None:
    images.create("image", 3 * CLUSTER + 512, cluster_size=CLUSTER)
    disk = images.open("image")
    disk.write(0, b"x" * (3 * CLUSTER + 512))
    disk.ctx.run(disk.node.pdiscard(3 * CLUSTER, 512))
    assert kinds(disk, 4)[3] is Kind.UNALLOCATED


def test_zero_write_to_an_allocated_zero_cluster_stays_where_it_is(images: Images) -> None:
    disk = prepared(images)
    resolve = disk.driver.image.clusters.resolve
    before = disk.ctx.run(resolve(2 * CLUSTER, 1)).host
    disk.write(2 * CLUSTER + 5, b"new")
    after = disk.ctx.run(resolve(2 * CLUSTER, 1))
    assert (after.kind, after.host) == (Kind.DATA, before)
    assert disk.read(2 * CLUSTER, CLUSTER) == bytes(5) + b"new" + bytes(CLUSTER - 8)


def test_a_huge_empty_range_costs_nothing(images: Images) -> None:
    image = images.create("image", 16 << 40)
    disk = images.open("image")
    image.log.clear()
    disk.ctx.run(disk.node.pwrite_zeroes(0, 16 << 40, UNMAP))
    disk.ctx.run(disk.node.pdiscard(0, 16 << 40))
    assert not image.log
    status = disk.ctx.run(disk.node.block_status(0, 16 << 40))
    assert (status.length, status.zero, status.allocated) == (16 << 40, True, False)


def test_qemu_sees_the_same_map(images: Images, tmp_path: Path) -> None:
    disk = prepared(images)
    disk.write(100 * KIB, b"z" * (64 * KIB))
    found = []
    offset = 0
    while offset < MIB:
        status = disk.ctx.run(disk.node.block_status(offset, MIB - offset))
        found.append((offset, status.length, status.data, status.zero, status.host_offset))
        offset += status.length
    disk.close()
    saved = images.save("image", tmp_path)
    theirs = json.loads(run_tool(["qemu-img", "map", "--output=json", "-f", "qcow2", saved]).stdout)
    assert found == [
        (item["start"], item["length"], item["data"], item["zero"], item.get("offset"))
        for item in theirs
    ]
