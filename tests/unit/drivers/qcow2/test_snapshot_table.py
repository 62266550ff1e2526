# SPDX-License-Identifier: Apache-2.0
"""Snapshot tables: kept as they are, and refused when they lie."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.snapshot_table import L1_RANGES_MAX, Snapshot, SnapshotTable, serialise
from blockemu.loop.memory_file import MemoryImage
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

CLUSTER = 65536


def with_snapshot(images: Images) -> tuple[MemoryImage, int]:
    """An image with one snapshot, and where its table is."""
    image = images.create("image", MIB)
    disk = images.open("image")
    disk.write(0, b"x" * CLUSTER)
    disk.ctx.run(disk.driver.snapshot_create("s"))
    disk.close()
    (table,) = struct.unpack_from(">Q", image.content, 64)
    return image, table


def refusal(images: Images) -> str:
    with pytest.raises(ImageError) as caught:
        images.open("image", read_only=True)
    assert "\n" not in str(caught.value)
    assert caught.value.name == "image"
    return caught.value.reason


def use_refusal(disk: Disk, *, delete: bool = False) -> str:
    driver = disk.driver
    with pytest.raises(ImageError) as caught:
        disk.ctx.run(driver.snapshot_delete("s") if delete else driver.snapshot_apply("s"))
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_claim_of_billions_of_snapshots_is_refused(images: Images) -> None:
    image, _ = with_snapshot(images)
    struct.pack_into(">I", image.content, 60, 2**31)
    assert refusal(images) == "2147483648 snapshots; 65536 is the limit"


def test_table_past_the_end_of_the_file_is_refused(images: Images) -> None:
    image, table = with_snapshot(images)
    struct.pack_into(">Q", image.content, 64, 1 << 40)
    assert "the snapshot table (40 bytes at offset 1099511627776) reaches past" in refusal(images)
    struct.pack_into(">Q", image.content, 64, table + 8)
    assert f"the snapshot table at offset {table + 8} is not aligned" in refusal(images)


def test_entry_past_the_end_of_the_file_is_refused(images: Images) -> None:
    image, table = with_snapshot(images)
    struct.pack_into(">I", image.content, 60, 2)
    del image.content[table + 100 :]
    assert f"snapshot table entry 1 at offset {table + 72} reaches past the end" in refusal(images)


def test_name_that_overruns_the_file_is_refused(images: Images) -> None:
    image, table = with_snapshot(images)
    del image.content[table + 4096 :]
    struct.pack_into(">H", image.content, table + 14, 65535)
    assert "snapshot table entry 0" in refusal(images)
    assert "reaches past the end of the file" in refusal(images)


def test_extra_data_without_bounds_is_refused(images: Images) -> None:
    image, table = with_snapshot(images)
    struct.pack_into(">I", image.content, table + 36, 2**32 - 1)
    assert refusal(images) == (
        f"snapshot table entry 0 at offset {table} has 4294967295 bytes of extra data; "
        "1024 is the limit"
    )


def test_table_over_64_mib_is_refused_before_it_is_read(images: Images) -> None:
    image, table = with_snapshot(images)
    struct.pack_into(">I", image.content, 60, 65536)
    entry = struct.pack(">QIHHIIQII", 3 * CLUSTER, 1, 0, 65535, 0, 0, 0, 0, 0) + bytes(65536)
    image.content[table:] = entry * 1030
    assert "makes the table larger than 64 MiB" in refusal(images)


def test_l1_table_that_cannot_be_is_refused_when_the_snapshot_is_used(images: Images) -> None:
    image, table = with_snapshot(images)
    good = bytes(image.content)
    for offset, fmt, value, words in (
        (0, ">Q", 12345, "the L1 table of snapshot 's' at offset 12345 is not aligned"),
        (0, ">Q", 1 << 50, "reaches past the end of the file"),
        (8, ">I", 2**32 - 1, "has 4294967295 entries; 32 MiB is the limit"),
        (8, ">I", 0, "has 0 entries, too few for 1048576 bytes"),
        (0, ">Q", 0, "the L1 table of snapshot 's' lies over other metadata (host cluster 0)"),
    ):
        image = images.files.add("image", good)
        struct.pack_into(fmt, image.content, table + offset, value)
        disk = images.open("image")
        assert disk.read(0, 1) == b"x"
        assert words in use_refusal(disk)
        assert words in use_refusal(disk, delete=True)
        disk.write(0, b"y")
        disk.close()
        if value:
            with pytest.raises(ImageError):
                images.open("image", read_only=True, snapshot="s")


def test_l2_table_in_other_metadata_is_refused(images: Images) -> None:
    """Deleting such a snapshot would free the refcount table."""
    image, table = with_snapshot(images)
    (l1,) = struct.unpack_from(">Q", image.content, table)
    (reftable,) = struct.unpack_from(">Q", image.content, 48)
    struct.pack_into(">Q", image.content, l1, reftable)
    disk = images.open("image")
    words = "the L2 table 0 of snapshot 's' lies over other metadata"
    assert words in use_refusal(disk)
    assert words in use_refusal(disk, delete=True)


@pytest.mark.parametrize("level", ["L1", "L2"])
def test_damaged_disk_goes_back_to_a_good_snapshot(
    images: Images, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = images.create("image", MIB)
    disk = images.open("image")
    disk.write(0, b"x" * MIB)
    disk.ctx.run(disk.driver.snapshot_create("s"))
    disk.write(0, b"y" * (MIB // 2))
    disk.close()
    (l1,) = struct.unpack_from(">Q", image.content, 40)
    (l2,) = struct.unpack_from(">Q", image.content, l1)
    place = l1 if level == "L1" else l2 & ~(1 << 63)
    struct.pack_into(">Q", image.content, place, 1 << 50)
    disk = images.open("image")
    caplog.set_level("CRITICAL")
    with pytest.raises(OSError, match="Input/output error"):
        disk.read(0, 512)
    with pytest.raises(OSError, match="Input/output error"):
        disk.ctx.run(disk.driver.snapshot_create("t"))
    disk.ctx.run(disk.driver.snapshot_apply("s"))
    assert disk.read(0, MIB) == b"x" * MIB
    disk.write(0, b"z")
    disk.close()
    judged = Checker(image.content)
    assert not judged.corruptions
    assert judged.snapshot_contents() == {"s": b"x" * MIB}


def test_snapshots_l1_table_counted_as_free_is_never_handed_out(images: Images) -> None:
    image, table = with_snapshot(images)
    (l1,) = struct.unpack_from(">Q", image.content, table)
    (reftable,) = struct.unpack_from(">Q", image.content, 48)
    (block,) = struct.unpack_from(">Q", image.content, reftable)
    for cluster in range(len(image.content) // CLUSTER):  # so that it is the first that is free
        (count,) = struct.unpack_from(">H", image.content, block + cluster * 2)
        struct.pack_into(">H", image.content, block + cluster * 2, max(count, 1))
    struct.pack_into(">H", image.content, block + l1 // CLUSTER * 2, 0)
    disk = images.open("image")
    with pytest.raises(OSError, match=f"host cluster {l1 // CLUSTER} at offset"):
        disk.write(CLUSTER, b"y" * CLUSTER)


def test_fields_and_unknown_extra_data_are_kept_when_the_table_is_written_anew(
    images: Images, tmp_path: Path
) -> None:
    image = images.create("image", MIB)
    disk = images.open("image")
    disk.ctx.run(disk.driver.snapshot_create("s"))
    disk.close()
    (table,) = struct.unpack_from(">Q", image.content, 64)
    (l1,) = struct.unpack_from(">Q", image.content, table)
    extra = struct.pack(">QQQ", 5 << 40, MIB, 2**64 - 1) + b"unknown to us"
    entry = (
        struct.pack(">QIHHIIQII", l1, 1, 2, 5, 77, 88, 99, 0, len(extra)) + extra + b"42\xffname"
    )
    image.content[table : table + len(entry)] = entry
    disk = images.open("image")
    (found,) = disk.driver.snapshots
    assert (found.id, found.name, found.vm_state_size) == ("42", "\udcffname", 5 << 40)
    assert (found.date_sec, found.date_nsec, found.vm_clock_nsec) == (77, 88, 99)
    assert found.icount is None
    assert "icount" not in disk.driver.info()["snapshots"][0]
    disk.ctx.run(disk.driver.snapshot_create("t"))
    disk.close()
    (moved,) = struct.unpack_from(">Q", image.content, 64)
    assert moved != table
    assert image.content[moved : moved + len(entry)] == entry
    assert images.open("image").driver.snapshots[1].id == "43"
    images.check("image", tmp_path)


def test_version_2_entry_without_extra_data_has_the_disks_size(
    images: Images, tmp_path: Path
) -> None:
    image = images.create("image", MIB, compat="0.10")
    disk = images.open("image")
    disk.write(0, b"x")
    disk.ctx.run(disk.driver.snapshot_create("s"))
    disk.close()
    (table,) = struct.unpack_from(">Q", image.content, 64)
    (l1,) = struct.unpack_from(">Q", image.content, table)
    entry = struct.pack(">QIHHIIQII", l1, 1, 1, 1, 0, 0, 0, 321, 0) + b"1s"
    image.content[table : table + 80] = entry.ljust(80, b"\0")
    disk = images.open("image")
    (found,) = disk.driver.snapshots
    assert (found.disk_size, found.vm_state_size) == (MIB, 321)
    disk.write(0, b"y")
    disk.ctx.run(disk.driver.snapshot_create("t"))
    disk.ctx.run(disk.driver.snapshot_apply("s"))
    assert disk.read(0, 1) == b"x"
    disk.close()
    assert images.open("image").driver.snapshots[0].vm_state_size == 321
    images.check("image", tmp_path)


def test_table_has_bounds_for_us_too() -> None:
    entry = Snapshot(id="1", name="n", l1_table_offset=0, l1_size=0, disk_size=0)
    with pytest.raises(ImageError, match="at most 65536 snapshots"):
        serialise("image", (entry,) * 65537)
    large = Snapshot(id="1", name="n" * 1200, l1_table_offset=0, l1_size=0, disk_size=0)
    with pytest.raises(ImageError, match="larger than 64 MiB"):
        serialise("image", (large,) * 65536)


def test_places_of_l1_tables_are_merged_and_bounded() -> None:
    def table(*places: tuple[int, int]) -> SnapshotTable:
        return SnapshotTable(
            entries=tuple(
                Snapshot(id="1", name="", l1_table_offset=offset, l1_size=size, disk_size=0)
                for offset, size in places
            )
        )

    assert table((0, 2), (8, 4), (800, 1)).l1_ranges(1000) == [(0, 16), (16, 24), (800, 8)]
    assert table((0, 2), (1000, 1), (8, 2**31)).l1_ranges(1000) == [(0, 16)]
    many = table(*((number << 25, 1 << 22) for number in range(65536)))
    assert sum(length for _, length in many.l1_ranges(1 << 60)) <= L1_RANGES_MAX


def test_random_damage_ends_in_errors_never_in_a_traceback(
    images: Images, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    original = images.create("image", 256 * KIB, cluster_size=512)
    disk = images.open("image")
    for name in ("s", "t"):
        disk.write(rng.randrange(100_000), rng.randbytes(50_000))
        disk.ctx.run(disk.driver.snapshot_create(name))
    disk.write(rng.randrange(100_000), rng.randbytes(50_000))
    disk.close()
    content = bytes(original.content)
    (table,) = struct.unpack_from(">Q", content, 64)
    (l1,) = struct.unpack_from(">Q", content, table)
    caplog.set_level("CRITICAL")
    for _ in range(200):
        image = images.files.add("image", content)
        for _ in range(rng.choice((1, 1, 4))):
            place = rng.choice((rng.randrange(56, 72), table + rng.randrange(160),
                                l1 + rng.randrange(64), rng.randrange(len(content))))  # fmt: skip
            image.content[place] ^= 1 << rng.randrange(8)
        try:
            disk = images.open("image")
        except ImageError:
            continue
        for verb in ("apply", "create", "delete", "delete"):
            driver = disk.driver
            call = {
                "apply": driver.snapshot_apply,
                "create": driver.snapshot_create,
                "delete": driver.snapshot_delete,
            }[verb]
            try:
                disk.ctx.run(call(rng.choice("st")))
                if disk.node.length_bytes:  # a snapshot may say that it has none
                    disk.write(rng.randrange(disk.node.length_bytes), b"w")
                disk.flush()
            except (ImageError, OSError):
                pass
        disk.abandon()
