# SPDX-License-Identifier: Apache-2.0
"""Images with the dirty bit, which lazy refcounts leave when their writer is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockemu.drivers.errors import ImageError
from tests.peers.qemu import QemuImg, run_tool
from tests.peers.requirement import require_peer
from tests.unit.drivers.qcow2.structures import COPIED, OFFSET, Structures
from tests.unit.drivers.qcow2.support import KIB, MIB, Images

CLUSTER = 4096
DATA = b"\x11" * 8 * CLUSTER


@pytest.fixture
def image(images: Images) -> Structures:
    """Eight clusters of data that count 0, and the dirty bit."""
    made = images.create("image", MIB, cluster_size=CLUSTER)
    disk = images.open("image")
    disk.write(0, DATA)
    disk.close()
    found = Structures(made.content)
    for index in range(8):
        found.set_refcount((found.get(found.l2_place(index)) & OFFSET) // CLUSTER, 0)
    found.put(72, 1)
    return found


def test_dirty_image_opened_for_writing_is_repaired(
    images: Images, image: Structures, tmp_path: Path
) -> None:
    disk = images.open("image")
    assert image.get(72) == 0
    assert disk.read(0, len(DATA)) == DATA
    disk.write(len(DATA), b"\x22" * CLUSTER)
    disk.close()
    images.check("image", tmp_path)
    images.compare("image", (DATA + b"\x22" * CLUSTER).ljust(MIB, b"\0"), tmp_path)


def test_dirty_image_opened_for_reading_is_only_read(images: Images, image: Structures) -> None:
    before = bytes(image.content)
    disk = images.open("image", read_only=True)
    assert disk.read(0, len(DATA)) == DATA
    disk.close()
    assert image.content == before


def test_dirty_image_that_cannot_be_repaired_is_refused(images: Images, image: Structures) -> None:
    image.put(image.l2_place(3), COPIED | 1 << 40)
    with pytest.raises(ImageError, match=r"not closed cleanly, and repairing .* left 1 errors"):
        images.open("image")
    assert image.get(72) == 1


def test_image_that_is_marked_corrupt_is_not_repaired_by_opening_it(
    images: Images, image: Structures
) -> None:
    image.put(72, 3)
    before = bytes(image.content)
    with pytest.raises(ImageError, match="blockemu img check -r all image"):
        images.open("image")
    assert image.content == before


def test_image_of_a_killed_qemu_is_repaired(images: Images, tmp_path: Path) -> None:
    require_peer("qemu-io")
    path = tmp_path / "killed.qcow2"
    QemuImg.create(path, 4 * MIB, options={"lazy_refcounts": "on", "cluster_size": CLUSTER})
    commands = ["-c", "write -P 17 0 200k", "-c", "flush", "-c", "sigraise 9"]
    run_tool(["qemu-io", "-f", "qcow2", *commands, path], check=False)
    assert QemuImg.check(path).corruptions
    images.load("image", path)
    disk = images.open("image")
    assert disk.read(0, 200 * KIB) == b"\x11" * 200 * KIB
    disk.write(1 * MIB, b"\x22" * CLUSTER)
    disk.close()
    images.check("image", tmp_path)
