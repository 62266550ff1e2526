# SPDX-License-Identifier: Apache-2.0
"""kill -9 in the middle of `blockemu img`: the image opens, is sound, and shows what it should.

Each verb runs once to its end, on a copy, to see how long it takes; then again and again, killed at
a random moment. QEMU judges: no corruption (leaks are allowed), and the contents. A round is one
kill of each verb; `make crash` goes on for as many as you like. Cuts at every write are in the unit
tests; here it is the kernel that has the last word on what is in the file.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.peers.requirement import require_peer
from tests.unit.drivers.qcow2.structures import Structures

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
MIB = 1 << 20
SIZE = 4 * MIB
LARGER = 9 * MIB
SMALLER = 2 * MIB
CLUSTER = 512
OLD, NEW = b"\x11", b"\x22"
TOP, BASE, OTHER = "top.qcow2", "base.qcow2", "other.qcow2"
RUN_TIMEOUT_S = 30.0


class Verb(NamedTuple):
    """What is killed. `possible`: what the disk may show afterwards."""

    arguments: list[str]
    prepare: Callable[[Path], None]
    possible: list[bytes]
    can_be_corrupt: bool = False
    """It was before, and is mended by another run."""
    sure_bytes: int = LARGER
    """Behind these, what is to be cut off may be gone already, cluster by cluster."""


def make(folder: Path, *, compat: str = "1.1") -> None:
    """OLD everywhere in a snapshot; since then NEW in the first quarter."""
    image = QemuImg.create(folder / TOP, SIZE, options={"cluster_size": CLUSTER, "compat": compat})
    QemuIo(image, fmt="qcow2").run(f"write -P {OLD[0]} 0 {SIZE}")
    run_tool(["qemu-img", "snapshot", "-c", "then", image])
    QemuIo(image, fmt="qcow2").run(f"write -P {NEW[0]} 0 {MIB}")


def make_plain(folder: Path, *, compat: str = "1.1") -> None:
    """As `make`, without a snapshot."""
    make(folder, compat=compat)
    run_tool(["qemu-img", "snapshot", "-d", "then", folder / TOP])


def make_chain(folder: Path) -> None:
    """OLD in the base; NEW in the first quarter, on top. And another base with half of it."""
    for name, length in ((BASE, SIZE), (OTHER, SIZE // 2)):
        QemuImg.create(folder / name, SIZE, options={"cluster_size": CLUSTER})
        QemuIo(folder / name, fmt="qcow2").run(f"write -P {OLD[0]} 0 {length}")
    QemuImg.create(
        folder / TOP, None, options={"cluster_size": CLUSTER}, backing=folder / BASE,
        backing_fmt="qcow2",
    )  # fmt: skip
    QemuIo(folder / TOP, fmt="qcow2").run(f"write -P {NEW[0]} 0 {MIB}")


def make_leaks(folder: Path) -> None:
    """What was the snapshot's isn't free."""
    make_plain(folder)
    change_counts(folder / TOP, lambda count: max(count, 1))


def make_corruptions(folder: Path) -> None:
    """Every fourth cluster counts none."""
    make_plain(folder)
    change_counts(folder / TOP, lambda count: 0)


def change_counts(path: Path, change: Callable[[int], int]) -> None:
    image = Structures(bytearray(path.read_bytes()))
    for cluster in range(100, len(image.content) // image.cluster, 4):
        if image.get(image.reftable_place(cluster // 256)):
            image.set_refcount(cluster, change(image.refcount(cluster)))
    path.write_bytes(image.content)


PRESENT = NEW * MIB + OLD * (SIZE - MIB)
THEN = OLD * SIZE
VERBS = {
    "snapshot-create": Verb(["snapshot", "-c", "now", TOP], make, [PRESENT]),
    "snapshot-delete": Verb(["snapshot", "-d", "then", TOP], make, [PRESENT]),
    "snapshot-apply": Verb(["snapshot", "-a", "then", TOP], make, [PRESENT, THEN]),
    "resize-grow": Verb(
        ["resize", "-q", TOP, str(LARGER)], make, [PRESENT, PRESENT + bytes(LARGER - SIZE)]
    ),
    "resize-shrink": Verb(
        ["resize", "-q", "--shrink", TOP, str(SMALLER)], make_plain,
        [PRESENT, PRESENT[:SMALLER]], sure_bytes=SMALLER,
    ),
    "amend-up": Verb(
        ["amend", "-o", "compat=1.1", TOP],
        lambda folder: make_plain(folder, compat="0.10"), [PRESENT],
    ),
    "amend-down": Verb(["amend", "-o", "compat=0.10", TOP], make_plain, [PRESENT]),
    "commit": Verb(["commit", "-q", "-f", "qcow2", TOP], make_chain, [PRESENT]),
    "rebase": Verb(
        ["rebase", "-f", "qcow2", "-b", OTHER, "-F", "qcow2", TOP], make_chain, [PRESENT]
    ),
    "check-leaks": Verb(["check", "-q", "-r", "leaks", TOP], make_leaks, [PRESENT]),
    "check-all": Verb(
        ["check", "-q", "-r", "all", TOP], make_corruptions, [PRESENT], can_be_corrupt=True
    ),
}  # fmt: skip


def start(verb: Verb, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "blockemu", "img", *verb.arguments]
    return subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def run(verb: Verb, folder: Path) -> float:
    """Run it to its end; how many seconds that took."""
    begun = time.monotonic()
    process = start(verb, folder)
    _, said = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, said.decode()
    return time.monotonic() - begun


def run_and_kill(verb: Verb, folder: Path, *, after_s: float) -> bool:
    """Whether it was still running then."""
    process = start(verb, folder)
    try:
        process.communicate(timeout=after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    return False


def judge(verb: Verb, folder: Path) -> None:
    if verb.can_be_corrupt:
        run(verb, folder)
    for name in (TOP, BASE):
        if (folder / name).exists():
            found = QemuImg.check(folder / name)
            assert (found.corruptions, found.errors) == (0, 0), found.text
    raw = folder / "shown.raw"
    QemuImg.convert(folder / TOP, raw, source_fmt="qcow2", target_fmt="raw")
    content = raw.read_bytes()
    fits = any(shows(content, wanted, verb.sure_bytes) for wanted in verb.possible)
    assert fits, f"{len(content)} other bytes"


def shows(content: bytes, wanted: bytes, sure_bytes: int) -> bool:
    """The same, or zeroes in whole clusters from `sure_bytes` on."""
    if len(content) != len(wanted) or content[:sure_bytes] != wanted[:sure_bytes]:
        return False
    return all(
        content[start : start + CLUSTER] in (wanted[start : start + CLUSTER], bytes(CLUSTER))
        for start in range(sure_bytes, len(wanted), CLUSTER)
    )


@pytest.mark.parametrize("name", VERBS)
def test_killed_verb_leaves_a_sound_image(tmp_path: Path, random_seed: int, name: str) -> None:
    require_peer("qemu-img")
    verb = VERBS[name]
    rng = random.Random(f"{random_seed}-{name}")
    first, work = tmp_path / "first", tmp_path / "work"
    first.mkdir()
    verb.prepare(first)
    shutil.copytree(first, work)
    if name in ("commit", "rebase"):  # by a name that is the same in every copy
        run_tool(["qemu-img", "rebase", "-u", "-b", BASE, "-F", "qcow2", first / TOP])
        shutil.rmtree(work)
        shutil.copytree(first, work)
    takes_s = run(verb, work)
    judge(verb, work)
    kills = 0
    for _ in range(ROUNDS):
        shutil.rmtree(work)
        shutil.copytree(first, work)
        kills += run_and_kill(verb, work, after_s=takes_s * rng.uniform(0.6, 1.0))
        judge(verb, work)
    print(f"{kills} kills in {ROUNDS} rounds, of what takes {takes_s:.2f} s")
