# SPDX-License-Identifier: Apache-2.0
"""New images: clean to qemu-img, as large as asked, and refused where options contradict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.create_options import CreateOptions
from tests.peers.qemu import QemuImg
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, MIB, Images


@pytest.mark.parametrize("cluster_size", [512 << shift for shift in range(13)])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_every_cluster_size_is_clean(
    images: Images, tmp_path: Path, cluster_size: int, preallocation: str
) -> None:
    size = 3 * MIB + 512
    images.create("image", size, cluster_size=cluster_size, preallocation=preallocation)
    images.check("image", tmp_path)
    info = QemuImg.info(images.save("image", tmp_path))
    assert (info["virtual-size"], info["cluster-size"]) == (size, cluster_size)
    disk = images.open("image")
    assert disk.read(size - 5000, 5000) == bytes(5000)
    allocated = preallocation != "off"
    status = disk.ctx.run(disk.node.block_status(0, size))
    assert (status.length, status.data, status.zero) == (size, allocated, not allocated)
    disk.write(size - 700, b"x" * 700)
    disk.close()
    images.check("image", tmp_path)


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_every_refcount_width_is_clean(images: Images, tmp_path: Path, refcount_bits: int) -> None:
    options = {"cluster_size": 512, "refcount_bits": refcount_bits}
    images.create("image", 2 * MIB, preallocation="metadata", **options)
    images.check("image", tmp_path)
    info = QemuImg.info(images.save("image", tmp_path))
    assert info["format-specific"]["data"]["refcount-bits"] == refcount_bits


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"compat": "0.10"}, {"compat": "0.10", "refcount-bits": 16}),
        ({"compat": "v3", "lazy_refcounts": "on"}, {"compat": "1.1", "lazy-refcounts": True}),
        ({"compression_type": "zstd"}, {"compression-type": "zstd"}),
    ],
)
def test_info_shows_what_was_asked(
    images: Images, tmp_path: Path, options: dict[str, str], expected: dict[str, Any]
) -> None:
    images.create("image", MIB, **options)
    images.check("image", tmp_path)
    data = QemuImg.info(images.save("image", tmp_path))["format-specific"]["data"]
    assert {key: data[key] for key in expected} == expected


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_backing_name_and_format_are_in_the_header(
    images: Images, tmp_path: Path, cluster_size: int
) -> None:
    QemuImg.create(tmp_path / "base.img", MIB, fmt="raw")
    images.create(
        "image", MIB, cluster_size=cluster_size, backing_file="base.img", backing_fmt="raw"
    )
    info = QemuImg.info(images.save("image", tmp_path))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.img", "raw")


def test_size_zero_and_odd_sizes(images: Images, tmp_path: Path) -> None:
    for size, rounded in ((0, 0), (1, 512), (513, 1024)):
        images.create("image", size)
        images.check("image", tmp_path)
        assert QemuImg.info(images.save("image", tmp_path))["virtual-size"] == rounded


def test_terabytes_cost_no_more_than_their_l1_table(images: Images, tmp_path: Path) -> None:
    image = images.create("image", 16 << 40)
    assert len(image.content) < MIB
    images.check("image", tmp_path)
    disk = images.open("image")
    disk.write((16 << 40) - 512, b"z" * 512)
    disk.close()
    assert not Checker(image.content).corruptions


def test_old_content_is_gone(images: Images, tmp_path: Path) -> None:
    image = images.create("image", MIB)
    image.content[:] = b"\xff" * (2 * MIB)

    async def again() -> None:
        from blockemu.drivers.qcow2.create import create

        node = await images.opener.open({"driver": "file", "filename": "image"})
        await create(node, "image", CreateOptions.parse("image", MIB, {}))
        await node.close()

    images.ctx.run(again())
    images.check("image", tmp_path)
    images.compare("image", bytes(MIB), tmp_path)


def test_creation_cut_short_leaves_no_image(images: Images) -> None:
    image = images.create("image", MIB)
    image.log.clear()
    images.files.add("image")
    count = 0

    def fault(kind: str, offset: int, length: int) -> int:
        nonlocal count
        count += kind == "write" and offset == 0
        return 28 if kind == "write" and offset == 0 else 0

    images["image"].fault = fault

    async def make() -> None:
        from blockemu.drivers.qcow2.create import create

        node = await images.opener.open({"driver": "file", "filename": "image"})
        try:
            await create(node, "image", CreateOptions.parse("image", MIB, {}))
        finally:
            await node.close()

    with pytest.raises(OSError):
        images.ctx.run(make())
    assert count == 1
    assert images["image"].content[:4] == bytes(4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster_size": 1000}, "power of two between 512 and 2M"),
        ({"cluster_size": 256}, "power of two between 512 and 2M"),
        ({"cluster_size": 4 * MIB}, "power of two between 512 and 2M"),
        ({"refcount_bits": 3}, "power of two up to 64"),
        ({"refcount_bits": 128}, "power of two up to 64"),
        ({"refcount_bits": 0}, "power of two up to 64"),
        ({"refcount_bits": 8, "compat": "0.10"}, "needs compat=1.1"),
        ({"lazy_refcounts": "on", "compat": "v2"}, "needs compat=1.1"),
        ({"compression_type": "zstd", "compat": "v2"}, "needs compat=1.1"),
        ({"compat": "2.0"}, "one of"),
        ({"preallocation": "some"}, "one of"),
        ({"backing_file": "b"}, "backing_fmt"),
        ({"backing_fmt": "raw"}, "without a backing_file"),
        ({"backing_file": "", "backing_fmt": "raw"}, "empty"),
        ({"backing_file": "b" * 1024, "backing_fmt": "raw"}, "1023"),
        ({"backing_file": "b", "backing_fmt": "raw", "preallocation": "full"}, "preallocated"),
        (
            {"extended_l2": "on", "cluster_size": 8192},
            "extended_l2=on needs a cluster_size of 16384",
        ),
        ({"extended_l2": "on", "compat": "0.10"}, "extended_l2=on needs compat=1.1"),
        ({"colour": "red"}, "no option 'colour'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ImageError) as caught:
        CreateOptions.parse("image", MIB, options)
    assert words in caught.value.reason


def test_size_beyond_the_l1_limit_is_refused() -> None:
    with pytest.raises(ImageError, match="larger cluster_size"):
        CreateOptions.parse("image", 1 << 40, {"cluster_size": 512})
    CreateOptions.parse("image", 128 << 30, {"cluster_size": 512})


def test_preallocated_image_is_written_in_place(images: Images) -> None:
    image = images.create("image", MIB, preallocation="metadata", cluster_size=4 * KIB)
    disk = images.open("image")
    image.log.clear()
    disk.write(100 * KIB, b"p" * (40 * KIB))
    assert len(image.operations("write")) == 1
