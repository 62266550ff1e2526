# SPDX-License-Identifier: Apache-2.0
"""`img convert -l` and `--salvage`: from a snapshot, and from what is left of a broken image."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.peers.qemu import run_tool
from tests.unit.img.side_by_side import our_output, ours, random_bytes, theirs

KIB = 1024
CLUSTER = 64 * KIB
OFFSET_BITS = 62 - (16 - 8)
"""Of a compressed cluster's descriptor, for clusters of 2**16 bytes."""


@pytest.fixture
def snapshots(tmp_path: Path) -> Path:
    """A disk of 0x11 when `first` was taken, with 0x22 at its start for `second`, and now 0x33."""
    path = tmp_path / "disk.qcow2"
    assert theirs("create", "-q", "-f", "qcow2", path, "1M").code == 0
    for pattern, name in ((0x11, "first"), (0x22, "second"), (0x33, None)):
        length = "1M" if name == "first" else "128k"
        run_tool(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 0 {length}", path])
        if name is not None:
            assert theirs("snapshot", "-c", name, path).code == 0
    return path


@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize("snapshot", ["first", "second", "2"])
def test_snapshot_is_copied_as_theirs(
    snapshots: Path, tmp_path: Path, snapshot: str, target: str
) -> None:
    our_copy, their_copy = tmp_path / "ours", tmp_path / "theirs"
    words = ["convert", "-l", snapshot, "-f", "qcow2", "-O", target, str(snapshots)]
    assert our_output(*words, our_copy) == ""
    assert theirs(*words, their_copy).code == 0
    compared = theirs("compare", "-f", target, "-F", target, our_copy, their_copy)
    assert (compared.code, compared.out) == (0, "Images are identical.\n")
    assert theirs("compare", "-f", target, "-F", "qcow2", our_copy, snapshots).code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-l", "third", "-f", "qcow2", "disk.qcow2"], "disk.qcow2: there is no snapshot 'third'"),
        (["-l", "first", "-f", "raw", "disk.qcow2"], "disk.qcow2: format raw has no internal snap"),
        (["-l", "first", "-f", "qcow2", "disk.qcow2", "disk.qcow2"], "-l: takes a single source"),
    ],
)
def test_snapshot_that_is_not_there_is_one_line(
    snapshots: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(snapshots.parent)
    found = ours(capfd, "convert", *words, "copy")
    assert found.code == 1
    assert found.err.startswith(f"blockemu: {message}")
    assert len(found.err.splitlines()) == 1
    assert theirs("convert", *words, "copy").code == 1
    assert not Path("copy").exists()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Compressed clusters, the second of which can't be unpacked."""
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    half = CLUSTER // 2
    content = b"".join(random_bytes(seed, half) + bytes([seed]) * half for seed in (1, 2, 3))
    raw.write_bytes(content)
    assert theirs("convert", "-c", "-f", "raw", "-O", "qcow2", raw, path).code == 0
    with path.open("r+b") as image:
        data = image.read()
        (l1,) = struct.unpack_from(">Q", data, 40)
        l2 = struct.unpack_from(">Q", data, l1)[0] & 0x00FF_FFFF_FFFF_FE00
        descriptor = struct.unpack_from(">Q", data, l2 + 8)[0]  # of the second cluster
        image.seek((descriptor & ((1 << OFFSET_BITS) - 1)) + KIB)
        image.write(b"\xff" * 8 * KIB)
    return path


def test_unreadable_source_ends_the_copy(
    broken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", "-f", "qcow2", "-O", "raw", str(broken)]
    assert theirs(*words, tmp_path / "theirs").code == 1
    found = ours(capfd, *words, tmp_path / "ours")
    assert found.code == 1
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_salvaged_copy_is_theirs(
    broken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], target: str
) -> None:
    words = ["convert", "--salvage", "-f", "qcow2", "-O", target, str(broken)]
    their_run = theirs(*words, tmp_path / "theirs")
    assert their_run.code == 0
    our_run = ours(capfd, *words, tmp_path / "ours")
    assert our_run.code == 0
    sectors = [f"offset {offset}:" for offset in range(CLUSTER, 2 * CLUSTER, 512)]
    for run in (our_run, their_run):
        lines = [line for line in run.err.splitlines() if "while reading offset" in line]
        assert len(lines) == len(sectors)
        assert all(sector in line for sector, line in zip(sectors, lines, strict=True))
    compared = theirs("compare", "-f", target, "-F", target, tmp_path / "ours", tmp_path / "theirs")
    assert (compared.code, compared.out) == (0, "Images are identical.\n")


def test_quiet_salvage_tells_no_sectors(
    broken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", "--salvage", "-q", "-f", "qcow2", "-O", "raw", str(broken)]
    found = ours(capfd, *words, tmp_path / "ours")
    assert (found.code, found.out) == (0, "")
    assert "while reading" not in found.err
    assert found.err.count("\n") == 1  # the log, of the damaged cluster
