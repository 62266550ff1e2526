# SPDX-License-Identifier: Apache-2.0
"""`img convert`: qemu-img finds what was copied identical, clean and as sparse as its own copy."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from blockemu.img.convert import ConvertRequest, convert_images
from tests.unit.img.side_by_side import (
    ZOO,
    Animal,
    held_by_qemu,
    our_output,
    ours,
    random_bytes,
    theirs,
)

TARGETS = {
    "raw": ("raw", []),
    "qcow2": ("qcow2", []),
    "qcow2-4k-v2": ("qcow2", ["-o", "cluster_size=4k,compat=0.10"]),
    "qcow2-2M": ("qcow2", ["-o", "cluster_size=2M"]),
    "qcow2-subclusters": ("qcow2", ["-o", "extended_l2=on"]),
}
SMALL = [name for name in ZOO if name != "qcow2-huge"]


def assert_identical(source: Animal, path: Path, fmt: str) -> None:
    """qemu-img's verdict, on content and on the image."""
    compared = theirs("compare", "-f", source.fmt, "-F", fmt, source.path, path)
    assert (compared.code, compared.out) == (0, "Images are identical.\n")
    if fmt == "qcow2":
        assert theirs("check", "-q", "-f", "qcow2", path).code == 0


def data_bytes(path: Path, fmt: str) -> int:
    """How much of an image isn't known to be zeroes."""
    entries = json.loads(theirs("map", "--output=json", "-f", fmt, path).out)
    return sum(entry["length"] for entry in entries if entry["data"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SMALL)
def test_copy_is_identical_and_as_sparse_as_theirs(
    zoo: dict[str, Animal], tmp_path: Path, name: str, target: str
) -> None:
    source = zoo[name]
    fmt, options = TARGETS[target]
    our_copy, their_copy = tmp_path / "ours", tmp_path / "theirs"
    arguments = ["convert", "-f", source.fmt, "-O", fmt, *options, str(source.path)]
    assert our_output(*arguments, our_copy) == ""
    assert theirs(*arguments, their_copy).code == 0
    assert_identical(source, our_copy, fmt)
    assert data_bytes(our_copy, fmt) <= data_bytes(their_copy, fmt)
    if fmt == "raw":
        assert our_copy.stat().st_size == their_copy.stat().st_size


COMPRESSED = ["cluster_size=512", "compression_type=zstd", "cluster_size=2M", "compat=0.10"]


@pytest.mark.parametrize("options", COMPRESSED)
@pytest.mark.parametrize("name", SMALL)
def test_compressed_copy_is_identical_and_no_larger_than_a_plain_one(
    zoo: dict[str, Animal], tmp_path: Path, name: str, options: str
) -> None:
    source = zoo[name]
    arguments = ["-f", source.fmt, "-O", "qcow2", "-o", options, str(source.path)]
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    assert our_output("convert", "-c", *arguments, packed) == ""
    assert_identical(source, packed, "qcow2")
    our_output("convert", *arguments, plain)
    assert packed.stat().st_size <= plain.stat().st_size


def test_compressed_copy_into_a_longer_disk_keeps_what_is_behind_it(tmp_path: Path) -> None:
    source, target, expected = (tmp_path / name for name in ("source", "target", "expected"))
    source.write_bytes(b"\1" * 100_352)
    expected.write_bytes(b"\1" * 100_352 + b"\2" * ((1 << 20) - 100_352))
    (tmp_path / "twos").write_bytes(b"\2" * (1 << 20))
    theirs("convert", "-f", "raw", "-O", "qcow2", tmp_path / "twos", target)
    our_output("convert", "-c", "-n", "-f", "raw", "-O", "qcow2", source, target)
    assert_identical(Animal(expected, "raw"), target, "qcow2")


def test_huge_empty_image_is_copied_at_once(zoo: dict[str, Animal], tmp_path: Path) -> None:
    source, copy = zoo["qcow2-huge"], tmp_path / "copy"
    our_output("convert", "-f", "qcow2", "-O", "qcow2", source.path, copy)
    assert_identical(source, copy, "qcow2")
    assert copy.stat().st_size < 1 << 20


@pytest.mark.parametrize(
    "options",
    ["-m 1", "-m 16 -W", "-W", "-S 0", "-S 512", "-S 64k", "-T none -t none", "-t writeback"],
)
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_copy_with_options_is_identical(tmp_path: Path, fmt: str, options: str) -> None:
    data = bytearray(random_bytes(3, 11 << 20))
    for offset in range(0, len(data), 300_000):
        length = offset // 30
        data[offset : offset + length] = bytes(length)
    source = Animal(tmp_path / "source", "raw")
    source.path.write_bytes(data[: 11 << 20])
    copy = tmp_path / "copy"
    our_output("convert", *options.split(), "-f", "raw", "-O", fmt, source.path, copy)
    assert_identical(source, copy, fmt)


def test_zeroes_inside_data_become_holes_as_large_as_asked(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes((b"x" * 4096 + bytes(4096)) * 16 + bytes(65536) + b"x" * 65536)
    full = source.stat().st_size
    for size, expected in (("0", full), ("4k", full - 131072), ("64k", full - 65536)):
        our_output("convert", "-f", "raw", "-O", "raw", "-S", size, source, copy)
        assert copy.stat().st_blocks * 512 == expected
        assert copy.read_bytes() == source.read_bytes()


def test_several_sources_lie_one_behind_the_other(zoo: dict[str, Animal], tmp_path: Path) -> None:
    names = ["raw-odd-data", "raw-empty", "raw-sparse", "raw-tiny", "raw-odd-hole"]
    sources = [str(zoo[name].path) for name in names]
    for fmt in ("raw", "qcow2"):
        our_copy, their_copy = tmp_path / f"ours.{fmt}", tmp_path / f"theirs.{fmt}"
        our_output("convert", "-f", "raw", "-O", fmt, *sources, our_copy)
        theirs("convert", "-f", "raw", "-O", fmt, *sources, their_copy)
        assert_identical(Animal(their_copy, fmt), our_copy, fmt)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("name", ["raw-sparse", "qcow2-65536-1.1", "chain"])
def test_existing_target_is_overwritten_zeroes_included(
    zoo: dict[str, Animal], tmp_path: Path, name: str, fmt: str
) -> None:
    source, target = zoo[name], tmp_path / "target"
    noise = tmp_path / "noise"
    noise.write_bytes(random_bytes(5, 4 << 20))
    theirs("convert", "-f", "raw", "-O", fmt, noise, target)
    our_output("convert", "-n", "-f", source.fmt, "-O", fmt, source.path, target)
    raw = tmp_path / "raw"
    theirs("convert", "-f", fmt, "-O", "raw", target, raw)
    length = theirs_length(source)
    assert raw.read_bytes()[length:] == noise.read_bytes()[length:]
    with raw.open("r+b") as file:
        file.truncate(length)
    assert_identical(source, raw, "raw")


def theirs_length(animal: Animal) -> int:
    found = json.loads(theirs("info", "--output=json", "-f", animal.fmt, animal.path).out)
    return int(found["virtual-size"])


def test_target_that_is_zero_is_written_where_there_is_data_only(
    zoo: dict[str, Animal], tmp_path: Path
) -> None:
    source, target = zoo["raw-sparse"], tmp_path / "target"
    theirs("create", "-q", "-f", "qcow2", target, "3M")
    our_output("convert", "-n", "--target-is-zero", "-f", "raw", "-O", "qcow2", source.path, target)
    assert_identical(source, target, "qcow2")
    assert data_bytes(target, "qcow2") < 1 << 20


def test_only_what_lies_above_the_backing_file_is_copied(
    zoo: dict[str, Animal], tmp_path: Path
) -> None:
    source = zoo["chain"]
    backing = source.path.parent / "middle.qcow2"
    our_copy, their_copy = tmp_path / "ours", tmp_path / "theirs"
    arguments = [
        "convert", "-f", "qcow2", "-O", "qcow2", "-B", str(backing), "-F", "qcow2",
        str(source.path),
    ]  # fmt: skip
    our_output(*arguments, our_copy)
    theirs(*arguments, their_copy)
    assert_identical(source, our_copy, "qcow2")
    assert our_copy.stat().st_size <= their_copy.stat().st_size
    shown, expected = (
        json.loads(theirs("map", "--output=json", "-f", "qcow2", path).out)
        for path in (our_copy, their_copy)
    )
    assert [strip(entry) for entry in shown] == [strip(entry) for entry in expected]


def strip(entry: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in entry.items() if key != "offset"}


def test_existing_target_keeps_what_its_backing_file_shows(
    zoo: dict[str, Animal], tmp_path: Path
) -> None:
    source, target = zoo["chain"], tmp_path / "target"
    backing = source.path.parent / "middle.qcow2"
    theirs("create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", target, "3M")
    our_output("convert", "-n", "-B", backing, "-f", "qcow2", "-O", "qcow2", source.path, target)
    assert_identical(source, target, "qcow2")
    assert data_bytes(target, "qcow2") <= data_bytes(source.path, "qcow2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(bytes(1 << 20))
    Path("small.raw").write_bytes(bytes(1 << 19))
    theirs("create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "over.qcow2")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none x", "none: No such file or directory"),
        ("-f vmdk disk.raw x", "disk.raw: there is no image format 'vmdk'"),
        ("-f qcow2 disk.raw x", "disk.raw: not a qcow2 image"),
        ("-O vmdk disk.raw x", "x: can't create format 'vmdk'; known: luks, qcow2, raw"),
        ("over.qcow2 x", "over.qcow2: names another file, 'disk.raw'"),
        ("disk.raw none/x", "none/x: No such file or directory"),
        ("disk.raw disk.raw", "disk.raw: is in use"),
        ("-O qcow2 -o nope=1 disk.raw x", "x: format qcow2 has no option 'nope'"),
        ("-O qcow2 -o size=1M disk.raw x", "x: the size is given twice"),
        ("-O qcow2 -B disk.raw disk.raw x", "x: the backing file's format must be given"),
        ("-O qcow2 -B none -F raw disk.raw x", "none: is the backing file of x: No such file"),
        ("-O raw -B disk.raw -F raw disk.raw x", "x: format raw has no backing files"),
        ("-n disk.raw x", "x: No such file or directory"),
        ("-c disk.raw x", "x: format raw has no compression (-c)"),
        ("-c -O qcow2 -o cluster_size=1M small.raw disk.raw x", "small.raw: has 524288 bytes, and"),
        ("-n disk.raw small.raw", "small.raw: has 524288 bytes, fewer than the 1048576"),
        ("-n -O qcow2 disk.raw small.raw", "small.raw: not a qcow2 image"),
        ("-n -o size=1M disk.raw small.raw", "small.raw: is not made anew (-n)"),
        ("-n -B x disk.raw small.raw", "small.raw: has no backing file"),
        ("--target-is-zero disk.raw x", "x: is new: --target-is-zero goes with -n only"),
        ("-n --target-is-zero -O qcow2 disk.raw over.qcow2", "over.qcow2: has a backing file"),
        ("-S 100 disk.raw x", "-S: takes a multiple of 512"),
        ("-S 32M disk.raw x", "-S: takes a multiple of 512"),
    ],
)
def test_convert_of_what_can_not_be_is_one_line_and_leaves_no_file(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    result = ours(capfd, "convert", *arguments.split())
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert result.err.startswith(f"blockemu: {message}")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_wrong_usage_exits_with_2(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["disk.raw"], [], ["-m", "17", "disk.raw", "x"], ["-t", "no", "a", "b"]):
        assert ours(capfd, "convert", *arguments).code == 2


def test_source_that_can_not_be_read_leaves_no_target(
    zoo: dict[str, Animal], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(zoo["qcow2-packed"].path.read_bytes())
    data[5 * 65536 :] = bytes(len(data) - 5 * 65536)
    Path("damaged.qcow2").write_bytes(data)
    result = ours(capfd, "convert", "-f", "qcow2", "-O", "qcow2", "damaged.qcow2", "x")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("blockemu: damaged.qcow2: Input/output error")
    assert not Path("x").exists()


@pytest.mark.parametrize("existed", [False, True])
def test_interrupt_removes_what_was_made_and_nothing_else(tmp_path: Path, existed: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(random_bytes(9, 16 << 20))
    if existed:
        target.touch()
    told = []

    def interrupt(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 2:
            signal.raise_signal(signal.SIGINT)

    request = ConvertRequest(
        sources=[str(source)], target=str(target), source_fmt="raw", requests_max=2
    )
    with pytest.raises(KeyboardInterrupt):
        convert_images(request, progress=interrupt)
    assert told[-1] < 16 << 20
    assert target.exists() == existed


def test_locked_images_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    theirs("create", "-q", "-f", "qcow2", "held.qcow2", "1M")
    with held_by_qemu(Path("held.qcow2")):
        before = Path("held.qcow2").read_bytes()
        for arguments in (["held.qcow2", "x"], ["disk.raw", "held.qcow2"]):
            result = ours(capfd, "convert", *arguments)
            assert (result.code, result.err.count("\n")) == (1, 1)
            assert result.err.startswith("blockemu: held.qcow2: is in use by another process")
        assert Path("held.qcow2").read_bytes() == before
        assert ours(capfd, "convert", "-U", "held.qcow2", "x").code == 0


def test_options_are_listed_for_the_target(folder: Path) -> None:
    assert "cluster_size" in our_output("convert", "-O", "qcow2", "-o", "help", "a", "b")
