# SPDX-License-Identifier: Apache-2.0
"""`img compare` beside qemu-img: the same lines, the same exit status."""

from __future__ import annotations

import shutil
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from tests.unit.img.side_by_side import (
    ZOO,
    Animal,
    held_by_qemu,
    ours,
    random_bytes,
    theirs,
)

SMALL = [name for name in ZOO if name not in ("qcow2-huge", "qcow2-2M")]


def assert_alike(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> int:
    """Both tools end alike; the exit status."""
    expected = theirs("compare", *arguments)
    result = ours(capfd, "compare", *arguments)
    assert (result.code, result.out) == (expected.code, expected.out)
    return result.code


@pytest.mark.parametrize("strict", [[], ["-s"]], ids=["lax", "strict"])
@pytest.mark.parametrize(("one", "other"), [*combinations_with_replacement(SMALL, 2)])
def test_verdict_is_theirs(
    zoo: dict[str, Animal],
    capfd: pytest.CaptureFixture[str],
    one: str,
    other: str,
    strict: list[str],
) -> None:
    formats = ["-f", zoo[one].fmt, "-F", zoo[other].fmt]
    assert_alike(capfd, *strict, *formats, zoo[one].path, zoo[other].path)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("name", ["qcow2-65536-1.1", "chain", "qcow2-packed"])
def test_converted_image_is_identical_until_a_byte_is_changed(
    zoo: dict[str, Animal],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    fmt: str,
) -> None:
    source, copy = zoo[name].path, tmp_path / "copy"
    theirs("convert", "-f", "qcow2", "-O", fmt, source, copy)
    assert assert_alike(capfd, "-f", "qcow2", "-F", fmt, source, copy) == 0
    if fmt == "raw":
        for offset in (0, 513, copy.stat().st_size - 1):
            before = copy.read_bytes()
            with copy.open("r+b") as file:
                file.seek(offset)
                file.write(bytes([before[offset] ^ 0x55]))
            assert assert_alike(capfd, "-f", "qcow2", "-F", fmt, source, copy) == 1
            assert assert_alike(capfd, "-F", "qcow2", "-f", fmt, copy, source) == 1
            copy.write_bytes(before)


@pytest.mark.parametrize("rest", [bytes(70_000), bytes(69_999) + b"x"], ids=["zeroes", "data"])
def test_longer_image_is_judged_by_what_is_behind_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rest: bytes
) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_bytes(random_bytes(1, 5_000_000))
    long.write_bytes(random_bytes(1, 5_000_000) + rest)
    for pair in ((short, long), (long, short)):
        assert assert_alike(capfd, "-f", "raw", "-F", "raw", *pair) == any(rest)
        assert assert_alike(capfd, "-s", "-f", "raw", "-F", "raw", *pair) == 1


def test_difference_is_found_behind_much_that_is_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(random_bytes(2, 9 << 20))
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(data)
    data[(8 << 20) + 777] ^= 1
    other.write_bytes(data)
    result = ours(capfd, "compare", "-f", "raw", "-F", "raw", one, other)
    assert result.out == f"Content mismatch at offset {(8 << 20) + 512}!\n"
    assert_alike(capfd, "-f", "raw", "-F", "raw", one, other)


def test_quiet_compare_says_nothing(
    zoo: dict[str, Animal], capfd: pytest.CaptureFixture[str]
) -> None:
    one, other = zoo["raw-full"].path, zoo["raw-hole"].path
    assert assert_alike(capfd, "-q", "-p", "-f", "raw", "-F", "raw", one, other) == 1
    assert assert_alike(capfd, "-q", "-f", "raw", "-F", "raw", one, one) == 0


def test_progress_in_a_pipe_is_silent(
    zoo: dict[str, Animal], capfd: pytest.CaptureFixture[str]
) -> None:
    path = zoo["raw-full"].path
    result = ours(capfd, "compare", "-p", "-f", "raw", "-F", "raw", path, path)
    assert result == (0, "Images are identical.\n", "")


def test_errors_have_their_exit_status_and_one_line(
    zoo: dict[str, Animal], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = zoo["raw-full"].path
    missing = ours(capfd, "compare", "-f", "raw", good, tmp_path / "none")
    assert missing.code == theirs("compare", "-f", "raw", good, tmp_path / "none").code == 2
    assert missing.err == f"blockemu: {tmp_path}/none: No such file or directory\n"
    unknown = ours(capfd, "compare", "-f", "vmdk", good, good)
    assert unknown.code == 2
    assert unknown.err == f"blockemu: {good}: there is no image format 'vmdk'\n"


def test_damaged_image_fails_where_it_is_damaged(
    zoo: dict[str, Animal], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A compressed cluster that can't be unpacked: block status is known, the data isn't."""
    image = tmp_path / "damaged.qcow2"
    shutil.copy(zoo["qcow2-packed"].path, image)
    data = bytearray(image.read_bytes())
    data[5 * 65536 :] = bytes(len(data) - 5 * 65536)
    image.write_bytes(data)
    expected = theirs("compare", "-f", "qcow2", "-F", "raw", image, zoo["raw-sparse"].path)
    result = ours(capfd, "compare", "-f", "qcow2", "-F", "raw", image, zoo["raw-sparse"].path)
    assert result.code == expected.code == 4
    assert result.err.splitlines()[-1].startswith(f"blockemu: {image}: Input/output error")


def test_image_in_use_is_compared_with_force_share_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "held.qcow2"
    theirs("create", "-q", "-f", "qcow2", path, "1M")
    with held_by_qemu(path):
        assert ours(capfd, "compare", path, path).code == 2
        assert ours(capfd, "compare", "-U", path, path).code == 0
