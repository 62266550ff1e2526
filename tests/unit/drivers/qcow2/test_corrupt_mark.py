# SPDX-License-Identifier: Apache-2.0
"""An image whose metadata contradicts itself is marked, saved as far as it goes, and left alone."""

from __future__ import annotations

import errno
import logging
import struct
from pathlib import Path

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.loop.memory_file import MemoryImage
from tests.peers.qemu import QemuImg, run_tool
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

CLUSTER = 512
TABLE = 32 * KIB
"""Guest bytes that one L2 table maps."""
FEATURES_LOW_BYTE = 79
CORRUPT = 2


def damaged(images: Images, *, compat: str = "1.1") -> MemoryImage:
    """The second L2 table counts as free. One cluster in front of it is free indeed: the first
    allocation does no harm, the second would take the table's place."""
    image = images.create("image", 4 * MIB, cluster_size=CLUSTER, compat=compat)
    disk = images.open("image")
    disk.write(0, b"a" * CLUSTER)
    disk.write(TABLE, b"b" * CLUSTER)
    disk.flush()
    disk.ctx.run(disk.node.pdiscard(0, CLUSTER))
    disk.close()
    (l1,) = struct.unpack_from(">Q", image.content, 40)
    (reftable,) = struct.unpack_from(">Q", image.content, 48)
    (block,) = struct.unpack_from(">Q", image.content, reftable)
    (second,) = struct.unpack_from(">Q", image.content, l1 + 8)
    place = (second & ~(1 << 63)) // CLUSTER
    struct.pack_into(">H", image.content, block + place * 2, 0)
    image.log.clear()
    return image


def meet_the_damage(disk: Disk) -> None:
    disk.write(CLUSTER, b"c" * CLUSTER)
    with pytest.raises(OSError, match="holds the active L2 table") as caught:
        disk.write(2 * CLUSTER, b"d" * CLUSTER)
    assert caught.value.errno == errno.EIO


def is_marked(image: MemoryImage) -> bool:
    return bool(image.content[FEATURES_LOW_BYTE] & CORRUPT)


def test_mark_is_set_and_durable(images: Images) -> None:
    image = damaged(images)
    disk = images.open("image")
    meet_the_damage(disk)
    assert is_marked(image)
    kinds = [operation.kind for operation in image.operations("write", "flush")]
    assert kinds[-2:] == ["write", "flush"]
    assert image.operations("write")[-1].offset == 0
    assert disk.driver.info()["format-specific"]["data"]["corrupt"] is True


def test_all_later_writes_fail_and_reads_go_on(images: Images) -> None:
    damaged(images)
    disk = images.open("image")
    meet_the_damage(disk)
    node = disk.node
    compressed = RequestFlags.WRITE_COMPRESSED
    for attempt in (
        node.pwritev(TABLE, memoryview(b"z" * CLUSTER)),  # in place
        node.pwritev(MIB, memoryview(b"z" * CLUSTER)),
        node.pwritev(MIB, memoryview(b"z" * CLUSTER), compressed),
        node.pwrite_zeroes(TABLE, CLUSTER),
        node.pdiscard(TABLE, CLUSTER),
        node.truncate(8 * MIB),
    ):
        with pytest.raises(OSError, match="marked corrupt") as caught:
            disk.ctx.run(attempt)
        assert caught.value.errno == errno.EIO
    assert node.read_only
    assert disk.read(0, 3 * CLUSTER) == bytes(CLUSTER) + b"c" * CLUSTER + bytes(CLUSTER)
    assert disk.read(TABLE, CLUSTER) == b"b" * CLUSTER
    disk.flush()


def test_line_in_the_log_says_what_to_do(images: Images, caplog: pytest.LogCaptureFixture) -> None:
    damaged(images)
    disk = images.open("image")
    with caplog.at_level(logging.ERROR):
        meet_the_damage(disk)
        with pytest.raises(OSError):
            disk.write(3 * CLUSTER, b"d")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all(line.startswith("image: ") for line in lines)
    assert "holds the active L2 table but is counted as free" in lines[0]
    assert "read-only from now on" in lines[1]
    assert "blockemu img check -r all image" in lines[1]


def test_marked_image_is_opened_for_reading_only(images: Images) -> None:
    damaged(images)
    disk = images.open("image")
    meet_the_damage(disk)
    disk.close()
    with pytest.raises(ImageError, match=r"marked corrupt.*blockemu img check -r all image"):
        images.open("image")
    again = images.open("image", read_only=True)
    assert again.read(CLUSTER, CLUSTER) == b"c" * CLUSTER
    again.close()


def test_what_was_written_before_is_saved_and_qemu_repairs_the_rest(
    images: Images, tmp_path: Path
) -> None:
    damaged(images)
    disk = images.open("image")
    meet_the_damage(disk)
    disk.close()
    path = images.save("image", tmp_path)
    run_tool(["qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", path], check=False)
    verdict = QemuImg.check(path)
    assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text
    images.load("image", path)
    disk = images.open("image")
    assert disk.read(0, 3 * CLUSTER) == bytes(CLUSTER) + b"c" * CLUSTER + bytes(CLUSTER)
    assert disk.read(TABLE, CLUSTER) == b"b" * CLUSTER
    disk.write(2 * CLUSTER, b"d" * CLUSTER)
    disk.close()
    images.check("image", tmp_path)


def test_version_2_has_no_mark_but_is_written_no_more(images: Images) -> None:
    image = damaged(images, compat="0.10")
    header = bytes(image.content[:CLUSTER])
    disk = images.open("image")
    meet_the_damage(disk)
    with pytest.raises(OSError, match="marked corrupt"):
        disk.write(TABLE, b"z")
    disk.close()
    assert image.content[:CLUSTER] == header


def test_map_leads_no_writes_past_the_mark(images: Images) -> None:
    damaged(images)
    disk = images.open("image")
    before = disk.driver.direct_map()
    assert before is not None
    disk.write(TABLE, b"b" * CLUSTER)
    assert before.lookup_write(TABLE, CLUSTER) >= 0
    meet_the_damage(disk)
    assert before.lookup_write(TABLE, CLUSTER) == -1
    disk.read(TABLE, CLUSTER)
    after = disk.driver.direct_map()
    assert after is not None
    after_read = disk.read(TABLE, CLUSTER)
    assert after_read == b"b" * CLUSTER
    assert after.lookup_read(TABLE, CLUSTER) >= 0
    assert after.lookup_write(TABLE, CLUSTER) == -1


def test_host_that_fails_while_marking_stops_writes_all_the_same(
    images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    image = damaged(images)
    disk = images.open("image")
    disk.write(CLUSTER, b"c" * CLUSTER)
    image.fault = lambda kind, offset, length: errno.EIO if kind == "write" else 0
    with caplog.at_level(logging.ERROR), pytest.raises(OSError, match="holds the active L2 table"):
        disk.write(2 * CLUSTER, b"d" * CLUSTER)
    image.fault = None
    assert "the last writes aren't all on the disk" in caplog.text
    assert "couldn't be marked as corrupt" in caplog.text
    assert not is_marked(image)
    with pytest.raises(OSError, match="marked corrupt"):
        disk.write(TABLE, b"z" * CLUSTER)
    with pytest.raises(OSError, match="no longer written"):
        disk.flush()
    assert disk.read(CLUSTER, CLUSTER) == b"c" * CLUSTER


def test_writes_under_way_end_one_way_or_the_other(images: Images) -> None:
    image = damaged(images)
    image.latency_ns = lambda kind, offset, length: 1000
    disk = images.open("image")
    tasks = [
        disk.ctx.spawn(disk.node.pwritev(number * CLUSTER, memoryview(b"w" * CLUSTER)))
        for number in range(1, 30)
    ]

    async def settle() -> list[int]:
        codes = []
        for task in tasks:
            try:
                await task
                codes.append(0)
            except OSError as error:
                codes.append(error.errno or -1)
        return codes

    codes = disk.ctx.run(settle())
    assert set(codes) <= {0, errno.EIO}
    assert errno.EIO in codes
    assert is_marked(image)
    assert image.operations("write")[-1].offset == 0, "written to after it was marked"
