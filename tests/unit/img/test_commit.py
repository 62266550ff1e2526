# SPDX-License-Identifier: Apache-2.0
"""`img commit` beside qemu-img: the same content in base and top, images it approves of."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.unit.img.chains import (
    DISK_BYTES,
    MIB,
    assert_clean,
    blockemu,
    content,
    info,
    make_chain,
    refusal,
    twice,
)

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
    "short-middle": [DISK_BYTES, MIB + 512, DISK_BYTES],
    "long-base": [2 * DISK_BYTES, DISK_BYTES + MIB, DISK_BYTES],
}
NAMES = "base.raw middle.qcow2 top.qcow2"


pytestmark = pytest.mark.usefixtures("made_here")


CASES = [
    ("", image, sizes)
    for image in IMAGES
    for sizes in SIZES
    if not (image.startswith("v2") and sizes == "short-middle")  # refused, see below
]
CASES += [(words, "4k", sizes) for words in ("-d", "-b base.raw") for sizes in SIZES]


@pytest.mark.parametrize(("given", "image", "sizes"), CASES)
def test_commit_makes_what_qemu_img_does(
    given: str, image: str, sizes: str, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(f"{seed} {image} {sizes}")
    words = given.split()
    made = tmp_path / "made"
    make_chain(made, rng, sizes=SIZES[sizes], options=IMAGES[image], names=NAMES)
    before = content(tmp_path / "made" / "top.qcow2")
    ours, theirs = twice(tmp_path)
    command = ["commit", "-f", "qcow2", *words]
    said = blockemu("img", *command, "ours/top.qcow2")
    assert said == run_tool(["qemu-img", *command, "theirs/top.qcow2"]).stdout
    assert content(ours / "top.qcow2") == before
    for name in NAMES.split():
        fmt = name.rpartition(".")[2]
        assert content(ours / name, fmt) == content(theirs / name, fmt), name
        assert info(ours / name) == info(theirs / name)
        if fmt == "qcow2":
            assert_clean(ours / name)
    base = "base.raw" if "-b" in words else "middle.qcow2"
    assert content(ours / base, base.rpartition(".")[2])[: len(before)] == before


def test_version_2_base_that_would_show_more_of_its_own_base_is_refused(tmp_path: Path) -> None:
    """It can't say zero, so it can't grow there. qemu-img refuses it, too."""
    made, v2 = tmp_path / "made", IMAGES["v2"]
    make_chain(made, random.Random(0), sizes=SIZES["short-middle"], options=v2, names=NAMES)
    before = content(made / "top.qcow2")
    line = refusal("img", "commit", "-f", "qcow2", "made/top.qcow2")
    assert f"made/middle.qcow2: can't grow to {DISK_BYTES} bytes" in line
    assert run_tool(["qemu-img", "commit", made / "top.qcow2"], check=False).code == 1
    assert content(made / "top.qcow2") == before


def test_emptied_image_holds_nothing(tmp_path: Path) -> None:
    QemuImg.create(tmp_path / "base.raw", MIB, fmt="raw")
    top = QemuImg.create(tmp_path / "top.qcow2", None, backing=Path("base.raw"), backing_fmt="raw")
    QemuIo(top, fmt="qcow2").run("write -P 7 0 256k", "write -z 512k 128k")
    blockemu("img", "commit", "-q", "-f", "qcow2", "top.qcow2")
    command = ["qemu-img", "map", "--output=json", "-f", "qcow2", top]
    assert '"depth": 0' not in run_tool(command).stdout
    assert top.stat().st_blocks * 512 < 512 * 1024
    assert content(tmp_path / "base.raw", "raw")[: 256 * 1024] == b"\x07" * (256 * 1024)


def test_long_chain_is_committed_down_to_its_base(tmp_path: Path) -> None:
    QemuImg.create(tmp_path / "0", MIB, fmt="raw")
    for number in range(1, 150):
        fmt = "qcow2" if number > 1 else "raw"
        names = ["-u", "-b", str(number - 1), "-F", fmt]
        blockemu("img", "create", "-q", "-f", "qcow2", *names, str(number), "1M")
    QemuIo(tmp_path / "3", fmt="qcow2").run("write -P 7 0 64k")
    blockemu("img", "commit", "-q", "-f", "qcow2", "-b", "0", "149")
    assert content(tmp_path / "0", "raw") == (b"\x07" * 64 * 1024).ljust(MIB, b"\0")


def test_quiet_commit_says_nothing(tmp_path: Path) -> None:
    QemuImg.create(tmp_path / "base.raw", MIB, fmt="raw")
    QemuImg.create(tmp_path / "top.qcow2", None, backing=Path("base.raw"), backing_fmt="raw")
    assert blockemu("img", "commit", "-q", "-p", "-f", "qcow2", "top.qcow2") == ""


REFUSALS = {
    "-f qcow2 a": "made/a: has no backing file to commit into",
    "raw": "made/raw: has no backing file to commit into",
    "b": "names another file, 'a', and its format was only guessed",
    "-f qcow2 -b other b": "made/b: there is no 'other' in its backing chain",
    "-f qcow2 c": "made/gone: is the backing file of made/c: No such file",
    "-f qcow2 loop": "made/loop: its backing file 'loop' leads back to itself",
    "-f qcow2 nowhere": "made/nowhere: No such file",
}


@pytest.mark.parametrize(("words", "line"), REFUSALS.items(), ids=REFUSALS)
def test_refusal_is_one_clear_line(words: str, line: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    QemuImg.create(made / "a", MIB)
    QemuImg.create(made / "b", None, backing=Path("a"), backing_fmt="qcow2")
    for name, backing in (("c", "gone"), ("loop", "loop")):
        QemuImg.create(made / name, MIB)
        run_tool(["qemu-img", "rebase", "-u", "-b", backing, "-F", "qcow2", made / name])
    (made / "raw").write_bytes(b"\x55" * MIB)
    *options, name = words.split()
    assert line in refusal("img", "commit", *options, f"made/{name}")
