# SPDX-License-Identifier: Apache-2.0
"""`img create` and `img info` beside qemu-img: the same lines and keys, images it approves of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from blockemu.cli import cli
from tests.peers.qemu import run_tool
from tests.peers.requirement import require_peer

KEYS_OF_NEWER_QEMU = {"children"}
"""What later versions than the one that we follow (7.2) add."""


@pytest.fixture(autouse=True)
def _peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_peer("qemu-img")
    monkeypatch.chdir(tmp_path)
    for name in ("base.raw", "base.qcow2"):
        run_tool(["qemu-img", "create", "-q", "-f", name.split(".")[1], name, "4M"])
    Path("theirs").mkdir()
    Path("ours").mkdir()


def blockemu(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def qemu_img(*arguments: str) -> str:
    return run_tool(["qemu-img", *arguments]).stdout


def without_disk_size(text: str) -> str:
    """What an image takes on disk depends on how it was written, not only on what it is."""
    return re.sub(r"disk size: .*", "disk size: X", text)


def comparable(text: str) -> dict[str, Any]:
    facts = json.loads(text)
    facts.pop("actual-size")
    return {key: value for key, value in facts.items() if key not in KEYS_OF_NEWER_QEMU}


def human_is_comparable() -> bool:
    """Later versions print more lines; the keys of JSON are compared with those, too."""
    return "version 7." in qemu_img("--version")


CREATIONS = {
    "raw": "-f raw disk 10M",
    "raw-ragged": "-f raw disk 1000",
    "raw-falloc": "-f raw -o preallocation=falloc disk 1M",
    "raw-full": "-o preallocation=full disk 1.5M",
    "raw-empty": "-f raw disk 0",
    "qcow2": "-f qcow2 disk 64M",
    "qcow2-empty": "-f qcow2 disk 0",
    "qcow2-ragged": "-f qcow2 disk 2000001",
    "qcow2-small-clusters": "-f qcow2 -o cluster_size=512 disk 3M",
    "qcow2-large-clusters": "-f qcow2 -o cluster_size=2M disk 1T",
    "qcow2-v2": "-f qcow2 -o compat=0.10 disk 10M",
    "qcow2-lazy": "-f qcow2 -o lazy_refcounts=on,refcount_bits=1 disk 10M",
    "qcow2-wide": "-f qcow2 -o refcount_bits=64 disk 10M",
    "qcow2-metadata": "-f qcow2 -o preallocation=metadata disk 10M",
    "qcow2-falloc": "-f qcow2 -o preallocation=falloc,cluster_size=4k disk 2M",
    "qcow2-full": "-f qcow2 -o preallocation=full disk 2M",
    "qcow2-backing": "-f qcow2 -b ../base.qcow2 -F qcow2 disk",
    "qcow2-backing-raw": "-f qcow2 -b ../base.raw -F raw disk 100M",
    "qcow2-backing-option": "-f qcow2 -o backing_file=../base.raw,backing_fmt=raw,size=1M disk",
    "qcow2-backing-unseen": "-f qcow2 -u -b ../nowhere -F raw disk 1M",
}


@pytest.mark.parametrize("arguments", CREATIONS.values(), ids=CREATIONS)
def test_create_says_and_makes_what_qemu_img_does(
    arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("theirs")
    expected = qemu_img("create", *arguments.split())
    expected_facts = comparable(qemu_img("info", "--output=json", "disk"))
    expected_size = Path("disk").stat().st_size
    monkeypatch.chdir("../ours")
    assert blockemu("img", "create", *arguments.split()) == expected
    assert comparable(qemu_img("info", "--output=json", "disk")) == expected_facts
    assert comparable(blockemu("img", "info", "--output", "json", "disk")) == expected_facts
    if expected_facts["format"] == "raw":
        assert Path("disk").stat().st_size == expected_size
    elif "nowhere" not in arguments:
        qemu_img("check", "-q", "disk")
        qemu_img("compare", "-q", "disk", "../theirs/disk")


@pytest.mark.parametrize("arguments", CREATIONS.values(), ids=CREATIONS)
def test_info_shows_their_image_as_they_do(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("theirs")
    qemu_img("create", *arguments.split())
    assert comparable(blockemu("img", "info", "--output", "json", "disk")) == comparable(
        qemu_img("info", "--output=json", "disk")
    )
    shown = blockemu("img", "info", "disk")
    if human_is_comparable():
        assert shown == qemu_img("info", "disk")


def test_info_from_another_folder_shows_the_actual_path_of_the_backing_file() -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", "theirs/disk")
    shown = blockemu("img", "info", "theirs/disk")
    assert "backing file: ../base.raw (actual path: theirs/../base.raw)" in shown
    if human_is_comparable():
        assert shown == qemu_img("info", "theirs/disk")


def test_raw_image_of_ragged_length_is_told_to_the_byte() -> None:
    Path("ragged").write_bytes(bytes(1000))
    assert json.loads(blockemu("img", "info", "--output=json", "ragged"))["virtual-size"] == 1000


def test_create_overwrites_what_was_there() -> None:
    Path("disk").write_bytes(b"old" * 1_000_000)
    blockemu("img", "create", "-q", "-f", "qcow2", "disk", "1M")
    qemu_img("check", "-q", "disk")
    qemu_img("create", "-q", "-f", "raw", "zeroes", "1M")
    qemu_img("compare", "-q", "disk", "zeroes")


def test_quiet_create_says_nothing() -> None:
    assert blockemu("img", "create", "-q", "disk", "1M") == ""


@pytest.mark.parametrize("question", ["help", "?", "cluster_size=4k,help"])
def test_options_are_listed_as_theirs(question: str) -> None:
    ours = {line.split("=")[0] for line in blockemu_options(question)}
    theirs = {
        line.split("=")[0] for line in qemu_img("create", "-f", "qcow2", "-o", "help").split("\n")
    }
    assert "  cluster_size" in ours
    assert ours <= theirs


def blockemu_options(question: str) -> list[str]:
    return blockemu("img", "create", "-f", "qcow2", "-o", question).splitlines()


def test_image_in_use_by_qemu_is_refused_and_kept(tmp_path: Path) -> None:
    import subprocess

    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "base.qcow2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        while b"4 MiB" not in user.stdout.readline():
            pass
        before = Path("base.qcow2").read_bytes()
        for arguments in (["create", "-f", "qcow2", "base.qcow2", "1M"], ["info", "base.qcow2"]):
            result = CliRunner().invoke(cli, ["img", *arguments])
            assert "base.qcow2: is in use by another process" in str(result.exception)
        assert Path("base.qcow2").read_bytes() == before
        shown = blockemu("img", "info", "-U", "base.qcow2")
        assert "virtual size: 4 MiB" in shown
        user.communicate(b"quit\n")
