# SPDX-License-Identifier: Apache-2.0
"""`img check` beside qemu-img's: the same counts and exit status for images of QEMU's making, sound
ones and ones that were damaged by a seed, and an image after our repair that qemu-img finds clean.

Where we differ, `expected_difference` says so and why.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from blockemu.cli import main
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.repair import Repair
from blockemu.img.check import facts, format_human, read_check
from tests.peers.qemu import QemuImg, run_tool
from tests.peers.requirement import require_peer
from tests.unit.drivers.qcow2.structures import COMPRESSED, COPIED, OFFSET, Structures

MUTATIONS = 12
"""Damaged copies of each image."""

COUNTS = ("corruptions", "leaks", "check-errors")


@pytest.fixture(autouse=True)
def _peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_peer("qemu-img")
    require_peer("qemu-io")
    monkeypatch.chdir(tmp_path)


class Shape(NamedTuple):
    """How QEMU makes an image: `create` options, then steps."""

    options: str
    size: str = "4M"
    steps: tuple[str, ...] = ("write 0 300k", "write 1M 200k", "write 3M 64k")
    """`snapshot`, `bitmap` and the like are qemu-img's, the rest are commands of qemu-io."""


SNAPSHOTS = (
    "write 0 300k", "snapshot -c one", "write 100k 300k", "write 2M 100k",
    "snapshot -c two", "discard 0 64k", "write 64k 64k", "snapshot -d one",
    "snapshot -c three", "write 1M 70k",
)  # fmt: skip
ZEROES = (
    "write 0 600k", "write -z 64k 128k", "write -z -u 256k 128k", "write -z 2M 512k",
    "discard 512k 64k",
)  # fmt: skip
BITMAPS = (
    "write 0 300k", "bitmap --add disk one", "bitmap --add -g 512 disk two",
    "bitmap --add -g 64k disk three", "write 1M 500k", "bitmap --disable disk one",
)  # fmt: skip

SHAPES = {
    "plain": Shape(""),
    "clusters-512": Shape("cluster_size=512", "1M", ("write 0 300k", "write 700k 20k")),
    "clusters-4k": Shape("cluster_size=4k"),
    "clusters-2M": Shape("cluster_size=2M", "20M", ("write 0 5M", "write 11M 2M")),
    "refcount-1": Shape("refcount_bits=1,cluster_size=4k"),
    "refcount-2": Shape("refcount_bits=2,cluster_size=4k", steps=SNAPSHOTS),
    "refcount-4": Shape("refcount_bits=4,cluster_size=4k", steps=SNAPSHOTS),
    "refcount-8": Shape("refcount_bits=8,cluster_size=512", steps=SNAPSHOTS),
    "refcount-32": Shape("refcount_bits=32,cluster_size=4k", steps=SNAPSHOTS),
    "refcount-64": Shape("refcount_bits=64,cluster_size=512", steps=SNAPSHOTS),
    "snapshots": Shape("", steps=SNAPSHOTS),
    "snapshots-v2": Shape("compat=0.10,cluster_size=4k", steps=SNAPSHOTS),
    "v2": Shape("compat=0.10"),
    "zeroes": Shape("", steps=ZEROES),
    "zeroes-preallocated": Shape("preallocation=metadata,cluster_size=4k", steps=ZEROES),
    "bitmaps": Shape("", steps=BITMAPS),
    "bitmaps-4k": Shape("cluster_size=4k", steps=BITMAPS),
    "compressed": Shape("", steps=("convert",)),
    "compressed-4k": Shape("cluster_size=4k", steps=("convert", "write 1M 64k")),
    "compressed-512": Shape("cluster_size=512", "1M", ("convert",)),
    "compressed-zstd": Shape("compression_type=zstd", steps=("convert", "snapshot -c one")),
    "subclusters": Shape("extended_l2=on", steps=(*ZEROES, "write 700k 3k", "write -z 900k 10k")),
    "subclusters-16k": Shape("extended_l2=on,cluster_size=16k", steps=SNAPSHOTS),
    "subclusters-preallocated": Shape("extended_l2=on,preallocation=metadata", steps=ZEROES),
    "subclusters-compressed": Shape("extended_l2=on", steps=("convert", "write 1M 9k")),
    "backing": Shape("backing"),
    "empty": Shape("", "0", ()),
    "dirty": Shape("lazy_refcounts=on,cluster_size=4k", steps=("killed write 0 200k",)),
}


def make(shape: Shape, path: Path) -> None:
    options = [*(["-o", shape.options] if shape.options not in ("", "backing") else [])]
    if shape.options == "backing":
        run_tool(["qemu-img", "create", "-q", "-f", "raw", "base.raw", shape.size])
        options = ["-b", "base.raw", "-F", "raw"]
    run_tool(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, shape.size])
    for step in shape.steps:
        words = [str(path) if word == "disk" else word for word in step.split()]
        if words[0] == "snapshot":
            run_tool(["qemu-img", *words, path])
        elif words[0] == "bitmap":
            run_tool(["qemu-img", *words])
        elif words[0] == "convert":
            convert(options, shape.size, path)
        elif words[0] == "killed":
            command = ["qemu-io", "-f", "qcow2", "-c", " ".join(words[1:]), "-c", "sigraise 9"]
            run_tool([*command, path], check=False)
        else:
            run_tool(["qemu-io", "-f", "qcow2", "-c", step, path])


def convert(options: list[str], size: str, path: Path) -> None:
    """Compressed clusters of different lengths, neighbours in one host cluster."""
    length = {"4M": 4 << 20, "1M": 1 << 20}[size]
    rng = random.Random(7)
    parts = [
        rng.randbytes(rng.randrange(100, 9000)) + bytes(rng.randrange(9000)) for _ in range(300)
    ]
    Path("source.raw").write_bytes(b"".join(parts).ljust(length, b"\x5a")[:length])
    command = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *options]
    run_tool([*command, "source.raw", path])


def theirs(path: Path) -> tuple[int, dict[str, Any] | None, str]:
    """Exit status, JSON where there is any, and what it said."""
    command = ["qemu-img", "check", "--output=json", "-f", "qcow2", path]
    result = run_tool(command, check=False)
    found = json.loads(result.stdout) if result.stdout.strip() else None
    return result.code, found, result.stderr


def ours(path: Path, repair: Repair | None = None) -> tuple[int, dict[str, Any] | None, list[str]]:
    lines: list[str] = []
    try:
        report = read_check(str(path), fmt="qcow2", repair=repair, say=lines.append)
    except ImageError as error:
        return 1, None, [str(error)]
    return report.status, facts(report), lines


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sound_image_has_the_same_facts(shape: Shape) -> None:
    path = Path("disk")
    make(shape, path)
    status, found, lines = ours(path)
    their_status, their_facts, said = theirs(path)
    assert (status, found) == (their_status, their_facts), (lines, said)
    command = ["qemu-img", "check", "-f", "qcow2", path]
    assert format_human(read_check("disk")) + "\n" == run_tool(command, check=False).stdout


# --- damage ---


class Mutation:
    """Random damage to one structure of an image; `what` tells where."""

    def __init__(self, content: bytearray, rng: random.Random) -> None:
        self.image = Structures(content)
        self.rng = rng
        self.what = ""
        kinds = ["l1", "l2", "l2", "l2", "reftable", "refcount", "refcount", "swap"]
        if self.image.entry_bytes > 8:
            kinds += ["bitmap"] * 8
        if self.image.snapshots:
            kinds += ["snapshot", "snapshot-l1"]
        kind = rng.choice(kinds)
        getattr(self, "_" + kind.replace("-", "_"))()
        self.what = f"{kind} {self.what}"

    def l1_entries(self, offset: int, entries: int) -> list[int]:
        """What of a table is in the file."""
        inside = min(entries, max(len(self.image.content) - offset, 0) // 8)
        return [self.image.get(offset + index * 8) for index in range(inside)]

    def _tables(self) -> list[int]:
        image = self.image
        return [
            index for index in range(image.l1_entries) if image.get(image.l1_place(index)) & OFFSET
        ]

    def _l2_place(self) -> int | None:
        """An entry, more often than not one that names something; None where there is none."""
        place = self._any_l2_place()
        return place if place is not None and place + 8 <= len(self.image.content) else None

    def _any_l2_place(self) -> int | None:
        image, tables = self.image, self._tables()
        if not tables:
            return None
        table = self.rng.choice(tables)
        used = [
            index for index in range(image.l2_entries) if image.get(image.l2_place(index, table))
        ]
        if used and self.rng.random() < 0.9:
            return image.l2_place(self.rng.choice(used), table)
        return image.l2_place(self.rng.randrange(image.l2_entries), table)

    def _change(self, place: int) -> None:
        image, rng, bits = self.image, self.rng, self.image.bits
        old = image.get(place)
        clusters = len(image.content) // image.cluster
        new = rng.choice(
            (
                lambda: old ^ 1 << rng.choice((0, 1, 8, 9, bits - 1, 56, 61, 62, 63)),
                lambda: old ^ 1 << rng.randrange(bits, bits + 8),
                lambda: old ^ 1 << rng.randrange(64),
                lambda: 0,
                lambda: COPIED | rng.randrange(clusters) << bits,
                lambda: rng.randrange(clusters + 3) << bits,
                lambda: (
                    COMPRESSED | rng.randrange(4) << (70 - bits) | rng.randrange(clusters << bits)
                ),
            )
        )()
        image.put(place, new)
        self.what = f"{place:#x}: {old:#x} -> {new:#x}"

    def _l1(self) -> None:
        if self.image.l1_entries:
            self._change(self.image.l1_place(self.rng.randrange(self.image.l1_entries)))

    def _l2(self) -> None:
        place = self._l2_place()
        if place is not None:
            self._change(place)

    def _bitmap(self) -> None:
        """Of subclusters."""
        image, rng = self.image, self.rng
        place = self._l2_place()
        if place is None:
            return
        old = image.get(place + 8)
        choices = (0, old ^ 1 << rng.randrange(64), old | 1 << rng.randrange(64), 1 << 64)
        new = (rng.choice((*choices, rng.getrandbits(64), old << 32))) & ((1 << 64) - 1)
        image.put(place + 8, new)
        self.what = f"{place + 8:#x}: {old:#x} -> {new:#x}"

    def _swap(self) -> None:
        one, other = self._l2_place(), self._l2_place()
        if one is not None and other is not None:
            self.image.put(one, self.image.get(other))
            self.what = f"{other:#x} copied to {one:#x}"

    def _reftable(self) -> None:
        self._change(self.image.reftable_place(self.rng.choice((0, 0, 1))))

    def _refcount(self) -> None:
        image = self.image
        cluster = self.rng.randrange(len(image.content) // image.cluster)
        if image.get(image.reftable_place(cluster // (image.cluster * 8 >> image.order))):
            value = self.rng.choice((0, 1, 2, 3, 300)) & ((1 << (1 << image.order)) - 1)
            self.what = f"cluster {cluster}: {image.refcount(cluster)} -> {value}"
            image.set_refcount(cluster, value)

    def _snapshot(self) -> None:
        """The L1 table's place and size in the first entry."""
        image, rng = self.image, self.rng
        place = image.snapshots_offset
        if rng.random() < 0.5:
            self._change(place)
        else:
            (size,) = struct.unpack_from(">I", image.content, place + 8)
            new = rng.choice((0, size + 1, size ^ 1 << rng.randrange(32)))
            struct.pack_into(">I", image.content, place + 8, new)
            self.what = f"l1_size {size} -> {new}"

    def _snapshot_l1(self) -> None:
        self._change(self.image.get(self.image.snapshots_offset) & OFFSET)


def expected_difference(mutation: Mutation) -> str | None:
    """Why counts may differ from qemu-img's here; None where they may not."""
    image = mutation.image
    entries = mutation.l1_entries(image.l1_offset, image.l1_entries)
    if image.snapshots:
        snapshot_l1 = image.get(image.snapshots_offset)
        if snapshot_l1 >= 1 << 63:
            return "a snapshot's L1 table past all offsets is past the end; QEMU gives up there"
        (length,) = struct.unpack_from(">I", image.content, image.snapshots_offset + 8)
        entries += mutation.l1_entries(snapshot_l1, length)
    if any(entry and not entry & OFFSET for entry in entries):
        return (
            "an L1 entry of flags alone is one corruption; QEMU takes the header for its L2 table"
        )
    if image.entry_bytes > 8 and any(map(image.is_compressed_with_bitmap, entries)):
        return (
            "a compressed cluster with bits of subclusters can be read, so its space is in use; "
            "QEMU takes it for a leak, and gives it away in a repair"
        )
    return None


@pytest.mark.parametrize("name", SHAPES)
def test_damage_is_counted_as_they_count_it(name: str, seed: int) -> None:
    path = Path("disk")
    make(SHAPES[name], path)
    content = path.read_bytes()
    for number in range(MUTATIONS):
        rng = random.Random(f"{seed} {name} {number}")
        changed = bytearray(content)
        mutation = Mutation(changed, rng)
        path.write_bytes(changed)
        status, found, lines = ours(path)
        their_status, their_facts, said = theirs(path)
        where = (name, number, mutation.what, lines[:5], said[:500])
        if expected_difference(mutation) is not None:
            assert status, where
            assert their_status, where
            continue
        assert status == their_status, where
        if their_facts is not None:
            assert found is not None, where
            assert {key: found.get(key, 0) for key in COUNTS} == {
                key: their_facts.get(key, 0) for key in COUNTS
            }, where


@pytest.mark.parametrize("name", SHAPES)
def test_repaired_image_is_clean_and_its_content_is_kept(name: str, seed: int) -> None:
    path, damaged = Path("disk"), Path("damaged")
    make(SHAPES[name], path)
    content = path.read_bytes()
    for number in range(MUTATIONS):
        rng = random.Random(f"{seed} {name} {number} repair")
        changed = bytearray(content)
        mutation = Mutation(changed, rng)
        damaged.write_bytes(changed)
        readable = guest_content(damaged)
        shutil.copy(damaged, path)
        status, found, lines = ours(path, Repair.ALL)
        where = (name, number, mutation.what, lines[:5])
        if found is None:
            assert path.read_bytes() == changed, where
            continue
        assert found.get("leaks", 0) == 0, where
        if status == 0:
            their_status, their_facts, said = theirs(path)
            assert (their_status, found["image-end-offset"]) == (
                0,
                (their_facts or {})["image-end-offset"],
            ), (*where, said)
        if readable is not None:
            assert guest_content(path) == readable, where


def guest_content(path: Path) -> bytes | None:
    """What the guest reads; None where it can't read it all."""
    command = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, "content.raw"]
    if run_tool(command, check=False).code:
        return None
    return Path("content.raw").read_bytes()


# --- the command ---


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["img", "check", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def leak(image: Structures) -> None:
    image.set_refcount(len(image.content) // image.cluster - 1, 1)
    image.put(image.l2_place(0), 0)


def corrupt(image: Structures) -> None:
    image.set_refcount(3, 0)


@pytest.mark.parametrize(
    ("damage", "status", "words"),
    [
        (lambda image: None, 0, "No errors were found"),
        (leak, 3, "leaked clusters were found"),
        (corrupt, 2, "errors were found"),
    ],
)
def test_exit_status_and_summary_are_theirs(
    damage: Callable[[Structures], None],
    status: int,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make(SHAPES["plain"], Path("disk"))
    content = bytearray(Path("disk").read_bytes())
    damage(Structures(content))
    Path("disk").write_bytes(content)
    assert run("disk") == status
    printed = capfd.readouterr()
    assert words in printed.out
    assert printed.out == run_tool(["qemu-img", "check", "disk"], check=False).stdout
    assert bool(printed.err) is bool(status)
    assert run("-q", "disk") == status
    assert capfd.readouterr().out == ""
    assert run("-r", "all", "disk") == 0
    assert ("following inconsistencies" in capfd.readouterr().out) is bool(status)
    assert theirs(Path("disk"))[0] == 0


def test_raw_image_has_no_check(capfd: pytest.CaptureFixture[str]) -> None:
    Path("disk.raw").write_bytes(bytes(1 << 20))
    assert run("disk.raw") == 63
    assert run_tool(["qemu-img", "check", "-f", "raw", "disk.raw"], check=False).code == 63
    assert capfd.readouterr().err == (
        "blockemu: disk.raw: images of format 'raw' have nothing to check\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("none", "none: No such file"),
        ("-f qcow2 disk.raw", "disk.raw: not a qcow2 image"),
        ("-f nbd disk.raw", "disk.raw: there is no image format 'nbd'"),
        ("-U -r all disk", "disk: can't be repaired while others may use it"),
    ],
)
def test_check_of_what_can_not_be_is_one_line(
    arguments: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("disk.raw").write_bytes(bytes(1 << 20))
    assert run(*arguments.split()) == 1
    printed = capfd.readouterr()
    assert printed.err.startswith(f"blockemu: {words}")
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_image_in_use_is_checked_with_force_share_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    QemuImg.create(Path("disk"), 1 << 20)
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "disk"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        while b"1 MiB" not in user.stdout.readline():
            pass
        assert run("disk") == 1
        assert "in use" in capfd.readouterr().err
        assert run("-U", "disk") == 0
        user.communicate(b"quit\n")
