# SPDX-License-Identifier: Apache-2.0
"""Images that QEMU made, used by us, judged by QEMU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.registry import BACKING_DEPTH_MAX
from tests.peers.qemu import QemuImg, run_tool
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, MIB, Images

SIZE = 4 * MIB


def content_of(seed: int, size: int = SIZE) -> bytearray:
    """Compressible, with a hole, different everywhere else."""
    rng = random.Random(seed)
    content = bytearray()
    for _ in range(size // 4096):
        content += bytes(4096) if rng.random() < 0.3 else rng.randbytes(64) * 64
    return content


def make(tmp_path: Path, name: str, content: bytes | bytearray, *options: str) -> Path:
    raw, image = tmp_path / f"{name}.raw", tmp_path / name
    raw.write_bytes(content)
    run_tool(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, image])
    return image


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "cluster_size=512"],
        ["-o", "cluster_size=65536"],
        ["-o", "cluster_size=2M"],
        ["-o", "compat=0.10"],
        ["-o", "refcount_bits=64,lazy_refcounts=on"],
        ["-c"],
        ["-c", "-o", "cluster_size=512"],
        ["-c", "-o", "cluster_size=2M"],
        ["-c", "-o", "compat=0.10,cluster_size=4096"],
        ["-o", "extended_l2=on,cluster_size=16k"],
        ["-o", "extended_l2=on"],
        ["-c", "-o", "extended_l2=on"],
    ],
    ids=" ".join,
)
def test_converted_image_reads_and_takes_writes(
    images: Images, tmp_path: Path, seed: int, options: list[str]
) -> None:
    content = content_of(seed)
    images.load("image", make(tmp_path, "source", content, *options))
    disk = images.open("image")
    assert disk.read(0, SIZE) == content
    rng = random.Random(seed)
    for _ in range(30):
        offset = rng.randrange(SIZE - 70000)
        data = rng.randbytes(rng.choice((512, 4096, 70000)))
        disk.write(offset, data)
        content[offset : offset + len(data)] = data
        start = rng.randrange(SIZE - 9000)
        assert disk.read(start, 9000) == content[start : start + 9000]
    disk.close()
    images.check("image", tmp_path)
    images.compare("image", content, tmp_path)


def test_zstd_image_is_read(images: Images, tmp_path: Path, seed: int) -> None:
    content = content_of(seed)
    images.load("image", make(tmp_path, "source", content, "-c", "-o", "compression_type=zstd"))
    assert images.open("image").read(0, SIZE) == content


@pytest.mark.parametrize(
    "options",
    ["cluster_size=4096", "cluster_size=4096,compat=0.10", "cluster_size=16k,extended_l2=on"],
)
def test_snapshot_keeps_its_content_while_the_disk_is_written(
    images: Images, tmp_path: Path, seed: int, options: str
) -> None:
    old = content_of(seed)
    source = make(tmp_path, "source", old, "-o", options)
    run_tool(["qemu-img", "snapshot", "-c", "before", source])
    images.load("image", source)
    disk, new = images.open("image"), bytearray(old)
    rng = random.Random(seed)
    for _ in range(60):
        offset = rng.randrange(SIZE // 512) * 512
        length = min(rng.choice((512, 4096, 8192, 40960)), SIZE - offset)
        kind = rng.choice(("write", "write", "zero", "discard"))
        if kind == "write":
            data = rng.randbytes(length)
            disk.write(offset, data)
        elif kind == "zero":
            data = bytes(length)
            disk.ctx.run(disk.node.pwrite_zeroes(offset, length))
        else:
            disk.ctx.run(disk.node.pdiscard(offset, length))
            data = disk.read(offset, length)
        new[offset : offset + length] = data
    assert disk.read(0, SIZE) == new
    disk.close()
    assert not Checker(images["image"].content).corruptions
    images.check("image", tmp_path)
    images.compare("image", new, tmp_path)
    saved = images.save("image", tmp_path)
    run_tool(["qemu-img", "snapshot", "-a", "before", saved])
    raw = tmp_path / "old.raw"
    raw.write_bytes(old)
    QemuImg.compare(saved, raw, one_fmt="qcow2")


def test_bitmaps_stay_good_when_others_write(images: Images, tmp_path: Path) -> None:
    source = QemuImg.create(tmp_path / "source", MIB)
    run_tool(["qemu-img", "bitmap", "--add", source, "b0"])
    images.load("image", source)
    for read_only in (True, False):
        images.open("image", read_only=read_only).close()
        assert images["image"].content[88:96] == (1).to_bytes(8, "big")
    (bitmap,) = QemuImg.info(images.save("image", tmp_path))["format-specific"]["data"]["bitmaps"]
    assert bitmap == {"flags": ["auto"], "name": "b0", "granularity": 65536}


def test_unknown_autoclear_bits_are_cleared_and_compatible_ones_kept(images: Images) -> None:
    image = images.create("image", MIB)
    image.content[80:88] = image.content[88:96] = (1 << 50).to_bytes(8, "big")
    images.open("image").close()
    assert image.content[80:88] == (1 << 50).to_bytes(8, "big")
    assert image.content[88:96] == bytes(8)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"extended_l2": "on"}], ids=str)
def test_backing_file_shows_through_where_nothing_was_written(
    images: Images, tmp_path: Path, seed: int, fmt: str, options: dict[str, str]
) -> None:
    base = content_of(seed, SIZE // 2 + 512)
    if fmt == "qcow2":
        source = make(tmp_path, "base", base)
        images.load("base", source)
    else:
        images.files.add("base", base)
    images.create("image", SIZE, backing_file="base", backing_fmt=fmt, **options)
    model = base + bytes(SIZE - len(base))
    disk, rng = images.open("image"), random.Random(seed)
    assert disk.read(0, SIZE) == model
    for _ in range(80):
        offset = rng.randrange(SIZE // 512) * 512
        length = min(rng.choice((512, 4096, 65536, 99840, 300032)), SIZE - offset)
        kind = rng.choice(("write", "zero", "discard"))
        if kind == "write":
            data = rng.randbytes(length)
            disk.write(offset, data)
        elif kind == "zero":
            data = bytes(length)
            disk.ctx.run(disk.node.pwrite_zeroes(offset, length))
        else:
            disk.ctx.run(disk.node.pdiscard(offset, length))
            data = disk.read(offset, length)
            assert all(
                data[at : at + 512] in (bytes(512), model[offset + at : offset + at + 512])
                for at in range(0, length, 512)
            )
        model[offset : offset + length] = data
    assert disk.read(0, SIZE) == model
    disk.close()
    (tmp_path / "base").write_bytes(images["base"].content)
    images.check("image", tmp_path)
    images.compare("image", model, tmp_path)


def test_chain_of_backing_files_is_read_to_its_end(images: Images) -> None:
    depth = 50
    images.files.add("layer0", b"\xff" * (64 * KIB * depth))
    for level in range(1, depth):
        images.create(
            f"layer{level}", 64 * KIB * depth, backing_file=f"layer{level - 1}",
            backing_fmt="raw" if level == 1 else "qcow2",
        )  # fmt: skip
        disk = images.open(f"layer{level}")
        disk.write(64 * KIB * level, bytes((level,)) * (64 * KIB))
        disk.close()
    disk = images.open(f"layer{depth - 1}", read_only=True)
    content = disk.read(0, 64 * KIB * depth)
    assert [content[64 * KIB * level] for level in range(1, depth)] == list(range(1, depth))
    assert content[0] == 0xFF


@pytest.mark.parametrize("direct", [False, True])
def test_write_behind_the_end_of_a_file_that_ends_in_a_cluster_is_read_back(
    images: Images, direct: bool
) -> None:
    """The write made the file longer, but reads went by its old length: zeroes, until it was
    opened anew."""
    image = images.create("image", 4 * MIB)
    disk = images.open("image")
    disk.write(0, b"x" * 64 * KIB)
    disk.close()
    del image.content[-60 * KIB :]
    disk = images.open("image", direct=direct)
    assert disk.read(0, 64 * KIB) == b"x" * 4 * KIB + bytes(60 * KIB)
    disk.write(32 * KIB, b"y" * 4 * KIB)
    content = b"x" * 4 * KIB + bytes(28 * KIB) + b"y" * 4 * KIB + bytes(28 * KIB)
    assert disk.read(0, 64 * KIB) == content
    disk.write(MIB, b"z" * 512)  # the file grows
    assert disk.read(0, 64 * KIB) == content
    disk.close()
    assert images.open("image").read(0, 64 * KIB) == content


def test_longest_chain_allowed_is_opened_read_written_and_closed(images: Images) -> None:
    """Each image is a few frames of every call. 200 of them, which is what may be opened, were more
    than the interpreter allows: `blockemu serve` ended in a RecursionError."""
    size = 4 * KIB
    images.files.add("layer0", b"\x01" * 512 + bytes(size - 512))
    for level in range(1, BACKING_DEPTH_MAX + 1):
        images.create(
            f"layer{level}", size, cluster_size=512, backing_file=f"layer{level - 1}",
            backing_fmt="raw" if level == 1 else "qcow2",
        )  # fmt: skip
        if level == 100:
            disk = images.open("layer100", backing=None)
            disk.write(1024, b"\x64" * 512)
            disk.close()
    disk = images.open(f"layer{BACKING_DEPTH_MAX - 1}")
    disk.write(100, b"\x02" * 100)
    content = bytearray(size)
    content[:512] = b"\x01" * 100 + b"\x02" * 100 + b"\x01" * 312
    content[1024:1536] = b"\x64" * 512
    assert disk.read(0, size) == content
    disk.close()
    with pytest.raises(ImageError, match="more than 200 backing files in one chain"):
        images.open(f"layer{BACKING_DEPTH_MAX}")
    assert not images.opener.nodes


def test_option_backing_null_shows_the_layer_alone(images: Images) -> None:
    images.files.add("base", b"\xff" * MIB)
    images.create("image", MIB, backing_file="base", backing_fmt="raw")
    assert images.open("image", read_only=True).read(0, 512) == b"\xff" * 512
    assert images.open("image", read_only=True, backing=None).read(0, 512) == bytes(512)


def test_info_is_qemu_img_info(images: Images, tmp_path: Path) -> None:
    for options in (
        "compat=0.10", "refcount_bits=1,lazy_refcounts=on", "cluster_size=2M", "extended_l2=on",
    ):  # fmt: skip
        source = tmp_path / "source"
        run_tool(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, source, "64M"])
        images.load("image", source)
        theirs = QemuImg.info(source)
        ours = images.open("image", read_only=True).driver.info()
        for key in ("cluster-size", "dirty-flag", "format-specific"):
            assert ours[key] == theirs[key], (options, key)
