# SPDX-License-Identifier: Apache-2.0
"""Growing and shrinking the virtual disk."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.support import KIB, MIB, Images


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_grown_disk_reads_zeroes_behind_its_old_end(
    images: Images, tmp_path: Path, compat: str
) -> None:
    images.create("image", 100 * KIB, cluster_size=4096, compat=compat)
    disk = images.open("image")
    disk.write(0, b"x" * (100 * KIB))
    l1 = disk.driver.image.header.l1_table_offset
    disk.ctx.run(disk.node.truncate(2048 * MIB))
    assert disk.driver.image.header.l1_table_offset != l1
    assert disk.node.length_bytes == 2048 * MIB
    assert disk.read(99 * KIB, 64 * KIB) == b"x" * KIB + bytes(63 * KIB)
    disk.write(2048 * MIB - 512, b"y" * 512)
    disk.close()
    images.check("image", tmp_path)
    assert images.open("image").read(2048 * MIB - 512, 512) == b"y" * 512


def test_longer_backing_file_does_not_show_behind_the_old_end(images: Images) -> None:
    images.files.add("base", b"\xff" * MIB)
    images.create("image", 100 * KIB, backing_file="base", backing_fmt="raw")
    disk = images.open("image")
    disk.ctx.run(disk.node.truncate(2 * MIB))
    assert disk.read(0, 2 * MIB) == b"\xff" * (100 * KIB) + bytes(2 * MIB - 100 * KIB)


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
@pytest.mark.parametrize("length", [0, 512, 40 * KIB, 41 * KIB, 3 * MIB])
def test_shrunk_disk_keeps_its_start_and_grows_again_with_zeroes(
    images: Images, tmp_path: Path, compat: str, length: int
) -> None:
    images.create("image", 4 * MIB, cluster_size=4096, compat=compat)
    disk = images.open("image")
    data = bytes(range(1, 251)) * (4 * MIB // 250 + 1)
    disk.write(0, data[: 4 * MIB])
    disk.flush()
    disk.ctx.run(disk.node.truncate(length))
    assert disk.node.length_bytes == length
    disk.close()
    images.check("image", tmp_path)
    images.compare("image", data[:length], tmp_path)
    disk = images.open("image")
    disk.ctx.run(disk.node.truncate(4 * MIB))
    disk.close()
    images.check("image", tmp_path)
    images.compare("image", data[:length] + bytes(4 * MIB - length), tmp_path)


def test_shrunk_disk_frees_its_clusters_and_tables(images: Images, tmp_path: Path) -> None:
    """With clusters of 512 bytes, an L2 table maps 32 KiB."""
    images.create("image", MIB, cluster_size=512)
    disk = images.open("image")
    disk.write(0, b"x" * MIB)
    disk.ctx.run(disk.node.truncate(32 * KIB))
    assert [bool(word) for word in disk.driver.image.l1.words] == [True] + [False] * 31
    used = disk.driver.image.refcounts.used_end
    disk.ctx.run(disk.node.truncate(MIB))
    disk.write(32 * KIB, b"y" * (MIB - 32 * KIB))
    assert disk.driver.image.refcounts.used_end <= used
    disk.close()
    images.check("image", tmp_path)
    images.compare("image", b"x" * 32 * KIB + b"y" * (MIB - 32 * KIB), tmp_path)


def test_backing_file_does_not_show_in_a_disk_that_shrank_and_grew(images: Images) -> None:
    images.files.add("base", b"\xff" * MIB)
    images.create("image", MIB, backing_file="base", backing_fmt="raw")
    disk = images.open("image")
    disk.write(700 * KIB, b"x" * 512)
    disk.ctx.run(disk.node.truncate(100 * KIB))
    disk.ctx.run(disk.node.truncate(MIB))
    assert disk.read(0, MIB) == b"\xff" * (100 * KIB) + bytes(MIB - 100 * KIB)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options",
    [{}, {"compat": "0.10"}, {"extended_l2": "on"}, {"data_file": "data"}],
    ids=str,
)
def test_preallocated_growth_shows_nothing_that_lay_there(
    images: Images, tmp_path: Path, options: dict[str, str], mode: str
) -> None:
    """Neither in clusters that are free again, nor on another try after a shrink."""
    images.create("image", 3 * MIB, cluster_size=16384, **options)
    disk = images.open("image", pass_discard_request=False)
    for _ in range(2):
        disk.write(0, b"x" * 3 * MIB)
        disk.flush()
        disk.ctx.run(disk.node.truncate(MIB + 512))
        disk.ctx.run(disk.node.truncate(3 * MIB, preallocation=mode))
        assert disk.read(0, 3 * MIB) == b"x" * (MIB + 512) + bytes(2 * MIB - 512)
    disk.close()
    images.check("image", tmp_path)


@pytest.mark.parametrize("options", [{"cluster_size": 4096}, {"extended_l2": "on"}], ids=str)
def test_growth_that_finds_no_space_leaves_the_old_disk_and_keeps_none(
    images: Images, options: dict[str, Any]
) -> None:
    failures = 0
    while True:
        image = images.create("image", 300 * KIB, **options)
        disk = images.open("image")
        disk.write(0, b"x" * 300 * KIB)
        disk.flush()
        calls = 0

        def fault(kind: str, offset: int, length: int) -> int:
            nonlocal calls
            if kind not in ("write", "zero", "truncate") or (kind == "write" and not offset):
                return 0  # after a write of the header that failed, nobody knows what it says
            calls += 1
            return errno.ENOSPC if calls == failures + 1 else 0  # noqa: B023

        image.fault = fault
        try:
            disk.ctx.run(disk.node.truncate(2 * MIB, preallocation="full"))
            break
        except OSError as error:
            code = error.errno
        assert code == errno.ENOSPC
        image.fault = None
        assert disk.node.length_bytes == 300 * KIB
        assert disk.read(0, 300 * KIB) == b"x" * 300 * KIB
        disk.close()
        judged = Checker(image.content)
        assert not judged.corruptions
        assert not judged.leaks
        assert len(judged.references) * judged.size < MIB
        failures += 1
    assert failures > 3


@pytest.mark.parametrize(("length", "code"), [(1000, errno.EINVAL), (64 * KIB, errno.ENOTSUP)])
def test_size_that_can_not_be_is_refused(images: Images, length: int, code: int) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    preallocation = "full" if length == 64 * KIB else "off"
    with pytest.raises(OSError) as caught:
        disk.ctx.run(disk.node.truncate(length, preallocation=preallocation))
    assert caught.value.errno == code
    assert disk.node.length_bytes == MIB


def test_disk_beyond_the_format_is_refused(images: Images) -> None:
    images.create("image", MIB, cluster_size=512)
    disk = images.open("image")
    with pytest.raises(OSError) as caught:
        disk.ctx.run(disk.node.truncate(1 << 40))
    assert caught.value.errno == errno.EFBIG
    assert disk.node.length_bytes == MIB


def test_machine_state_behind_the_end_does_not_show_on_a_grown_disk(
    images: Images, tmp_path: Path
) -> None:
    """QEMU keeps a machine state in L1 entries behind the disk's. A disk that grew over them had
    the state's bytes for its own."""
    source = QemuImg.create(tmp_path / "source", MIB, options={"cluster_size": 512})
    QemuIo(source, fmt="qcow2").run("write -P 1 0 1M", "write -b -P 2 0 300k")
    images.load("image", source)
    disk = images.open("image")
    disk.ctx.run(disk.node.truncate(2 * MIB))
    assert disk.read(0, 2 * MIB) == b"\1" * MIB + bytes(MIB)
    disk.close()
    images.check("image", tmp_path)


def test_version_2_with_snapshots_is_not_resized(images: Images, tmp_path: Path) -> None:
    source = QemuImg.create(tmp_path / "source", MIB, options={"compat": "0.10"})
    run_tool(["qemu-img", "snapshot", "-c", "s", source])
    images.load("image", source)
    disk = images.open("image")
    with pytest.raises(OSError, match="resizing version 2 with snapshots") as caught:
        disk.ctx.run(disk.node.truncate(2 * MIB))
    assert caught.value.errno == errno.ENOTSUP
    assert disk.node.length_bytes == MIB


def test_disk_that_shrinks_lets_go_of_the_machine_state_too(images: Images, tmp_path: Path) -> None:
    """Its L2 tables went with the disk's; what their entries named would have leaked."""
    source = QemuImg.create(tmp_path / "source", MIB, options={"cluster_size": 512})
    QemuIo(source, fmt="qcow2").run("write -P 1 0 1M", "write -b -P 2 0 300k")
    images.load("image", source)
    disk = images.open("image")
    disk.ctx.run(disk.node.truncate(MIB // 2))
    assert disk.read(0, MIB // 2) == b"\1" * (MIB // 2)
    disk.close()
    images.check("image", tmp_path)


def test_disk_that_shrinks_leaves_a_snapshot_whole(images: Images, tmp_path: Path) -> None:
    images.create("image", MIB, cluster_size=512)
    disk = images.open("image")
    disk.write(0, b"\1" * MIB)
    disk.ctx.run(disk.driver.snapshot_create("before"))
    disk.ctx.run(disk.node.truncate(100 * KIB))
    disk.write(0, b"\2" * 512)
    disk.close()
    images.check("image", tmp_path)
    disk = images.open("image")
    disk.ctx.run(disk.driver.snapshot_apply("before"))
    assert disk.node.length_bytes == MIB
    assert disk.read(0, MIB) == b"\1" * MIB
    disk.close()
    images.check("image", tmp_path)
