# SPDX-License-Identifier: Apache-2.0
"""`img resize` beside qemu-img: the same sizes, the same refusals, images it approves of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.peers.qemu import QemuImg, QemuIo
from tests.unit.img.side_by_side import (
    Animal,
    held_by_qemu,
    our_output,
    ours,
    random_bytes,
    theirs,
)

SIZES = ["+1M", "+512", "3M", "1.5G", "--shrink -512", "--shrink 64k", "--shrink -1M", "2M"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("raw", "size=2M"),
        ("qcow2", "cluster_size=4k"),
        ("qcow2", "compat=0.10"),
        ("qcow2", "extended_l2=on"),
    ],
)
def test_size_and_content_are_theirs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fmt: str, options: str, size: str
) -> None:
    source, our_image, their_image = (tmp_path / name for name in ("source", "ours", "theirs"))
    source.write_bytes(random_bytes(7, 2 << 20))
    theirs("convert", "-f", "raw", "-O", fmt, "-o", options, source, their_image)
    shutil.copy(their_image, our_image)
    *flags, last = size.split()
    expected = theirs("resize", "-q", "-f", fmt, *flags, *(["--"] if last[0] == "-" else []),
                      their_image, last)  # fmt: skip
    result = ours(capfd, "resize", "-f", fmt, *flags, our_image, last)
    assert (result.code, expected.code) == (0, 0), (result, expected)
    assert result.out == "Image resized.\n"
    assert virtual_size(our_image, fmt) == virtual_size(their_image, fmt)
    assert theirs("compare", "-f", fmt, "-F", fmt, our_image, their_image).code == 0
    if fmt == "qcow2":
        assert theirs("check", "-q", "-f", "qcow2", our_image).code == 0


def virtual_size(path: Path, fmt: str) -> int:
    found = json.loads(theirs("info", "--output=json", "-f", fmt, path).out)
    return int(found["virtual-size"])


@pytest.mark.parametrize(("mode", "blocks"), [("off", 0), ("falloc", 2048), ("full", 2048)])
def test_raw_image_grows_with_preallocation(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], mode: str, blocks: int
) -> None:
    path = tmp_path / "image"
    path.touch()
    result = ours(capfd, "resize", "-q", "-f", "raw", "--preallocation", mode, path, "1M")
    assert result == (0, "", "")
    assert (path.stat().st_size, path.stat().st_blocks) == (1 << 20, blocks)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=64k,compat=0.10",
        "extended_l2=on",
        "data_file={}",
        "data_file={},data_file_raw=on",
        "data_file={},extended_l2=on",
        "data_file={},extended_l2=on,data_file_raw=on",
    ],
)
def test_qcow2_image_grows_with_preallocation_as_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, mode: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["resize", "-q", "-f", "qcow2", "--preallocation", mode]
    for run, name in ((our_output, "ours"), (theirs, "theirs")):
        made = options.format(f"{name}.data")
        theirs("create", "-q", "-f", "qcow2", "-o", made, name, "1000k")
        QemuIo(tmp_path / name, fmt="qcow2").run("write -P 5 900k 90k")
        run(*words, name, "3M")
        assert QemuImg.check(tmp_path / name)[:3] == (0, 0, 0)
        if mode != "metadata":
            data = tmp_path / (f"{name}.data" if "data_file" in options else name)
            assert data.stat().st_blocks * 512 >= 2 << 20
    QemuImg.compare(tmp_path / "ours", tmp_path / "theirs", one_fmt="qcow2", other_fmt="qcow2")
    if "raw" in options:  # all of ours is mapped, subclusters too: drivers/qcow2/data_file.py
        assert all(present("ours")[2048:])
    else:  # of the old disk's last cluster, we make the rest zeroes
        assert present("ours")[2048:] == present("theirs")[2048:]


def present(name: str) -> list[bool]:
    """By the sector: whether it is in the image, to QEMU."""
    found = []
    for entry in json.loads(theirs("map", "--output=json", "-f", "qcow2", name).out):
        found += [entry["present"]] * (entry["length"] // 512)
    return found


@pytest.mark.parametrize("options", ["cluster_size=4k", "compat=0.10", "extended_l2=on"])
def test_longer_backing_file_does_not_show_in_what_is_preallocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").write_bytes(random_bytes(9, 2 << 20))
    theirs("create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", "top", "1M")
    our_output("resize", "-q", "-f", "qcow2", "--preallocation=metadata", "top", "3M")
    QemuIo(tmp_path / "top", fmt="qcow2").run("read -P 0 1M 2M")
    base = Path("base").read_bytes()
    our_output("convert", "-f", "qcow2", "-O", "raw", "top", "copy")
    assert Path("copy").read_bytes() == base[: 1 << 20] + bytes(2 << 20)
    assert QemuImg.check(tmp_path / "top")[:3] == (0, 0, 0)


def test_odd_raw_image_counts_as_whole_sectors(
    zoo: dict[str, Animal], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd"
    shutil.copy(zoo["raw-odd-data"].path, path)
    assert ours(capfd, "resize", "-f", "raw", path, "+1k").code == 0
    assert path.stat().st_size == 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none +1M", "none: No such file or directory"),
        ("-f vmdk x.raw +1M", "x.raw: there is no image format 'vmdk'"),
        ("x.raw abc", "x.raw: 'abc' is not a size"),
        ("x.raw +1Q", "x.raw: '1Q' is not a size"),
        ("x.raw 1k", "x.raw: would lose all that lies behind byte 1024: say --shrink"),
        ("x.raw -1k", "x.raw: would lose all that lies behind byte 1047552: say --shrink"),
        ("--shrink x.raw -10M", "x.raw: a new size of -9437184 bytes is too small"),
        ("--shrink x.raw 0", "x.raw: a new size of 0 bytes is too small"),
        ("--shrink --preallocation full x.raw 1k", "x.raw: --preallocation is for growing"),
        ("--preallocation metadata x.raw 2M", "x.raw: a raw image can't grow with prealloc"),
        ("--preallocation full --shrink x.qcow2 64k", "x.qcow2: --preallocation is for growing"),
        ("x.qcow2 +100", "x.qcow2: Invalid argument (x.qcow2: 1048676 is no multiple of 512)"),
        ("x.qcow2 1E", "x.qcow2: File too large"),
    ],
)
def test_resize_to_what_can_not_be_is_one_line_and_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.raw").write_bytes(random_bytes(8, 1 << 20))
    theirs("convert", "-f", "raw", "-O", "qcow2", "x.raw", "x.qcow2")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    result = ours(capfd, "resize", *arguments.split())
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert result.err.startswith(f"blockemu: {message}")
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_image_in_use_is_not_resized(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "held.qcow2"
    theirs("create", "-q", "-f", "qcow2", path, "1M")
    with held_by_qemu(path):
        result = ours(capfd, "resize", path, "+1M")
    assert result.code == 1
    assert "is in use by another process" in result.err
