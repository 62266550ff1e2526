# SPDX-License-Identifier: Apache-2.0
"""Bitmap directories that lie: refused in one line that names the place, before memory is taken."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockemu.drivers import bitmap_commands
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.bitmap_directory import BitmapDirectory, BitmapEntry, serialise
from tests.peers.qemu import run_tool
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, MIB, Images

CLUSTER = 4 * KIB
ENTRY_BYTES = 32


class Places:
    """An image with bitmaps "b0" and "b1", each with bits, and where their structures are."""

    def __init__(self, images: Images) -> None:
        images.create("made", 16 * MIB, cluster_size=CLUSTER)
        disk = images.open("made")
        for name in ("b0", "b1"):
            add = bitmap_commands.add(disk.node, name, granularity=KIB, persistent=True)
            disk.ctx.run(add)
        disk.write(0, b"x" * MIB)
        disk.close()
        self.content = bytes(images["made"].content)
        self.extension = self.content.index(struct.pack(">II", 0x23852875, 24)) + 8
        self.count, _, self.length, self.directory = struct.unpack_from(
            ">IIQQ", self.content, self.extension
        )
        self.table: int = struct.unpack_from(">Q", self.content, self.directory)[0]
        self.data: int = struct.unpack_from(">Q", self.content, self.table)[0]
        assert (self.count, self.length) == (2, 2 * ENTRY_BYTES)

    def changed(self, where: str, shift: int, fmt: str, value: int) -> bytearray:
        content = bytearray(self.content)
        struct.pack_into(fmt, content, getattr(self, where) + shift, value)
        return content


LIES: dict[str, tuple[str, int, str, int, str]] = {
    "length of the extension": ("extension", -4, ">I", 16, "extension is 16 bytes long"),
    "no bitmaps": ("extension", 0, ">I", 0, "counts 0 bitmaps"),
    "too many bitmaps": ("extension", 0, ">I", 65536, "counts 65536 bitmaps"),
    "more than there are": ("extension", 0, ">I", 3, "entry 2 at offset {end} reaches past"),
    "fewer than there are": ("extension", 0, ">I", 1, "has 64 bytes, but its 1 entries take 32"),
    "reserved of the extension": ("extension", 4, ">I", 1, "extension has reserved bytes set"),
    "no directory": ("extension", 8, ">Q", 0, "directory at offset {directory} has 0 bytes"),
    "huge directory": ("extension", 8, ">Q", 1 << 62, "has 4611686018427387904 bytes"),
    "directory of 60 MiB": ("extension", 8, ">Q", 60 * MIB, "reaches past the end of the file"),
    "directory not aligned": ("extension", 16, ">Q", CLUSTER + 512, "0x1200 is not aligned"),
    "directory at 0": ("extension", 16, ">Q", 0, "directory at offset 0x0 is not aligned"),
    "directory past the end": ("extension", 16, ">Q", 1 << 62, "reaches past the end of the file"),
    "reserved flags": ("directory", 12, ">I", 8, "0 at offset {directory} has reserved flags"),
    "type": ("directory", 16, ">B", 2, "entry 0 at offset {directory} is of type 2"),
    "granularity too small": ("directory", 17, ">B", 8, "granularity_bits 8"),
    "granularity too large": ("directory", 17, ">B", 32, "granularity_bits 32"),
    "no name": ("directory", 18, ">H", 0, "has a name of 0 bytes"),
    "long name": ("directory", 18, ">H", 1024, "has a name of 1024 bytes"),
    "name past the directory": ("directory", 18, ">H", 1000, "reaches past the directory's end"),
    "extra data": ("directory", 20, ">I", 8, "has extra data of a kind that is not known"),
    "same name": ("directory", ENTRY_BYTES + 24, ">H", 0x6230, "is a second bitmap 'b0'"),
    "table not aligned": ("directory", 0, ">Q", 513, "table at 0x201: not aligned"),
    "table at 0": ("directory", 0, ">Q", 0, "table at 0x0: not aligned"),
    "table past the end": ("directory", 0, ">Q", 1 << 40, "past the end of the file"),
    "no table entries": ("directory", 8, ">I", 0, "has a table of 0 entries"),
    "too many table entries": ("directory", 8, ">I", 1 << 31, "has a table of 2147483648 entries"),
    "bits of 1 GiB": ("directory", 8, ">I", 1 << 18, "has more than 512 MiB of bits"),
    "table too long": ("directory", 8, ">I", 2, "'b0' at offset {table} has 2 entries; 1 is what"),
    "granularity too fine": ("directory", 17, ">B", 9, "has 1 entries; 1 is what the disk takes"),
    "reserved of a table entry": ("table", 0, ">Q", 2, "entry 0 of the table of bitmap 'b0'"),
    "data not aligned": ("table", 0, ">Q", 512, "offset {table}, is not possible: 0x200"),
    "data past the end": ("table", 0, ">Q", 1 << 40, "is not possible: 0x10000000000"),
    "data and ones": ("table", 0, ">Q", CLUSTER | 1, "is not possible: 0x1001"),
}  # fmt: skip

WE_ARE_STRICTER = {"table past the end", "data past the end"}
"""QEMU reads what is past the end of the file as zeroes: no bits are dirty then."""
NO_LIE = {"granularity too fine"}
"""The table is as long as such a bitmap's would be."""


@pytest.fixture
def places(images: Images) -> Places:
    return Places(images)


@pytest.mark.parametrize("lie", LIES)
def test_lie_is_refused_by_name_and_offset(
    images: Images, places: Places, tmp_path: Path, lie: str
) -> None:
    where, shift, fmt, value, reason = LIES[lie]
    content = places.changed(where, shift, fmt, value)
    images.files.add("image", bytes(content))
    saved = images.save("image", tmp_path)
    qemu = run_tool(["qemu-io", "-c", "write 0 512", saved], check=False)
    if lie in NO_LIE:
        images.open("image").close()
        assert qemu.code == 0
        return
    offsets = {
        "directory": f"{places.directory:#x}", "table": f"{places.table:#x}",
        "end": f"{places.directory + places.length:#x}",
    }  # fmt: skip
    with pytest.raises(ImageError) as caught:
        images.open("image")
    assert reason.format(**offsets) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert images["image"].content == content
    assert (qemu.code == 0) == (lie in WE_ARE_STRICTER), qemu


@pytest.mark.parametrize("over", ["header", "L1", "refcount table", "directory", "other table"])
def test_table_over_other_metadata_is_refused(images: Images, places: Places, over: str) -> None:
    l1, reftable = (struct.unpack_from(">Q", places.content, at)[0] for at in (40, 48))
    other = struct.unpack_from(">Q", places.content, places.directory + ENTRY_BYTES)[0]
    at = {"header": 0, "L1": l1, "refcount table": reftable, "directory": places.directory,
          "other table": other}[over]  # fmt: skip
    images.files.add("image", bytes(places.changed("directory", 0, ">Q", at)))
    reason = "not aligned" if over == "header" else "lies over other metadata"
    with pytest.raises(ImageError, match=reason):
        images.open("image")


def test_extra_data_that_is_compatible_is_kept(images: Images, places: Places) -> None:
    entries = tuple(
        BitmapEntry(name=name, table_offset=table, table_entries=1, flags=2 | 4,
                    granularity_bits=10, extra=b"something")
        for name, table in (("b0", places.table), ("\udcff", 0))
    )  # fmt: skip
    content = bytearray(places.content)
    other = struct.unpack_from(">Q", content, places.directory + ENTRY_BYTES)[0]
    entries = (entries[0], BitmapEntry(name="\udcff", table_offset=other, table_entries=1,
                                       flags=0, granularity_bits=10))  # fmt: skip
    data = serialise("image", entries)
    struct.pack_into(">Q", content, places.extension + 8, len(data))
    content[places.directory : places.directory + len(data)] = data
    images.files.add("image", bytes(content))
    disk = images.open("image")
    disk.write(15 * MIB, b"x")
    disk.close()
    disk = images.open("image", read_only=True)
    found = disk.driver.image.header_file.bitmaps
    assert isinstance(found, BitmapDirectory)
    assert found.entries[0].extra == b"something"
    assert [entry.name for entry in found.entries] == ["b0", "\udcff"]
    bitmap = disk.ctx.run(disk.driver.load_bitmap("b0"))
    assert bitmap is not None
    assert list(bitmap.ranges()) == [(0, MIB), (15 * MIB, KIB)]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["extension", "directory", "table", "data"]),
            st.integers(-8, 70),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_bytes_end_in_one_line_or_an_image_that_works(
    images: Images, places: Places, changes: list[tuple[str, int, int]]
) -> None:
    content = bytearray(places.content)
    for where, shift, value in changes:
        content[getattr(places, where) + shift] = value
    images.files.add("image", bytes(content))
    try:
        disk = images.open("image")
    except ImageError:
        assert images["image"].content[CLUSTER:] == content[CLUSTER:]
        return
    is_sound = not Checker(content).corruptions
    disk.write(8 * MIB, b"x" * 5000)
    for name in list(disk.node.dirty_bitmaps):
        disk.ctx.run(bitmap_commands.remove(disk.node, name))
    disk.close()
    after = Checker(images["image"].content)
    assert after.bitmaps() == {}
    assert not is_sound or not after.corruptions


def test_directory_of_65535_huge_bitmaps_is_refused_before_memory_is_taken(
    images: Images, places: Places
) -> None:
    """Tables that lie over each other, so a small file names 32 TiB of bits."""
    disk_bytes, entries = 1 << 42, 1 << 17
    content = bytearray(places.content)
    table = (len(content) + CLUSTER - 1) // CLUSTER * CLUSTER
    directory = table + entries * 8
    data = b"".join(
        BitmapEntry(name=f"{number}", table_offset=table, table_entries=entries, flags=2,
                    granularity_bits=10).serialise()
        for number in range(65535)
    )  # fmt: skip
    struct.pack_into(">Q", content, 24, disk_bytes)
    struct.pack_into(">I", content, 36, disk_bytes // CLUSTER // 512)
    struct.pack_into(">Q", content, 40, directory + len(data) // CLUSTER * CLUSTER + CLUSTER)
    struct.pack_into(">IIQQ", content, places.extension, 65535, 0, len(data), directory)
    content = content.ljust(table, b"\0") + struct.pack(">Q", places.data) * entries + data
    content = content.ljust(len(content) + disk_bytes // CLUSTER // 512 * 8 + 2 * CLUSTER, b"\0")
    images.files.add("image", bytes(content))
    tracemalloc.start()
    try:
        for read_only in (True, False):
            with pytest.raises(ImageError, match="makes all tables larger than 67108864 bytes"):
                images.open("image", read_only=read_only)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * MIB


def test_bits_that_all_lie_in_one_cluster_are_refused_before_memory_is_taken(
    images: Images, places: Places
) -> None:
    """A table of 512 MiB of bits, each entry the same cluster."""
    disk_bytes, entries = 1 << 42, 1 << 17
    content = bytearray(places.content)
    table = (len(content) + CLUSTER - 1) // CLUSTER * CLUSTER
    directory = table + entries * 8
    data = BitmapEntry(name="b", table_offset=table, table_entries=entries, flags=2,
                       granularity_bits=10).serialise()  # fmt: skip
    struct.pack_into(">Q", content, 24, disk_bytes)
    struct.pack_into(">I", content, 36, disk_bytes // CLUSTER // 512)
    struct.pack_into(">Q", content, 40, directory + CLUSTER)
    struct.pack_into(">IIQQ", content, places.extension, 1, 0, len(data), directory)
    content = content.ljust(table, b"\0") + struct.pack(">Q", places.data) * entries + data
    content = content.ljust(len(content) + disk_bytes // CLUSTER // 512 * 8 + 2 * CLUSTER, b"\0")
    content[places.data : places.data + CLUSTER] = random.Random(1).randbytes(CLUSTER)
    images.files.add("image", bytes(content))
    with pytest.raises(ImageError, match="bitmap 'b' takes more memory than there is"):
        images.open("image")
