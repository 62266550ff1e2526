# SPDX-License-Identifier: Apache-2.0
"""Space: found, counted, grown into, given back, at every width."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockemu.drivers.qcow2.metadata_writer import Reference
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, MIB, Images


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_blocks_and_table_grow_at_every_width(
    images: Images, tmp_path: Path, refcount_bits: int
) -> None:
    size = 3 * MIB
    image = images.create("image", size, cluster_size=512, refcount_bits=refcount_bits)
    disk = images.open("image")
    for offset in range(0, size, 96 * KIB):
        disk.write(offset, bytes((offset >> 16 & 0xFF,)) * (96 * KIB))
    blocks = sum(map(bool, disk.driver.image.writer.reftable.words))
    assert blocks >= size // 512 * refcount_bits // (512 * 8)
    disk.close()
    assert not Checker(image.content).leaks
    images.check("image", tmp_path)


def test_refcount_table_moves_more_than_once(images: Images, tmp_path: Path) -> None:
    size = 12 * MIB
    images.create("image", size, cluster_size=512, refcount_bits=64)
    disk = images.open("image")
    places = set()
    for offset in range(0, size, 512 * KIB):
        disk.write(offset, b"\x77" * (512 * KIB))
        places.add(disk.driver.image.header.refcount_table_offset)
    disk.close()
    assert len(places) >= 3
    images.check("image", tmp_path)
    images.compare("image", b"\x77" * size, tmp_path)


def test_holes_are_filled_before_the_file_grows(images: Images) -> None:
    image = images.create("image", 16 * MIB, cluster_size=4096)
    disk = images.open("image")
    disk.write(0, b"x" * MIB)
    for offset in range(0, MIB, 8192):
        disk.ctx.run(disk.node.pdiscard(offset, 4096))
    disk.flush()
    end = disk.driver.image.refcounts.used_end
    disk.write(8 * MIB, b"y" * (MIB // 2 - 8192))
    assert disk.driver.image.refcounts.used_end == end
    assert disk.read(8 * MIB, MIB // 2 - 8192) == b"y" * (MIB // 2 - 8192)
    disk.close()
    assert not Checker(image.content).leaks


def test_plain_allocation_takes_what_is_free_and_leaves_the_rest_to_the_slow_way(
    images: Images,
) -> None:
    image = images.create("image", 16 * MIB, cluster_size=4096)
    disk = images.open("image")
    qcow2 = disk.driver.image
    refcounts = qcow2.refcounts
    assert refcounts.allocate_at_once(1) is None  # the block must be read
    disk.write(0, b"x" * 8192)
    taken = refcounts.allocate_at_once(3)
    assert taken is not None
    assert [disk.ctx.run(refcounts.get(taken.first + step)) for step in range(4)] == [1, 1, 1, 0]
    rest = qcow2.file.length // 4096 - refcounts.used_end
    assert refcounts.allocate_at_once(rest + 1) is None  # the file must grow
    disk.ctx.run(disk.node.pdiscard(0, 4096))
    disk.ctx.run(qcow2.writer.flush())
    assert qcow2.writer.released
    assert refcounts.allocate_at_once(1) is None  # what was let go must be counted down first
    disk.ctx.run(refcounts.release(Reference(taken.first, taken.clusters)))
    disk.close()
    assert not Checker(image.content).leaks


def test_file_ends_behind_the_last_cluster_after_close(images: Images) -> None:
    image = images.create("image", 16 * MIB)
    before = len(image.content)
    disk = images.open("image")
    disk.write(0, b"x" * 512)
    assert len(image.content) > before + 2 * 65536  # grown ahead
    disk.close()
    assert len(image.content) == before + 2 * 65536  # an L2 table and a cluster


def test_unaligned_write_to_new_cluster_writes_no_more_than_its_sectors(images: Images) -> None:
    image = images.create("image", 16 * MIB)
    disk = images.open("image")
    disk.write(0, b"x" * 512)
    image.log.clear()
    disk.write(3 * 65536 + 700, b"y" * 100)
    assert [operation.length for operation in image.operations("write")] == [512]
    assert disk.read(3 * 65536, 65536) == bytes(700) + b"y" * 100 + bytes(65536 - 800)


def test_reused_cluster_shows_nothing_of_its_past(images: Images) -> None:
    images.create("image", 16 * MIB)
    disk = images.open("image", pass_discard_request=False)
    disk.write(0, b"secret! " * 8192)
    disk.ctx.run(disk.node.pdiscard(0, 65536))
    disk.flush()
    disk.write(5 * 65536 + 100, b"y")
    assert disk.read(5 * 65536, 65536) == bytes(100) + b"y" + bytes(65536 - 101)


@pytest.mark.parametrize("direct", [False, True])
def test_metadata_is_written_in_whole_blocks_of_the_file(images: Images, direct: bool) -> None:
    image = images.create("image", 16 * MIB)
    images.files._direct_alignment = 4096
    disk = images.open("image", direct=direct)
    disk.write(0, b"x" * 4096)
    image.log.clear()
    disk.flush()
    lengths = {operation.length for operation in image.operations("write")}
    assert lengths == ({4096} if direct else {512})
    assert not image.operations("read")
