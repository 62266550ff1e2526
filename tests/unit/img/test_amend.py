# SPDX-License-Identifier: Apache-2.0
"""`img amend` beside qemu-img: equal content, equal info, images it approves of."""

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
    scribble,
    twice,
)

CLUSTERS = (512, 1024, 4096, 65536, 2 * MIB)


pytestmark = pytest.mark.usefixtures("made_here")


@pytest.mark.parametrize("backing", ["none", "equal", "short", "long"])
@pytest.mark.parametrize("cluster_size", CLUSTERS)
def test_amended_image_is_what_qemu_img_makes(
    cluster_size: int, backing: str, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(f"{seed} {cluster_size} {backing}")
    made = tmp_path / "made"
    options: dict[str, Any] = {"cluster_size": cluster_size}
    if backing == "none":
        scribble(
            QemuImg.create(made / "top.qcow2", DISK_BYTES, options=options), rng, length=DISK_BYTES
        )
    else:
        below = {"equal": DISK_BYTES, "short": MIB, "long": 2 * DISK_BYTES}[backing]
        sizes = [below, below, DISK_BYTES]
        names = "base.raw middle.qcow2 top.qcow2"
        make_chain(made, rng, sizes=sizes, options=options, names=names)
    before = content(made / "top.qcow2")
    ours, theirs = twice(tmp_path)
    for change in ("lazy_refcounts=on", "compat=0.10", "compat=1.1", "lazy_refcounts=on,size=8M"):
        command = ["amend", "-f", "qcow2", "-o", change]
        assert blockemu("img", *command, "ours/top.qcow2") == ""
        run_tool(["qemu-img", *command, "theirs/top.qcow2"])
        after = content(ours / "top.qcow2")
        assert after[: len(before)] == before, change
        assert not any(after[len(before) :])
        assert_clean(ours / "top.qcow2")
        assert info(ours / "top.qcow2") == info(theirs / "top.qcow2")


def test_names_of_the_backing_file_are_amended(tmp_path: Path) -> None:
    QemuImg.create(tmp_path / "a.raw", MIB, fmt="raw")
    top = QemuImg.create(tmp_path / "top.qcow2", None, backing=Path("a.raw"), backing_fmt="raw")
    blockemu(
        "img", "amend", "-f", "qcow2", "-o", "backing_file=b.qcow2,backing_fmt=qcow2", "top.qcow2"
    )
    facts = info(top)
    assert facts["backing-filename"] == "b.qcow2"
    assert facts["backing-filename-format"] == "qcow2"


def test_zeroes_over_a_backing_file_that_goes_away_stay_zeroes(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"\x55" * MIB)
    top = QemuImg.create(tmp_path / "top.qcow2", None, backing=Path("a.raw"), backing_fmt="raw")
    QemuIo(top, fmt="qcow2").run("write -z 0 1M")
    blockemu("img", "amend", "-f", "qcow2", "-o", "compat=0.10,backing_file=", "top.qcow2")
    assert "backing-filename" not in info(top)
    assert content(top) == bytes(MIB)
    assert_clean(top)


def test_help_lists_what_can_be_amended() -> None:
    said = blockemu("img", "amend", "-o", "help")
    assert "compat=" in said
    assert "cluster_size" not in said


REFUSALS = {
    "refcount_bits=8 -o compat=0.10": "no refcounts of 8 bits, only of 16",
    "compression_type=zstd -o compat=0.10": "compat=0.10), which has no compression type",
    "compat=1.1 -o compat=0.10,lazy_refcounts=on": "lazy_refcounts=on takes version 3",
    "compat=0.10 -o lazy_refcounts=on": "lazy_refcounts=on takes version 3",
    "compat=1.1 -o cluster_size=4k": "option 'cluster_size' is for new images only",
    "extended_l2=on -o extended_l2=off": "option 'extended_l2' is for new images only",
    "extended_l2=on -o compat=0.10": "compat=0.10), which has no extended L2 entries",
    "compat=1.1 -o refcount_bits=3": "refcount_bits is a power of two up to 64, not 3",
    "compat=1.1 -o refcount_bits=128": "refcount_bits is a power of two up to 64, not 128",
    "compat=0.10 -o refcount_bits=8": "refcounts of 8 bits take version 3 (compat=1.1)",
    "refcount_bits=8 -o compat=0.10,refcount_bits=8": "refcounts of 8 bits take version 3",
    "refcount_bits=8 -o compat=0.10,refcount_bits=16,size=1k": "can't be made smaller by amend",
    "compat=1.1 -o nope=1": "format qcow2 has no option 'nope'",
    "compat=1.1 -o compat=2": "'compat'",
    "compat=1.1 -o size=1k": "has 1048576 bytes and can't be made smaller by amend",
    "compat=1.1 -o backing_file=x": "the backing file's format must be given (backing_fmt=)",
    "compat=1.1 -o backing_fmt=raw": "a backing format without a backing file",
}


@pytest.mark.parametrize(("words", "reason"), REFUSALS.items(), ids=REFUSALS)
def test_refusal_is_one_clear_line_and_changes_nothing(
    words: str, reason: str, tmp_path: Path
) -> None:
    created, *options = words.split()
    key, _, value = created.partition("=")
    path = QemuImg.create(tmp_path / "disk", MIB, options={key: value})
    before = path.read_bytes()
    line = refusal("img", "amend", *options, "disk")
    assert line.startswith("disk: ")
    assert reason in line
    assert path.read_bytes() == before


def test_snapshots_are_refused_on_the_way_to_version_2(tmp_path: Path) -> None:
    path = QemuImg.create(tmp_path / "disk", MIB)
    run_tool(["qemu-img", "snapshot", "-c", "s", path])
    line = refusal("img", "amend", "-o", "compat=0.10", "disk")
    assert "while it has internal snapshots" in line


def test_raw_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    line = refusal("img", "amend", "-o", "size=2M", "disk")
    assert line == "disk: format raw has nothing that can be amended"


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_refcounts_of_every_width_are_what_qemu_img_takes(
    cluster_size: int, seed: int, tmp_path: Path
) -> None:
    """qemu-img itself takes seconds to change the width: it has one turn."""
    made = tmp_path / "made"
    path = QemuImg.create(made / "top.qcow2", DISK_BYTES, options={"cluster_size": cluster_size})
    rng = random.Random(seed)
    writes = [f"write -P {rng.randrange(1, 256)} {rng.randrange(46) * 64}k 70k" for _ in range(9)]
    run_tool(
        ["qemu-io", "-f", "qcow2", *(word for write in writes for word in ("-c", write)), path]
    )
    before = content(path)
    ours, theirs = twice(tmp_path)
    for bits in (1, 2, 4, 8, 32, 64):
        change = f"refcount_bits={bits}"
        assert blockemu("img", "amend", "-f", "qcow2", "-o", change, "ours/top.qcow2") == ""
        assert_clean(ours / "top.qcow2")
        assert info(ours / "top.qcow2")["format-specific"]["data"]["refcount-bits"] == bits
    assert content(ours / "top.qcow2") == before
    run_tool(["qemu-img", "amend", "-f", "qcow2", "-o", change, "theirs/top.qcow2"])
    assert info(ours / "top.qcow2") == info(theirs / "top.qcow2")
    for change in ("compat=0.10,refcount_bits=16", "compat=1.1,refcount_bits=1"):
        blockemu("img", "amend", "-f", "qcow2", "-o", change, "ours/top.qcow2")
        assert_clean(ours / "top.qcow2")
    assert content(ours / "top.qcow2") == before


def test_refcounts_too_narrow_for_a_snapshot_are_refused(tmp_path: Path) -> None:
    path = QemuImg.create(tmp_path / "disk", MIB)
    run_tool(["qemu-io", "-f", "qcow2", "-c", "write 0 128k", path])
    run_tool(["qemu-img", "snapshot", "-c", "s", path])
    before = path.read_bytes()
    command = ["amend", "-f", "qcow2", "-o", "refcount_bits=1", "disk"]
    assert run_tool(["qemu-img", *command], check=False).code == 1
    line = refusal("img", *command)
    assert "refcounts of 1 bits can't count the 2 references to the cluster at offset" in line
    assert path.read_bytes() == before
    blockemu("img", "amend", "-f", "qcow2", "-o", "refcount_bits=2", "disk")
    assert_clean(path)


def test_refcounts_of_a_damaged_image_are_left_alone(tmp_path: Path) -> None:
    path = QemuImg.create(tmp_path / "disk", MIB)
    run_tool(["qemu-io", "-f", "qcow2", "-c", "write 0 128k", path])
    with path.open("r+b") as image:
        image.seek(2 * 65536)  # the first refcount block: the header's own count
        image.write(bytes(2))
    before = path.read_bytes()
    line = refusal("img", "amend", "-f", "qcow2", "-o", "refcount_bits=8", "disk")
    assert "is damaged: repair it first" in line
    assert path.read_bytes() == before
