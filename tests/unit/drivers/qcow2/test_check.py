# SPDX-License-Identifier: Apache-2.0
"""The check and its repair: each kind of damage is found, named and, where it can be, mended."""

from __future__ import annotations

import errno
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.findings import LINES_MAX, CheckResult
from blockemu.drivers.qcow2.header import EXTENSION_BITMAPS, Extension, parse
from blockemu.drivers.qcow2.metadata_walk import UNALIGNED_TABLES_MAX
from blockemu.drivers.qcow2.repair import Repair, check_image
from tests.unit.drivers.qcow2.crash import CutDisk, Recorder
from tests.unit.drivers.qcow2.structures import COMPRESSED, COPIED, OFFSET, Structures
from tests.unit.drivers.qcow2.support import KIB, MIB, Images

CLUSTER = 4096
DISK_BYTES = 4 * MIB
HEADER, REFTABLE, BLOCK, L1 = range(4)
"""Host clusters of an image that `create` made."""


def check(
    images: Images, repair: Repair | None = None, path: str = "image"
) -> tuple[CheckResult, list[str]]:
    """Check the image, through a file node of its own."""
    lines: list[str] = []

    async def run() -> CheckResult:
        node = await images.opener.open(
            {"driver": "file", "filename": path, "read-only": repair is None}
        )
        perm = Permission.CONSISTENT_READ
        if repair is not None:
            perm |= Permission.WRITE | Permission.RESIZE
        edge = BdrvChild(
            "file", node, parent=None, role=Role.DATA, perm=perm, shared=Permission.NONE
        )
        node.add_parent(edge)
        try:
            return await check_image(path, edge, repair=repair, say=lines.append)
        finally:
            node.remove_parent(edge)
            await node.close()

    return images.ctx.run(run()), lines


def counts(result: CheckResult) -> tuple[int, int, int]:
    return result.corruptions, result.leaks, result.check_errors


def guest_content(images: Images) -> bytes | None:
    """What the guest reads; None where it can't read it all."""
    disk = images.open("image", read_only=True)
    try:
        return disk.read(0, DISK_BYTES)
    except OSError:
        return None
    finally:
        disk.close()


@pytest.fixture
def image(images: Images) -> Structures:
    """16 guest clusters of data in two runs, in one L2 table; entry 20 is a zero cluster."""
    made = images.create("image", DISK_BYTES, cluster_size=CLUSTER)
    disk = images.open("image")
    disk.write(0, b"\x11" * 8 * CLUSTER)
    disk.write(30 * CLUSTER, b"\x22" * 8 * CLUSTER)
    disk.write(20 * CLUSTER, b"\x33" * CLUSTER)
    disk.flush()
    disk.ctx.run(disk.node.pwrite_zeroes(20 * CLUSTER, CLUSTER))
    disk.close()
    return Structures(made.content)


def test_clean_image_has_no_findings(images: Images, image: Structures, tmp_path: Path) -> None:
    result, lines = check(images)
    assert counts(result) == (0, 0, 0)
    assert not lines
    assert result.total_clusters == DISK_BYTES // CLUSTER
    assert result.allocated_clusters == 17
    assert result.image_end_offset == len(image.content)
    images.check("image", tmp_path)


class Damage(NamedTuple):
    """What is done to the image, and what a check must say of it."""

    do: Callable[[Structures], None]
    corruptions: int
    leaks: int
    words: str
    """In one of the lines."""
    remaining: int = 0
    """Corruptions that no repair can mend."""


def put_l1(value: Callable[[int], int]) -> Callable[[Structures], None]:
    return lambda image: image.put(image.l1_place(), value(image.get(image.l1_place())))


def put_l2(value: Callable[[int], int], index: int = 3) -> Callable[[Structures], None]:
    return lambda image: image.put(image.l2_place(index), value(image.get(image.l2_place(index))))


def put_reftable(value: Callable[[int], int], index: int = 0) -> Callable[[Structures], None]:
    return lambda image: image.put(
        image.reftable_place(index), value(image.get(image.reftable_place(index)))
    )


def set_refcount(cluster: int, value: int) -> Callable[[Structures], None]:
    return lambda image: image.set_refcount(cluster, value)


def data_cluster(image: Structures, index: int = 3) -> int:
    return (image.get(image.l2_place(index)) & OFFSET) // image.cluster


def share_cluster(image: Structures) -> None:
    """Two L2 entries name one cluster."""
    image.put(image.l2_place(3), image.get(image.l2_place(4)))


def misplace_zero(image: Structures) -> None:
    image.put(image.l2_place(20), image.get(image.l2_place(20)) | COPIED | 512 | 1)


def compress_with_flag(image: Structures) -> None:
    host = image.get(image.l2_place(3)) & OFFSET
    image.put(image.l2_place(3), COPIED | COMPRESSED | 7 << 58 | host)


def cut_file(image: Structures) -> None:
    """The file ends where it shouldn't; the last two data clusters are gone."""
    del image.content[-2 * CLUSTER :]


def lead_block_over_data(image: Structures) -> None:
    """The refcount table names a cluster of the guest's as one more block."""
    image.put(image.reftable_place(1), image.get(image.l2_place(3)) & OFFSET)


DAMAGES = {
    "leak": Damage(set_refcount(900, 1), 0, 0, ""),
    "leak-in-file": Damage(put_l2(lambda entry: 0), 0, 1, "refcount 1, 0 references"),
    "refcount-0": Damage(
        lambda image: image.set_refcount(data_cluster(image), 0), 2, 0, "refcount 0, 1 references"
    ),
    "refcount-2": Damage(
        lambda image: image.set_refcount(data_cluster(image), 2), 1, 1, "refcount 2, 1 references"
    ),
    "refcount-300": Damage(
        lambda image: image.set_refcount(data_cluster(image), 300), 1, 1, "refcount 300, 1 "
    ),
    "header-free": Damage(set_refcount(HEADER, 0), 1, 0, "host cluster 0 at 0x0: refcount 0"),
    "table-free": Damage(set_refcount(L1, 0), 1, 0, "refcount 0, 1 references"),
    "l2-copied-missing": Damage(put_l2(lambda entry: entry ^ COPIED), 1, 0, "has COPIED not set"),
    "l1-copied-missing": Damage(put_l1(lambda entry: entry ^ COPIED), 1, 0, "L1 entry at"),
    "shared-cluster": Damage(share_cluster, 1, 1, "refcount 1, 2 references"),
    "unaligned-data": Damage(put_l2(lambda entry: entry | 512), 2, 0, "not aligned", 1),
    "unaligned-zero": Damage(misplace_zero, 2, 0, "not aligned"),
    "data-past-end": Damage(
        put_l2(lambda _: COPIED | 1 << 40), 2, 1, "past the end of the file", 1
    ),
    "l2-reserved-bits": Damage(put_l2(lambda entry: entry | 1 << 57), 1, 0, "reserved bits", 1),
    "l2-reserved-alone": Damage(put_l2(lambda _: 1 << 57, 100), 1, 0, "reserved bits", 1),
    "l1-past-end": Damage(put_l1(lambda _: COPIED | 1 << 40), 2, 18, "past the end of the file", 1),
    "l1-flags-alone": Damage(put_l1(lambda _: COPIED), 1, 18, "names no table", 1),
    "l1-reserved-bits": Damage(put_l1(lambda entry: entry | 1), 1, 0, "reserved bits", 1),
    "compressed-copied": Damage(compress_with_flag, 1, 0, "is compressed and has COPIED"),
    "file-cut": Damage(cut_file, 2, 0, "past the end of the file", 2),
    "block-missing": Damage(put_reftable(lambda _: 0), 39, 0, "refcount 0"),
    "block-reserved-bits": Damage(put_reftable(lambda entry: entry | 2), 1, 1, "reserved bits"),
    "block-past-end": Damage(put_reftable(lambda _: 1 << 40), 40, 0, "past the end of the file"),
    "second-block-past-end": Damage(put_reftable(lambda _: 1 << 40, 1), 1, 0, "past the end"),
    "block-over-data": Damage(lead_block_over_data, 2, 0, "others name, too"),
    "block-over-header": Damage(put_reftable(lambda _: 0, 1), 0, 0, ""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_named(images: Images, image: Structures, damage: Damage) -> None:
    damage.do(image)
    before = bytes(image.content)
    result, lines = check(images)
    assert counts(result) == (damage.corruptions, damage.leaks, 0), lines
    assert not damage.words or any(damage.words in line for line in lines), lines
    assert all("\n" not in line for line in lines)
    assert image.content == before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_repair_leaves_what_nobody_can_know(
    images: Images, image: Structures, damage: Damage, tmp_path: Path
) -> None:
    damage.do(image)
    readable = guest_content(images)
    result, lines = check(images, Repair.ALL)
    assert (result.leaks, result.check_errors) == (0, 0), lines
    assert result.corruptions == damage.remaining, lines
    assert counts(check(images)[0]) == (damage.remaining, 0, 0)
    if readable is not None:
        assert guest_content(images) == readable
    if not damage.remaining:
        images.check("image", tmp_path)
        disk = images.open("image")
        disk.write(40 * CLUSTER, b"\x44" * 100 * CLUSTER)
        disk.close()
        images.check("image", tmp_path)


def test_unreadable_block_is_a_check_error_and_rebuilt(images: Images, image: Structures) -> None:
    put_reftable(lambda entry: entry | 1024)(image)
    readable = guest_content(images)
    result, lines = check(images)
    assert result.check_errors == len(image.content) // CLUSTER
    assert any("refcounts of host clusters 0+22 can't be read" in line for line in lines)
    result, _ = check(images, Repair.ALL)
    assert counts(result) == (0, 0, 0)
    assert guest_content(images) == readable


def test_repair_of_leaks_leaves_corruptions(images: Images, image: Structures) -> None:
    leaked, low = data_cluster(image, 5), data_cluster(image, 3)
    image.put(image.l2_place(5), 0)
    image.set_refcount(low, 0)
    result, _ = check(images, Repair.LEAKS)
    assert counts(result) == (2, 0, 0)
    assert (result.leaks_fixed, result.corruptions_fixed) == (1, 0)
    assert (image.refcount(leaked), image.refcount(low)) == (0, 0)


def test_repair_of_leaks_refuses_refcounts_that_must_be_rebuilt(
    images: Images, image: Structures
) -> None:
    put_reftable(lambda _: 0)(image)
    before = bytes(image.content)
    with pytest.raises(ImageError, match="which -r all does"):
        check(images, Repair.LEAKS)
    assert image.content == before


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_every_width_are_compared_and_rebuilt(
    images: Images, order: int, tmp_path: Path
) -> None:
    made = images.create("image", DISK_BYTES, cluster_size=512, refcount_bits=1 << order)
    disk = images.open("image")
    disk.write(0, b"\x11" * 2 * MIB)
    disk.close()
    image = Structures(made.content)
    assert counts(check(images)[0]) == (0, 0, 0)
    image.set_refcount(20, 0)
    image.put(image.l2_place(3), 0)
    result, _ = check(images)
    assert (result.corruptions >= 1, result.leaks) == (True, 1)
    put_reftable(lambda _: 0)(image)
    result, _ = check(images, Repair.ALL)
    assert counts(result) == (0, 0, 0)
    images.check("image", tmp_path)


def test_names_that_a_refcount_cannot_count_are_corruptions(images: Images) -> None:
    made = images.create("image", DISK_BYTES, cluster_size=512, refcount_bits=1)
    disk = images.open("image")
    disk.write(0, b"\x11" * 8 * 512)
    disk.close()
    image = Structures(made.content)
    image.put(image.l2_place(3), image.get(image.l2_place(4)))
    result, lines = check(images)
    assert counts(result) == (1, 1, 0)
    assert "more often than a refcount of 1 bits" in lines[0]
    assert counts(check(images, Repair.ALL)[0]) == (1, 0, 0)


def test_compressed_clusters_are_counted_in_each_host_cluster_that_they_touch(
    images: Images, image: Structures, tmp_path: Path
) -> None:
    data = zlib.compress(random.Random(1).randbytes(3000) + bytes(1096), 9, -12)
    first = data_cluster(image, 3)
    offset = first * CLUSTER + CLUSTER - 1000
    image.content[offset : offset + len(data)] = data
    sectors = (offset + len(data) - 1) // 512 - offset // 512
    image.put(image.l2_place(3), COMPRESSED | sectors << 58 | offset)
    image.put(image.l2_place(4), 0)
    result, lines = check(images)
    assert counts(result) == (0, 0, 0), lines
    assert (result.compressed_clusters, result.allocated_clusters) == (1, 16)
    images.check("image", tmp_path)
    image.set_refcount(first + 1, 0)
    assert check(images)[0].corruptions == 1
    assert counts(check(images, Repair.ALL)[0]) == (0, 0, 0)


@pytest.mark.parametrize("bit", [1, 2])
def test_dirty_and_corrupt_bits_go_when_the_image_is_clean(
    images: Images, image: Structures, bit: int
) -> None:
    image.put(72, bit)
    assert counts(check(images)[0]) == (0, 0, 0)
    assert image.get(72) == bit
    check(images, Repair.ALL)
    assert image.get(72) == 0


def test_corrupt_bit_stays_where_corruptions_remain(images: Images, image: Structures) -> None:
    image.put(72, 2)
    put_l2(lambda entry: entry | 512)(image)
    assert check(images, Repair.ALL)[0].corruptions == 1
    assert image.get(72) == 2


def test_table_that_cannot_be_read_is_an_error_and_nothing_is_freed(
    images: Images, image: Structures
) -> None:
    table = image.l2_place()
    images["image"].fault = lambda kind, offset, length: (
        errno.EIO if kind == "read" and offset == table else 0
    )
    result, lines = check(images)
    assert result.check_errors == 1
    assert any(line.startswith("error: ") and f"{table:#x}" in line for line in lines)
    before = bytes(image.content)
    with pytest.raises(ImageError, match="can't be read"):
        check(images, Repair.ALL)
    assert image.content == before


@pytest.mark.parametrize("place", [40, 48])
def test_header_that_names_no_place_is_refused(
    images: Images, image: Structures, place: int
) -> None:
    image.put(place, image.get(place) + 512)
    with pytest.raises(ImageError, match="not aligned"):
        check(images)


def test_l1_table_past_the_end_is_refused(images: Images, image: Structures) -> None:
    image.put(40, 1 << 40)
    with pytest.raises(ImageError, match=r"the L1 table .* reaches past the end"):
        check(images, Repair.ALL)


def test_refcount_table_past_the_end_is_rebuilt(images: Images, image: Structures) -> None:
    readable = guest_content(images)
    image.put(48, 1 << 40)
    assert check(images)[0].corruptions > 0
    assert counts(check(images, Repair.ALL)[0]) == (0, 0, 0)
    assert guest_content(images) == readable


def test_new_refcounts_never_go_where_an_entry_names_a_place_past_the_end(
    images: Images, image: Structures
) -> None:
    """A file that was cut off: its last data clusters would have become the refcount table."""
    put_reftable(lambda _: 0)(image)
    cut_file(image)
    before = bytes(image.content)
    with pytest.raises(ImageError, match="no room inside the file"):
        check(images, Repair.ALL)
    assert image.content == before
    for index in range(30, 34):
        image.put(image.l2_place(index), 0)
    length = len(image.content)
    assert counts(check(images, Repair.ALL)[0]) == (2, 0, 0)
    assert len(image.content) == length


def test_lines_are_bounded_and_counts_are_not(images: Images) -> None:
    made = images.create("image", DISK_BYTES, cluster_size=65536)
    made.content.extend(bytes(4 * LINES_MAX * 65536))
    image = Structures(made.content)
    for index in range(100, 100 + 3 * LINES_MAX, 2):
        image.set_refcount(index, 1)
    result, lines = check(images)
    assert counts(result) == (0, 1.5 * LINES_MAX, 0)
    assert len(lines) == LINES_MAX + 1
    assert lines[-1] == f"... and {LINES_MAX // 2} more findings"


def add_snapshots(image: Structures, entries: list[tuple[int, int]], extra: int = 16) -> None:
    """A snapshot table at the end of the file, which isn't counted."""
    offset = len(image.content)
    for l1_offset, l1_entries in entries:
        entry = struct.pack(">QIHHIIQII", l1_offset, l1_entries, 1, 0, 0, 0, 0, 0, extra)
        entry += bytes(extra) + b"1"
        image.content += entry + bytes(-len(entry) % 8)
    image.content += bytes(-len(image.content) % CLUSTER)
    struct.pack_into(">IQ", image.content, 60, len(entries), offset)


def test_snapshot_is_walked_and_its_names_are_counted(images: Images, image: Structures) -> None:
    readable = guest_content(images)
    l1 = len(image.content)
    image.content += image.content[image.l1_offset : image.l1_offset + CLUSTER]
    add_snapshots(image, [(l1, image.l1_entries)])
    result, lines = check(images)
    # its L1 table, the snapshot table; an L2 table and 17 clusters count 1 and are named twice
    assert counts(result) == (2 + 18, 0, 0), lines
    assert counts(check(images, Repair.ALL)[0]) == (0, 0, 0)
    assert image.refcount(data_cluster(image)) == 2
    assert not image.get(image.l2_place()) & COPIED
    assert guest_content(images) == readable


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ((512, 1), "not aligned"),
        ((1 << 50, 1), "past the end of the file"),
        ((0, 2**32 - 1), "more than 32 MiB"),
    ],
)
def test_snapshot_whose_l1_table_is_nowhere_is_a_corruption(
    images: Images, image: Structures, entry: tuple[int, int], words: str
) -> None:
    add_snapshots(image, [entry])
    _, lines = check(images)
    assert any(words in line for line in lines), lines


@pytest.mark.parametrize("extra", [0, 1032])
def test_snapshot_entry_without_its_extra_data_or_too_much_is_a_corruption(
    images: Images, image: Structures, extra: int
) -> None:
    add_snapshots(image, [(image.l1_offset, 1)], extra=extra)
    assert any(f"has {extra} bytes of extra data" in line for line in check(images)[1])


def add_bitmaps(
    image: Structures, directory: bytes, *, bitmaps: int = 1, offset: int | None = None
) -> None:
    """A bitmaps extension, and a directory in a cluster at the end of the file."""
    if offset is None:
        offset = len(image.content)
        image.content += directory.ljust(CLUSTER, b"\0")
    header = parse("image", bytes(image.content[:CLUSTER]))
    extension = struct.pack(">IIQQ", bitmaps, 0, len(directory), offset)
    header.extensions.append(Extension(EXTENSION_BITMAPS, extension))
    header.autoclear_features = 1
    start = header.serialise("image")
    image.content[: len(start)] = start


def bitmap(table: int, entries: int) -> bytes:
    return struct.pack(">QIIBBHI", table, entries, 2, 1, 16, 3, 0) + b"one\0\0\0\0\0"


def test_bitmaps_are_walked_where_they_are_valid(images: Images, image: Structures) -> None:
    table = len(image.content)
    words = struct.pack(">4Q", table + CLUSTER, 1, 0, table + 512)
    image.content += words.ljust(CLUSTER, b"\0") + bytes(CLUSTER)
    add_bitmaps(image, bitmap(table, 4))
    result, lines = check(images)
    # its data, its table and the directory count 0; one entry isn't aligned
    assert counts(result) == (3 + 1, 0, 0), lines
    assert any("bitmap table entry at" in line for line in lines)
    assert counts(check(images, Repair.ALL)[0]) == (1, 0, 0)
    assert image.get(88) == 1
    image.put(88, 0)
    assert counts(check(images)[0]) == (0, 3, 0)


@pytest.mark.parametrize(
    ("directory", "words"),
    [
        (bitmap(512, 1), "is not possible"),
        (bitmap(CLUSTER, (1 << 27) + 1), "is not possible"),
        (bitmap(1 << 40, 1), "past the end of the file"),
        (bitmap(CLUSTER, 1)[:20], "reaches past the directory's end"),
        (struct.pack(">QIIBBHI", 0, 0, 0, 1, 16, 3, 2**32 - 1), "reaches past the directory's"),
    ],
)
def test_bitmap_that_can_not_be_is_a_corruption(
    images: Images, image: Structures, directory: bytes, words: str
) -> None:
    add_bitmaps(image, directory)
    _, lines = check(images)
    assert any(words in line for line in lines), lines


@pytest.mark.parametrize(("bitmaps", "offset"), [(0, 0), (65536, 0), (1, 512)])
def test_bitmap_directory_that_can_not_be_is_refused(
    images: Images, image: Structures, bitmaps: int, offset: int
) -> None:
    add_bitmaps(image, bitmap(CLUSTER, 1), bitmaps=bitmaps, offset=offset)
    with pytest.raises(ImageError, match=f"{bitmaps} bitmaps in a directory"):
        check(images)


def test_unaligned_tables_are_looked_at_up_to_a_bound(images: Images) -> None:
    """What such a table seems to name is counted; of a thousand tables, nobody wants to know."""
    made = images.create("image", 512 * MIB, cluster_size=CLUSTER)
    places = [
        len(made.content) + index * CLUSTER + 512 for index in range(UNALIGNED_TABLES_MAX + 8)
    ]
    made.content += bytes((len(places) + 2) * CLUSTER)
    image = Structures(made.content)
    last = len(made.content) // CLUSTER - 1
    for index, place in enumerate(places):
        image.put(image.l1_place(index), place)
    image.put(places[0], (last - 1) * CLUSTER)
    image.put(places[-1], last * CLUSTER)
    _, lines = check(images)
    assert sum("not aligned" in line for line in lines) == len(places)
    named = too_low(lines)
    assert last - 1 in named
    assert last not in named


def test_tables_that_lie_over_each_other_are_not_followed(
    images: Images, image: Structures
) -> None:
    """60000 snapshots whose L1 tables each begin a little later would be walked for hours."""
    image.content += bytes(64 * KIB)
    add_snapshots(image, [((4 + index) * CLUSTER, 1024) for index in range(60)])
    _, lines = check(images)
    assert any("lies over others" in line for line in lines), lines


def too_low(lines: list[str]) -> set[int]:
    """Host clusters that count less than they are named: these may be handed out again."""
    found: set[int] = set()
    for line in lines:
        match = re.match(r"corruption: host clusters? (\d+)(?:\+(\d+))? ", line)
        if match is not None:
            first = int(match[1])
            found.update(range(first, first + int(match[2] or 1)))
    return found


def test_power_cut_during_a_repair_leaves_an_image_no_worse(
    images: Images, image: Structures, seed: int
) -> None:
    rng = random.Random(seed)
    for damage in ("refcount-0", "refcount-2", "shared-cluster", "block-missing", "block-over-data",
                   "leak-in-file", "unaligned-zero"):  # fmt: skip
        content = bytes(image.content)
        target = images.files.add("image", content)
        DAMAGES[damage].do(Structures(target.content))
        readable = guest_content(images)
        low = too_low(check(images)[1])
        recorder = Recorder(images["image"], rng)
        check(images, Repair.ALL)
        operations = list(recorder.operations)
        cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
        for cut in range(len(operations) + 1):
            images.files.add("image", bytes(cut_disk.after_cut(cut, rng)))
            assert readable in (None, guest_content(images)), (damage, cut)
            _, lines = check(images)
            assert too_low(lines) <= low, (damage, cut, lines)
            result, lines = check(images, Repair.ALL)
            assert counts(result) == (0, 0, 0), (damage, cut, lines)
            assert readable in (None, guest_content(images)), (damage, cut)
