# SPDX-License-Identifier: Apache-2.0
"""Another backing file in the header: what is kept, what is refused, and power cuts on the way."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_FEATURE_NAMES,
    Extension,
    Header,
    parse,
)
from blockemu.drivers.qcow2.header_rewrite import EXTENSION_FILLER
from blockemu.loop.memory_file import MemoryImage
from tests.peers.qemu import QemuImg
from tests.unit.drivers.qcow2.crash import CutDisk, Recorder
from tests.unit.drivers.qcow2.support import KIB, MIB, Images

UNKNOWN = Extension(0x6E657721, b"what nobody knows")
CUTS = 40


def rebase(images: Images, filename: str | None, fmt: str | None) -> None:
    disk = images.open("image", backing=None)
    images.ctx.run(disk.driver.image.header_file.set_backing(filename, fmt))
    disk.close()


def header_of(content: bytes | bytearray) -> Header:
    return parse("image", bytes(content))


def add_extension(images: Images, image: MemoryImage, extension: Extension) -> None:
    """Write the whole first cluster as the code under test does not."""
    header = header_of(image.content)
    header.extensions.append(extension)
    data = header.serialise("image")
    image.content[: header.cluster_size] = data.ljust(header.cluster_size, b"\0")


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 1024, 2048, 4096, 65536, 2 * MIB])
def test_names_are_replaced_and_unknown_extensions_kept(
    images: Images, cluster_size: int, compat: str, tmp_path: Path
) -> None:
    names = {"backing_file": "old", "backing_fmt": "raw"}
    image = images.create("image", MIB, cluster_size=cluster_size, compat=compat, **names)
    add_extension(images, image, UNKNOWN)
    disk = images.open("image", backing=None)
    disk.write(0, b"x" * 5000)
    disk.close()
    for filename, fmt in (("n" * 150, "qcow2"), ("s", "raw"), ("t", None), (None, None)):
        rebase(images, filename, fmt)
        header = header_of(image.content)
        assert (header.backing_file, header.backing_format) == (filename, fmt)
        assert header.extension(UNKNOWN.kind) == UNKNOWN.data
        assert header.extension(EXTENSION_FILLER) is None
    images.check("image", tmp_path)
    assert "backing-filename" not in QemuImg.info(images.save("image", tmp_path))


def test_longest_name_fits_in_larger_clusters(images: Images) -> None:
    image = images.create("image", MIB, cluster_size=4096)
    rebase(images, "n" * 1023, "raw")
    assert header_of(image.content).backing_file == "n" * 1023


def test_name_of_1024_bytes_is_refused(images: Images) -> None:
    image = images.create("image", MIB)
    before = bytes(image.content)
    with pytest.raises(ImageError, match="the backing file name is 1024 bytes long; 1023 are"):
        rebase(images, "n" * 1024, "raw")
    assert image.content == before


@pytest.mark.parametrize("cluster_size", [512, 1024])
def test_name_that_doesnt_fit_in_the_cluster_is_refused(images: Images, cluster_size: int) -> None:
    image = images.create("image", MIB, cluster_size=cluster_size)
    before = bytes(image.content)
    with pytest.raises(ImageError, match="don't fit in a cluster"):
        rebase(images, "n" * 1000, "raw")
    assert image.content == before


def test_change_without_room_for_a_safe_way_is_refused(images: Images) -> None:
    image = images.create(
        "image", MIB, cluster_size=2048, backing_file="o" * 1000, backing_fmt="raw"
    )
    before = bytes(image.content)
    with pytest.raises(ImageError, match="its first cluster of 2048 bytes has no room"):
        rebase(images, "n" * 1000, "raw")
    assert image.content == before


def test_feature_names_give_way_where_room_is_short(images: Images) -> None:
    image = images.create("image", MIB, cluster_size=1024)
    assert header_of(image.content).extension(EXTENSION_FEATURE_NAMES)
    rebase(images, "a" * 300, "raw")
    rebase(images, "b" * 300, "raw")
    header = header_of(image.content)
    assert header.backing_file == "b" * 300
    assert header.extension(EXTENSION_FEATURE_NAMES) is None


def test_filler_of_an_earlier_cut_is_taken_away(images: Images) -> None:
    image = images.create("image", MIB, backing_file="old", backing_fmt="raw")
    add_extension(images, image, Extension(EXTENSION_FILLER, b"x" * 40))
    rebase(images, "new", "raw")
    assert header_of(image.content).extension(EXTENSION_FILLER) is None


def test_header_whose_change_failed_is_not_written_again(images: Images) -> None:
    image = images.create("image", MIB, backing_file="old" * 200, backing_fmt="raw")
    disk = images.open("image", backing=None)
    header_file = disk.driver.image.header_file
    image.fault = lambda kind, offset, length: 5 if kind == "write" and not offset else 0
    with pytest.raises(OSError, match="Input/output"):
        images.ctx.run(header_file.set_backing("new" * 200, "raw"))
    image.fault = None
    with pytest.raises(OSError, match="an earlier change of the header failed"):
        images.ctx.run(header_file.set_size(2 * MIB))
    assert header_of(image.content).backing_file == "old" * 200
    disk.close()


CHANGES = {
    "in one sector": ("base.raw", "other.qcow2", "qcow2"),
    "to a long name": ("base.raw", "n" * 600, "qcow2"),
    "from a long name": ("o" * 600, "base", "raw"),
    "long to long": ("o" * 700, "n" * 710, "qcow2"),
    "long to none": ("o" * 700, None, None),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("cluster_size", "compat"), [(4096, "1.1"), (65536, "1.1"), (4096, "0.10")]
)
def test_power_cut_leaves_the_old_header_or_the_new_one(
    images: Images, seed: int, change: str, cluster_size: int, compat: str
) -> None:
    rng = random.Random(seed)
    old, new, fmt = CHANGES[change]
    image = images.create(
        "image", MIB, cluster_size=cluster_size, compat=compat, backing_file=old, backing_fmt="raw"
    )
    add_extension(images, image, UNKNOWN)
    recorder = Recorder(image, rng)
    rebase(images, new, fmt)
    operations = recorder.operations
    cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
    found: set[str | None] = set()
    for cut in sorted([*range(len(operations) + 1)] * CUTS):
        left = cut_disk.after_cut(cut, rng)
        header = header_of(left)
        pair = (header.backing_file, header.backing_format)
        assert pair in ((old, "raw"), (new, fmt)), (cut, pair)
        assert header.extension(UNKNOWN.kind) == UNKNOWN.data
        names = header.extension(EXTENSION_FEATURE_NAMES)
        assert (names is not None) == (compat == "1.1")
        found.add(header.backing_file)
    assert found == {old, new}


def test_duplicate_formats_become_one(images: Images) -> None:
    image = images.create("image", 64 * KIB, backing_file="old", backing_fmt="raw")
    add_extension(images, image, Extension(EXTENSION_BACKING_FORMAT, b"qcow2"))
    rebase(images, "new", "qcow2")
    kinds = [extension.kind for extension in header_of(image.content).extensions]
    assert kinds.count(EXTENSION_BACKING_FORMAT) == 1
    assert struct.unpack_from(">Q", image.content, 8)[0]
