# SPDX-License-Identifier: Apache-2.0
"""Snapshots of QEMU's used by us, and ours by QEMU: compressed clusters, machine states."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.unit.drivers.qcow2.support import KIB, MIB, Disk, Images

SIZE = 2 * MIB


def content_of(rng: random.Random) -> bytes:
    """Compressible, with holes."""
    pieces = (bytes(4096) if rng.random() < 0.3 else rng.randbytes(64) * 64 for _ in range(512))
    return b"".join(pieces)


def converted(tmp_path: Path, content: bytes, *options: str) -> Path:
    raw, image = tmp_path / "source.raw", tmp_path / "source"
    raw.write_bytes(content)
    run_tool(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, image])
    return image


def scribble(disk: Disk, content: bytes, rng: random.Random) -> bytes:
    model = bytearray(content)
    for _ in range(25):
        offset = rng.randrange(SIZE - 70_000)
        data = rng.randbytes(rng.choice((512, 5000, 70_000)))
        disk.write(offset, data)
        model[offset : offset + len(data)] = data
    return bytes(model)


def shown(images: Images, snapshot: str) -> bytes:
    disk = images.open("image", read_only=True, snapshot=snapshot)
    found = disk.read(0, disk.node.length_bytes)
    disk.close()
    return found


OPTIONS = [
    ["-o", "cluster_size=512"],
    ["-o", "cluster_size=2M"],
    ["-o", "compat=0.10"],
    ["-c"],
    ["-c", "-o", "cluster_size=512"],
    ["-c", "-o", "cluster_size=2M"],
    ["-c", "-o", "compat=0.10,cluster_size=4096"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_our_snapshots_are_qemus_and_qemus_are_ours(
    images: Images, tmp_path: Path, seed: int, options: list[str]
) -> None:
    rng = random.Random(seed)
    first = content_of(rng)
    source = converted(tmp_path, first, *options)
    run_tool(["qemu-img", "snapshot", "-c", "theirs", source])
    images.load("image", source)
    disk = images.open("image")
    second = scribble(disk, first, rng)
    disk.ctx.run(disk.driver.snapshot_create("ours"))
    third = scribble(disk, second, rng)
    disk.close()
    images.check("image", tmp_path)
    images.compare("image", third, tmp_path)
    assert (shown(images, "theirs"), shown(images, "ours")) == (first, second)

    saved = images.save("image", tmp_path)
    for name, content in (("ours", second), ("theirs", first)):
        run_tool(["qemu-img", "snapshot", "-a", name, saved])
        raw = tmp_path / "content"
        raw.write_bytes(content)
        QemuImg.compare(saved, raw, one_fmt="qcow2")

    disk = images.open("image")
    disk.ctx.run(disk.driver.snapshot_apply("theirs"))
    assert disk.read(0, SIZE) == first
    disk.ctx.run(disk.driver.snapshot_delete("theirs"))
    assert disk.read(0, SIZE) == first
    disk.ctx.run(disk.driver.snapshot_apply("ours"))
    assert disk.read(0, SIZE) == second
    disk.ctx.run(disk.driver.snapshot_delete("ours"))
    fourth = scribble(disk, second, rng)
    disk.close()
    images.check("image", tmp_path)
    images.compare("image", fourth, tmp_path)


def test_machine_state_stays_with_its_snapshot_and_never_shows_on_the_disk(
    images: Images, tmp_path: Path
) -> None:
    """A disk with a machine state behind its end grew over it: the new bytes were the state's."""
    source = QemuImg.create(tmp_path / "source", MIB, options={"cluster_size": 512})
    QemuIo(source, fmt="qcow2").run("write -P 1 0 1M", "write -b -P 2 0 300k")
    run_tool(["qemu-img", "snapshot", "-c", "state", source])
    images.load("image", source)
    disk = images.open("image")
    disk.write(0, b"new")
    disk.ctx.run(disk.driver.snapshot_create("ours"))
    assert [entry.l1_size for entry in disk.driver.snapshots][1] == MIB // (512 * 64)
    disk.ctx.run(disk.node.truncate(2 * MIB))
    assert disk.read(MIB, MIB) == bytes(MIB)
    disk.ctx.run(disk.driver.snapshot_apply("state"))
    disk.ctx.run(disk.node.truncate(2 * MIB))
    assert disk.read(0, 2 * MIB) == b"\1" * MIB + bytes(MIB)
    disk.close()
    images.check("image", tmp_path)
    saved = images.save("image", tmp_path)
    run_tool(["qemu-img", "snapshot", "-a", "state", saved])
    QemuIo(saved, fmt="qcow2").run("read -P 1 0 1M", "read -b -P 2 0 300k")
    assert QemuImg.check(saved).corruptions == 0
    disk = images.open("image")
    disk.ctx.run(disk.driver.snapshot_delete("state"))
    disk.ctx.run(disk.driver.snapshot_delete("ours"))
    disk.close()
    images.check("image", tmp_path)


def test_grown_disk_goes_back_with_qemu(images: Images, tmp_path: Path) -> None:
    images.create("image", 100 * KIB, cluster_size=4096)
    disk = images.open("image")
    disk.write(0, b"x" * (100 * KIB))
    disk.ctx.run(disk.driver.snapshot_create("small"))
    disk.ctx.run(disk.node.truncate(64 * MIB))
    disk.close()
    saved = images.save("image", tmp_path)
    run_tool(["qemu-img", "snapshot", "-a", "small", saved])
    assert QemuImg.info(saved)["virtual-size"] == 100 * KIB
    assert QemuImg.check(saved).corruptions == 0
