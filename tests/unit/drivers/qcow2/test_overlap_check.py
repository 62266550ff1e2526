# SPDX-License-Identifier: Apache-2.0
"""Writes that an entry or a refcount sends over metadata: refused, for each structure and template,
as QEMU refuses them.

Each test makes one image lie, writes to it by qemu-io, and writes to a copy of it by our driver.
"""

from __future__ import annotations

import errno
import logging
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.options import STRUCTURES, TEMPLATES, take_overlap_checks
from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.unit.drivers.qcow2.structures import COPIED, OFFSET, Structures
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

CLUSTER = 4 * KIB
TABLE = 2 * MIB
"""Guest bytes that one L2 table maps."""
WRITTEN = 3 * CLUSTER
"""A guest cluster whose L2 entry is made to lie."""
EMPTY = 100 * CLUSTER
"""One that has none, in a table that is there."""
CORRUPT = 2
NAMEABLE = [name for name in STRUCTURES if name != "main-header"]
"""To an entry, offset 0 is nowhere."""
BITMAPS = 0x23852875


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image with everything in it: a snapshot whose tables are its own, and a bitmap."""
    path = tmp_path_factory.mktemp("overlap") / "pristine.qcow2"
    QemuImg.create(path, 8 * MIB, options={"cluster_size": CLUSTER})
    QemuIo(path, fmt="qcow2").run("write -P 1 0 64k", "write -P 2 2M 64k")
    run_tool(["qemu-img", "snapshot", "-c", "then", path])
    run_tool(["qemu-img", "bitmap", "--add", "--disable", path, "changes"])
    QemuIo(path, fmt="qcow2").run("write -P 3 0 64k", "write -P 4 2M 64k", "write -P 5 4M 64k")
    verdict = QemuImg.check(path)
    assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text
    content = path.read_bytes()
    content += bytes(-len(content) % CLUSTER)
    image = Structures(bytearray(content))
    for cluster in range(len(content) // CLUSTER):  # leaks, so that what we free is the first free
        image.set_refcount(cluster, max(image.refcount(cluster), 1))
    return bytes(image.content)


def place_of(structure: str, content: bytes) -> int:
    """The host offset of one cluster of a structure."""
    found = Structures(bytearray(content))
    snapshot_l1: int = struct.unpack_from(">Q", content, found.snapshots_offset)[0]
    return {
        "main-header": 0,
        "active-l1": found.l1_offset,
        "active-l2": found.get(found.l1_place(1)) & OFFSET,
        "refcount-table": found.reftable_offset,
        "refcount-block": found.get(found.reftable_place()),
        "snapshot-table": found.snapshots_offset,
        "inactive-l1": snapshot_l1,
        "inactive-l2": found.get(snapshot_l1) & OFFSET,
        "bitmap-directory": bitmap_directory(content),
    }[structure]


def bitmap_directory(content: bytes) -> int:
    at: int = struct.unpack_from(">I", content, 100)[0]
    while True:
        kind, length = struct.unpack_from(">II", content, at)
        assert kind, "no bitmaps"
        if kind == BITMAPS:
            offset: int = struct.unpack_from(">Q", content, at + 8 + 16)[0]
            return offset
        at += 8 + -(-length // 8) * 8


def with_an_entry_to(place: int, content: bytes) -> bytearray:
    """The guest's cluster at WRITTEN lies at `place`, it says, and is ours alone."""
    image = Structures(bytearray(content))
    image.put(image.l2_place(WRITTEN // CLUSTER), place | COPIED)
    return image.content


def counted_as_free(place: int, content: bytes) -> bytearray:
    image = Structures(bytearray(content))
    image.set_refcount(place // CLUSTER, 0)
    return image.content


class Verdict(NamedTuple):
    """What became of a write, and of the image."""

    written: bool
    marked: bool


def by_qemu(content: bytearray, offset: int, option: str, path: Path) -> Verdict:
    path.write_bytes(content)
    opts = f"driver=qcow2,{option},discard=unmap,file.filename={path}"
    done = run_tool(
        ["qemu-io", "--image-opts", opts, "-c", f"write -P 9 {offset} {CLUSTER}"], check=False
    )
    return Verdict("wrote " in done.stdout, is_marked(path.read_bytes()))


def is_marked(content: bytes | bytearray) -> bool:
    assert content[:4] == b"QFI\xfb", "the header is gone"
    return bool(content[79] & CORRUPT)


def by_us(content: bytearray, offset: int, option: str, images: Images) -> Verdict:
    images.files.add("image", bytes(content))
    disk = images.open("image", **options_of(option))
    code = 0
    try:
        disk.write(offset, b"\x09" * CLUSTER)
    except OSError as error:
        code = error.errno or -1
    assert code in (0, errno.EIO)
    assert disk.node.read_only is bool(code)
    if code:
        disk.close()
    else:
        disk.abandon()  # close would write more into an image that has lost its tables
    return Verdict(not code, is_marked(images["image"].content))


def options_of(option: str) -> dict[str, Any]:
    return {key: value for key, _, value in (part.partition("=") for part in option.split(","))}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("structure", NAMEABLE)
def test_entry_that_names_metadata_meets_qemus_verdict(
    images: Images, pristine: bytes, structure: str, template: str, tmp_path: Path
) -> None:
    content = with_an_entry_to(place_of(structure, pristine), pristine)
    option = f"overlap-check={template}"
    ours = by_us(content, WRITTEN, option, images)
    assert ours == by_qemu(content, WRITTEN, option, tmp_path / "image.qcow2")
    assert ours.written is (STRUCTURES[structure] not in TEMPLATES[template])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_count_that_calls_metadata_free_meets_qemus_verdict(
    images: Images, pristine: bytes, structure: str, template: str, tmp_path: Path
) -> None:
    content = counted_as_free(place_of(structure, pristine), pristine)
    option = f"overlap-check={template}"
    ours = by_us(content, EMPTY, option, images)
    assert ours == by_qemu(content, EMPTY, option, tmp_path / "image.qcow2")


@pytest.mark.parametrize("structure", NAMEABLE)
def test_single_structure_is_turned_on_and_off_as_in_qemu(
    images: Images, pristine: bytes, structure: str, tmp_path: Path
) -> None:
    content = with_an_entry_to(place_of(structure, pristine), pristine)
    for option, written in (
        (f"overlap-check=none,overlap-check.{structure}=on", False),
        (f"overlap-check.template=all,overlap-check.{structure}=off", True),
    ):
        ours = by_us(content, WRITTEN, option, images)
        assert ours == by_qemu(content, WRITTEN, option, tmp_path / "image.qcow2")
        assert ours.written is written


@pytest.mark.parametrize(
    "structure", [name for name in NAMEABLE if name not in ("active-l2", "bitmap-directory")]
)
def test_table_that_lies_over_other_metadata_is_not_changed(
    images: Images, pristine: bytes, structure: str, tmp_path: Path
) -> None:
    """The fourth L1 entry, unused so far, names as an L2 table what is something else. A write
    would enter a cluster there."""
    image = Structures(bytearray(pristine))
    place = place_of(structure, pristine)
    image.put(image.l1_place(3), place | COPIED)
    # An entry that is 0, so that QEMU has nothing to say of what it finds there.
    last = next(
        index for index in reversed(range(CLUSTER // 8)) if not image.get(place + index * 8)
    )
    offset = 3 * TABLE + last * CLUSTER
    ours = by_us(image.content, offset, "overlap-check=all", images)
    assert ours == by_qemu(image.content, offset, "overlap-check=all", tmp_path / "image.qcow2")
    assert ours.written is False


def test_image_whose_bitmap_directory_is_a_table_as_well_is_not_opened_to_write(
    images: Images, pristine: bytes
) -> None:
    image = Structures(bytearray(pristine))
    place = place_of("bitmap-directory", pristine)
    image.put(image.l1_place(3), place | COPIED)
    images.files.add("image", bytes(image.content))
    with pytest.raises(ImageError, match=f"bitmap directory, at offset {place:#x}, lies over"):
        images.open("image")


@pytest.mark.parametrize("structure", ["active-l1", "active-l2", "snapshot-table", "inactive-l1"])
def test_block_that_lies_over_other_metadata_is_not_changed(
    images: Images, pristine: bytes, structure: str
) -> None:
    image = Structures(bytearray(pristine))
    place = place_of(structure, pristine)
    image.put(image.reftable_place(), place)
    assert by_us(image.content, EMPTY, "overlap-check=all", images) == (False, True)


def test_line_names_structure_and_offset(
    images: Images, pristine: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    place = place_of("refcount-block", pristine)
    images.files.add("image", bytes(with_an_entry_to(place, pristine)))
    disk = images.open("image")
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            with pytest.raises(OSError):
                disk.write(WRITTEN + 512, b"x" * 512)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == (
        "image: qcow2 metadata is damaged: host cluster"
        f" {place // CLUSTER} at offset {place:#x} holds the refcount block but is named by an L2"
        " entry"
    )
    assert len(lines) == 2, "the second is what to do"


def test_reads_go_on(images: Images, pristine: bytes) -> None:
    images.files.add("image", bytes(with_an_entry_to(place_of("active-l1", pristine), pristine)))
    disk = images.open("image")
    with pytest.raises(OSError):
        disk.write(WRITTEN, b"x")
    assert disk.read(0, CLUSTER) == b"\x03" * CLUSTER
    with pytest.raises(OSError, match="marked corrupt"):
        disk.write(0, b"x")


# --- past the driver ---


def reuse(images: Images, pristine: bytes) -> tuple[Disk, int]:
    """An image whose first free cluster is named by an L2 entry."""
    image = Structures(bytearray(pristine))
    place = image.get(image.l2_place(WRITTEN // CLUSTER)) & OFFSET
    image.set_refcount(place // CLUSTER, 0)
    images.files.add("image", bytes(image.content))
    return images.open("image"), place


def test_direct_map_leads_no_write_over_metadata(images: Images, pristine: bytes) -> None:
    """The cluster is read first, and so published."""
    images.files.add("image", bytes(with_an_entry_to(place_of("active-l2", pristine), pristine)))
    disk = images.open("image")
    found = disk.driver.direct_map()
    assert found is not None
    disk.read(0, CLUSTER)
    assert found.lookup_write(0, CLUSTER) >= 0
    disk.read(WRITTEN, CLUSTER)
    assert found.lookup_read(WRITTEN, CLUSTER) == place_of("active-l2", pristine)
    assert found.lookup_write(WRITTEN, CLUSTER) == -1


def test_table_takes_no_place_that_the_direct_map_leads_to(images: Images, pristine: bytes) -> None:
    disk, place = reuse(images, pristine)
    found = disk.driver.direct_map()
    assert found is not None
    disk.read(WRITTEN, CLUSTER)
    assert found.lookup_write(WRITTEN, CLUSTER) == place
    with pytest.raises(OSError, match="holds data of the guest but is counted as free"):
        disk.write(3 * TABLE, b"x" * CLUSTER)  # wants an L2 table first
    assert found.lookup_write(WRITTEN, CLUSTER) == -1
    disk.close()
    assert images["image"].content[79] & CORRUPT


def test_entry_met_after_a_table_took_its_place_is_refused(images: Images, pristine: bytes) -> None:
    disk, place = reuse(images, pristine)
    assert disk.driver.direct_map() is not None
    disk.write(3 * TABLE, b"x" * CLUSTER)
    assert disk.driver.image.l1.words[3] & OFFSET == place
    with pytest.raises(OSError, match="holds the active L2 table but is named by an L2 entry"):
        disk.write(WRITTEN, b"y" * CLUSTER)
    assert disk.read(3 * TABLE, CLUSTER) == b"x" * CLUSTER


def test_page_that_was_never_in_use_is_not_published(images: Images, pristine: bytes) -> None:
    """The file has grown ahead of need; an entry leads there."""
    end = -(-len(pristine) // CLUSTER) * CLUSTER
    image = Structures(bytearray(pristine))
    image.put(image.l2_place(WRITTEN // CLUSTER), (end + 20 * CLUSTER) | COPIED)
    images.files.add("image", bytes(image.content))
    disk = images.open("image")
    found = disk.driver.direct_map()
    assert found is not None
    disk.write(EMPTY, b"z" * CLUSTER)  # the file grows
    disk.read(WRITTEN, CLUSTER)
    assert found.lookup_read(WRITTEN, CLUSTER) == -1


# --- keeping up with tables that come and go ---


def test_tables_that_come_and_go_are_known(images: Images) -> None:
    images.create("image", 8 * MIB, cluster_size=512)
    disk = images.open("image", overlap_check="all")
    places = disk.driver.image.overlaps.places
    for step in range(4):
        for offset in range(0, 2 * MIB, 64 * KIB):
            disk.write(offset + step * 512, bytes((step + 1,)) * 512)
        disk.ctx.run(disk.driver.snapshot_create(f"s{step}"))
        disk.ctx.run(disk.node.pdiscard(step * 256 * KIB, 256 * KIB))
        disk.flush()
        if step > 1:
            disk.ctx.run(disk.driver.snapshot_delete(f"s{step - 2}"))
        if step == 2:
            disk.ctx.run(disk.driver.snapshot_apply("s1"))
        known = list(places._places or places._collect())
        places.forget()
        wanted = places._collect()
        assert set(wanted) <= set(known)
    disk.close()


# --- options ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overlap-check": "some"}, "'template' is one of none, constant, cached, all"),
        ({"overlap-check.template": "all", "overlap-check": "none"}, "say two things"),
        ({"overlap-check.l3": "on"}, "no option 'overlap-check.l3'"),
        ({"overlap-check": {"active-l1": 3}}, "'active-l1' is on or off"),
    ],
)
def test_bad_choice_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        take_overlap_checks("image", options)


def test_choice_is_a_name_or_an_object() -> None:
    assert take_overlap_checks("image", {}) == TEMPLATES["cached"]
    assert take_overlap_checks("image", {"overlap-check": "all"}) == TEMPLATES["all"]
    given = {"overlap-check": {"template": "constant", "active-l2": True}}
    found = take_overlap_checks("image", given)
    assert found == TEMPLATES["constant"] | {STRUCTURES["active-l2"]}
