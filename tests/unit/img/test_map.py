# SPDX-License-Identifier: Apache-2.0
"""`img map` beside qemu-img: the same lines for the same images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockemu.img.map import Entry
from tests.peers.requirement import require_peer
from tests.unit.img.side_by_side import ZOO, Animal, held_by_qemu, our_output, ours, theirs

KEYS_OF_NEWER_QEMU = {"compressed"}


def comparable(text: str) -> list[dict[str, object]]:
    """What version 7.2, which we follow, tells."""
    return [
        {key: value for key, value in entry.items() if key not in KEYS_OF_NEWER_QEMU}
        for entry in json.loads(text)
    ]


def is_followed_version() -> bool:
    return "version 7." in theirs("--version").out


@pytest.mark.parametrize("name", ZOO)
def test_json_is_theirs(zoo: dict[str, Animal], name: str) -> None:
    path, fmt = zoo[name]
    expected = theirs("map", "-f", fmt, "--output=json", path).out
    shown = our_output("map", "-f", fmt, "--output=json", path)
    assert comparable(shown) == comparable(expected)
    if is_followed_version():
        assert shown == expected


@pytest.mark.parametrize("name", ZOO)
def test_human_lines_and_exit_status_are_theirs(
    zoo: dict[str, Animal], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path, fmt = zoo[name]
    expected = theirs("map", "-f", fmt, path)
    shown = ours(capfd, "map", "-f", fmt, path)
    assert (shown.code, shown.out) == (expected.code, expected.out)
    if shown.code:
        assert shown.err.startswith(f"blockemu: {path}: the data at ")


@pytest.mark.parametrize(
    "part", ["-s 64k", "-l 100000", "-s 64k -l 100000", "-s 1M -l 1G", "-s 5M", "-l 0", "-s 123"]
)
def test_part_of_the_disk_is_theirs(zoo: dict[str, Animal], part: str) -> None:
    words = ["map", "-f", "qcow2", "--output=json", *part.split(), str(zoo["chain"].path)]
    assert our_output(*words) == theirs(*words).out


def test_format_is_found_out(zoo: dict[str, Animal]) -> None:
    for name in ("raw-sparse", "qcow2-65536-1.1"):
        path = zoo[name].path
        assert our_output("map", "--output=json", path) == theirs("map", "--output=json", path).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none", "none: No such file or directory"),
        ("-f qcow2 disk.raw", "disk.raw: not a qcow2 image"),
        ("-f vmdk disk.raw", "disk.raw: there is no image format 'vmdk'"),
    ],
)
def test_map_of_what_can_not_be_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(bytes(1 << 20))
    result = ours(capfd, "map", *arguments.split())
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert result.err.startswith(f"blockemu: {message}")


def test_image_that_is_written_is_read_with_force_share_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    require_peer("qemu-io")
    path = tmp_path / "held.qcow2"
    theirs("create", "-q", "-f", "qcow2", path, "1M")
    with held_by_qemu(path):
        refused = ours(capfd, "map", "-f", "qcow2", path)
        assert refused.code == 1
        assert "is in use by another process" in refused.err
        assert ours(capfd, "map", "-U", "-f", "qcow2", path).code == 0


def test_entries_join_only_where_the_second_goes_on_in_the_file() -> None:
    first = Entry(0, 10, present=True, data=True, offset=100, file="x")
    assert first.joined(first._replace(start=10, offset=110)) == first._replace(length=20)
    assert first.joined(first._replace(start=10, offset=120)) is None
    assert first.joined(first._replace(start=10, offset=110, file="y")) is None
    assert first.joined(first._replace(start=10, offset=None)) is None
