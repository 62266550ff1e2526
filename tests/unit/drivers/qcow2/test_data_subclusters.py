# SPDX-License-Identifier: Apache-2.0
"""Extended L2 entries over an external data file, beside QEMU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from blockemu.drivers.driver import RequestFlags
from tests.peers.qemu import QemuImg, run_tool
from tests.unit.drivers.qcow2.structures import COPIED, Structures
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images
from tests.unit.drivers.qcow2.test_check import check
from tests.unit.img.side_by_side import our_output

SIZE = MIB
KINDS = ["data_file_raw=off", "data_file_raw=on", "preallocation=metadata"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(folder: Path, images: Images, options: str, *, by_qemu: bool) -> Disk:
    """A new image, open."""
    words = ["-f", "qcow2", "-o", f"extended_l2=on,data_file=data.raw,{options}", "made", "1M"]
    if by_qemu:
        run_tool(["qemu-img", "create", "-q", *words])
    else:
        our_output("create", "-q", *words)
    images.load("image", folder / "made")
    images.load("data.raw", folder / "data.raw")
    return images.open("image")


def judged(images: Images, folder: Path, content: bytes | bytearray, *, is_raw: bool) -> None:
    """By QEMU: check, and what the guest sees; a raw data file is that."""
    (folder / "data.raw").write_bytes(images["data.raw"].content)
    images.check("image", folder)
    images.compare("image", content, folder)
    if is_raw:
        assert bytes(images["data.raw"].content[:SIZE]) == content


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("by_qemu", [False, True], ids=["ours", "theirs"])
def test_random_requests_leave_what_qemu_reads(
    images: Images, folder: Path, seed: int, options: str, by_qemu: bool
) -> None:
    rng = random.Random(f"{seed} {options} {by_qemu}")
    disk = made(folder, images, options, by_qemu=by_qemu)
    content = bytearray(SIZE)
    for _ in range(60):
        offset = rng.randrange(SIZE // 512) * 512
        length = min(rng.choice((512, 2 * KIB, 5 * KIB, 64 * KIB, 150 * KIB)), SIZE - offset)
        kind = rng.choice(("write", "write", "zero", "unmap", "discard"))
        data = bytes(length)
        if kind == "write":
            data = rng.randbytes(length)
            disk.write(offset, data)
        elif kind == "discard":
            disk.ctx.run(disk.node.pdiscard(offset, length))
            data = disk.read(offset, length)
        else:
            flags = RequestFlags.MAY_UNMAP if kind == "unmap" else RequestFlags.NONE
            disk.ctx.run(disk.node.pwrite_zeroes(offset, length, flags))
        content[offset : offset + length] = data
        assert disk.read(0, SIZE) == content, (kind, offset, length)
    disk.close()
    judged(images, folder, content, is_raw=options == "data_file_raw=on")


@pytest.mark.parametrize("options", KINDS)
def test_new_image_is_mapped_as_theirs(images: Images, folder: Path, options: str) -> None:
    """But for a raw data file of ours: all subclusters are there, and holes are told as such."""
    words = ["map", "--output=json", "-f", "qcow2", "made"]
    made(folder, images, options, by_qemu=True)
    told = run_tool(["qemu-img", *words]).stdout
    assert our_output(*words) == told
    made(folder, images, options, by_qemu=False)
    assert run_tool(["qemu-img", "check", "made"]).code == 0
    if options != "data_file_raw=on":
        assert our_output(*words) == told


def test_disk_grows_and_shrinks(images: Images, folder: Path) -> None:
    for options in KINDS:
        disk = made(folder, images, options, by_qemu=False)
        disk.write(0, b"x" * SIZE)
        disk.ctx.run(disk.node.truncate(100 * KIB + 512))
        disk.ctx.run(disk.node.truncate(SIZE))
        content = (b"x" * (100 * KIB + 512)).ljust(SIZE, b"\0")
        assert disk.read(0, SIZE) == content
        disk.write(SIZE - 512, b"y" * 512)
        disk.close()
        judged(images, folder, content[:-512] + b"y" * 512, is_raw=options == KINDS[1])


def test_first_cluster_has_its_place_by_copied_alone(images: Images, folder: Path) -> None:
    disk = made(folder, images, KINDS[0], by_qemu=False)
    disk.write(4 * KIB, b"x" * 2 * KIB)
    disk.close()
    image = Structures(images["image"].content)
    assert (image.get(image.l2_place()), image.get(image.l2_place() + 8)) == (COPIED, 0b100)
    assert check(images)[0].is_clean
    image.put(image.l2_place(), 0)
    result, lines = check(images)
    assert result.corruptions == 1
    assert "for no host cluster" in lines[0]
    with pytest.raises(OSError, match="not possible without a host cluster"):
        images.open("image").read(0, 512)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (COPIED | 5 << 16, "the guest's cluster is at 0"),
        (1 << 62 | 5 << 16, "compressed, which a cluster of an external data file can't be"),
    ],
)
def test_entry_that_can_not_be_is_refused(
    images: Images, folder: Path, word: int, reason: str
) -> None:
    disk = made(folder, images, KINDS[0], by_qemu=False)
    disk.write(0, b"x" * 2 * KIB)
    disk.close()
    image = Structures(images["image"].content)
    image.put(image.l2_place(), word)
    assert check(images)[0].corruptions
    with pytest.raises(OSError, match=reason):
        images.open("image").read(0, 512)


def test_copy_to_an_image_with_a_data_file_is_identical(folder: Path, seed: int) -> None:
    content = random.Random(seed).randbytes(300 * KIB) + bytes(200 * KIB) + b"x" * (524 * KIB)
    Path("source").write_bytes(content)
    options = "extended_l2=on,data_file=data.raw"
    our_output("convert", "-f", "raw", "-O", "qcow2", "-o", options, "source", "copy")
    QemuImg.compare(folder / "copy", folder / "source", one_fmt="qcow2")
