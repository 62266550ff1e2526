# SPDX-License-Identifier: Apache-2.0
"""`img rebase` beside qemu-img: the same guest content, images it approves of, clear refusals."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.unit.img.chains import (
    DISK_BYTES,
    KIB,
    MIB,
    assert_clean,
    blockemu,
    content,
    info,
    make_chain,
    refusal,
    scribble,
    twice,
)

NAMES = "base.raw middle.qcow2 top.qcow2"

IMAGES: dict[str, dict[str, Any]] = {
    "512": {"cluster_size": 512},
    "4k": {"cluster_size": 4096},
    "64k": {},
    "2M": {"cluster_size": "2M"},
    "subclusters": {"extended_l2": "on"},
    "v2": {"compat": "0.10"},
    "v2-512": {"compat": "0.10", "cluster_size": 512},
}
SIZES = {
    "equal": [DISK_BYTES] * 3,
    "short-base": [MIB, 2 * MIB, DISK_BYTES],
    "long-base": [2 * DISK_BYTES, DISK_BYTES + MIB, DISK_BYTES],
}
TARGETS = ("other.qcow2", "base.raw", "other.raw", "")


pytestmark = pytest.mark.usefixtures("made_here")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES)
def test_rebased_image_shows_the_same_as_before(
    options: dict[str, Any], sizes: list[int], seed: int, tmp_path: Path
) -> None:
    rng = random.Random(f"{seed} {options} {sizes}")
    make_chain(tmp_path / "made", rng, sizes=sizes, options=options, names=NAMES)
    for name, size in (("other.qcow2", sizes[1]), ("other.raw", MIB)):
        QemuImg.create(tmp_path / "made" / name, size, fmt=name[6:])
        scribble(tmp_path / "made" / name, rng, length=size, fmt=name[6:])
    before = content(tmp_path / "made" / "top.qcow2")
    ours, theirs = twice(tmp_path)
    for target in TARGETS:  # one after the other: each begins from the last one's result
        fmt = ["-F", target.rpartition(".")[2]] if target else []
        command = ["rebase", "-f", "qcow2", "-b", target, *fmt]
        blockemu("img", *command, "ours/top.qcow2")
        run_tool(["qemu-img", *command, "theirs/top.qcow2"])
        assert content(ours / "top.qcow2") == before, target
        assert_clean(ours / "top.qcow2")
        assert info(ours / "top.qcow2") == info(theirs / "top.qcow2")


def test_what_both_chains_share_is_not_copied(seed: int, tmp_path: Path) -> None:
    names = "base.raw middle.qcow2 top.qcow2"
    chain = make_chain(tmp_path, random.Random(seed), sizes=[64 * MIB] * 3, options={}, names=names)
    QemuIo(chain[0]).run("write -P 7 0 64M")
    QemuImg.create(tmp_path / "empty.qcow2", 64 * MIB)
    run_tool(["qemu-img", "rebase", "-q", "-u", "-b", "base.raw", "-F", "raw", chain[1]])
    blockemu("img", "rebase", "-f", "qcow2", "-b", "base.raw", "-F", "raw", str(chain[2]))
    assert chain[2].stat().st_size < 8 * MIB
    assert_clean(chain[2])


def test_image_without_a_backing_file_goes_on_reading_zeroes_on_top_of_one(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"\x55" * MIB)
    for compat in ("0.10", "1.1"):
        path = QemuImg.create(tmp_path / f"top-{compat}", MIB, options={"compat": compat})
        blockemu("img", "rebase", "-b", "base.raw", "-F", "raw", str(path))
        assert content(path) == bytes(MIB)
        assert info(path)["backing-filename"] == "base.raw"
        assert_clean(path)


def test_zeroes_in_front_of_data_take_no_space(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\x55" * MIB)
    path = QemuImg.create(tmp_path / "top.qcow2", MIB)
    blockemu("img", "rebase", "-b", "base.raw", "-F", "raw", str(path))
    assert all(not extent["data"] for extent in QemuImg.map(path, fmt="qcow2"))


def test_unsafe_rebase_changes_names_only_as_theirs(tmp_path: Path) -> None:
    QemuImg.create(tmp_path / "made" / "base.qcow2", MIB)
    QemuImg.create(
        tmp_path / "made" / "top.qcow2", None, backing=Path("base.qcow2"), backing_fmt="qcow2"
    )
    ours, theirs = twice(tmp_path)
    for words in (["-b", "nowhere", "-F", "raw"], ["-b", ""], ["-b", "b/c", "-F", "qcow2"], []):
        blockemu("img", "rebase", "-u", *words, "ours/top.qcow2")
        run_tool(["qemu-img", "rebase", "-u", *words, "theirs/top.qcow2"])
        assert info(ours / "top.qcow2") == info(theirs / "top.qcow2")
        assert_clean(ours / "top.qcow2") if not words or not words[1] else None


def test_relative_name_is_relative_to_the_image(tmp_path: Path) -> None:
    (tmp_path / "made" / "base.raw").write_bytes(b"\x55" * 64 * KIB)
    path = QemuImg.create(tmp_path / "made" / "top.qcow2", 64 * KIB)
    blockemu("img", "rebase", "-b", "base.raw", "-F", "raw", "made/top.qcow2")
    assert content(path) == bytes(64 * KIB)


def test_backing_file_in_use_is_read_only_when_that_is_allowed(tmp_path: Path) -> None:
    for name in ("old.raw", "new.raw"):
        QemuImg.create(tmp_path / name, MIB, fmt="raw")
    QemuImg.create(tmp_path / "top.qcow2", None, backing=Path("old.raw"), backing_fmt="raw")
    command = ["rebase", "-f", "qcow2", "-b", "new.raw", "-F", "raw", "top.qcow2"]
    for name in ("old.raw", "new.raw"):
        with subprocess.Popen(
            ["qemu-io", "-f", "raw", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as user:
            assert user.stdin is not None
            assert user.stdout is not None
            user.stdin.write(b"length\n")
            user.stdin.flush()
            while b"1 MiB" not in user.stdout.readline():
                pass
            assert f"{name}: is the backing file of top.qcow2: is in use" in refusal(
                "img", *command
            )
            blockemu("img", *command, "-U")
            user.communicate(b"quit\n")
        blockemu("img", "rebase", "-u", "-b", "old.raw", "-F", "raw", "top.qcow2")


REFUSALS = {
    "-b missing -F raw a": "made/missing: is the backing file of made/a: No such file",
    "-b a -F qcow2 a": "made/a: an image can't be its own backing file",
    "-u -b ../made/a -F qcow2 a": "made/a: an image can't be its own backing file",
    "-b b -F qcow2 a": "is the backing file of made/a: its backing file 'a' leads back to itself",
    "-b raw a": "made/a: the format of backing file 'raw' must be given (-F)",
    "a": "made/a: say which backing file it is to have (-b), or use -u",
    "-u -F raw a": "made/a: a backing format without a backing file",
    "-f raw -b a -F qcow2 raw": "made/raw: format raw has no backing files",
    "-b raw -F nope a": "there is no image format 'nope'",
    "-b raw -F qcow2 a": "made/raw: is the backing file of made/a: not a qcow2 image",
    "-b raw -F raw b": "names another file, 'a', and its format was only guessed",
    "-b raw -F raw nowhere": "made/nowhere: No such file",
}


@pytest.mark.parametrize(("words", "line"), REFUSALS.items(), ids=REFUSALS)
def test_refusal_is_one_clear_line_and_changes_nothing(
    words: str, line: str, tmp_path: Path
) -> None:
    QemuImg.create(tmp_path / "made" / "a", MIB)
    QemuImg.create(tmp_path / "made" / "b", None, backing=Path("a"), backing_fmt="qcow2")
    (tmp_path / "made" / "raw").write_bytes(b"\x55" * MIB)
    before = (tmp_path / "made" / "a").read_bytes()
    *options, name = words.split()
    assert line in refusal("img", "rebase", *options, f"made/{name}")
    assert (tmp_path / "made" / "a").read_bytes() == before
