# SPDX-License-Identifier: Apache-2.0
"""After a power cut at any point of a snapshot's life: every snapshot that should be there, whole,
and what was flushed of the disk."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.peers.qemu import QemuImg, run_tool
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import SECTOR, CutDisk, Recorder
from tests.unit.drivers.qcow2.support import KIB, Disk, Images

DISK_BYTES = 48 * KIB
REOPENED = 25
QEMU_CUTS = 5


class Moment(NamedTuple):
    """Something that was done between the host's operations `start` and `end`."""

    start: int
    end: int
    is_durable: bool
    content: bytes
    """Of the disk, when it was done."""
    snapshots: dict[str, bytes]
    """By name, when it was done."""


class Story:
    """One thing after the other, and what was known after each."""

    def __init__(self, images: Images, rng: random.Random, **options: Any) -> None:
        images.create("image", DISK_BYTES, **options)
        self.rng = rng
        self.recorder = Recorder(images["image"], rng)
        self.disk: Disk = images.open("image")
        self.content = bytearray(DISK_BYTES)
        self.snapshots: dict[str, bytes] = {}
        self.moments = [Moment(0, 0, True, bytes(DISK_BYTES), {})]

    def _note(self, start: int, *, is_durable: bool) -> None:
        end = len(self.recorder.operations)
        self.moments.append(
            Moment(start, end, is_durable, bytes(self.content), dict(self.snapshots))
        )

    def scribble(self) -> None:
        for _ in range(self.rng.randrange(1, 5)):
            start = len(self.recorder.operations)
            first = self.rng.randrange(len(self.content) // SECTOR)
            count = min(self.rng.choice((1, 3, 8, 20)), len(self.content) // SECTOR - first)
            data = self.rng.randbytes(8) * (SECTOR // 8 * count)
            if self.rng.random() < 0.2:
                data = bytes(len(data))
                self.disk.ctx.run(self.disk.node.pwrite_zeroes(first * SECTOR, len(data)))
            else:
                self.disk.write(first * SECTOR, data)
            self.content[first * SECTOR : first * SECTOR + len(data)] = data
            self._note(start, is_durable=False)
        if self.rng.random() < 0.5:
            self.flush()

    def flush(self) -> None:
        start = len(self.recorder.operations)
        self.disk.flush()
        self._note(start, is_durable=True)

    def grow(self, length: int) -> None:
        start = len(self.recorder.operations)
        self.disk.ctx.run(self.disk.node.truncate(length))
        self.content.extend(bytes(length - len(self.content)))
        self._note(start, is_durable=True)

    def create(self, name: str) -> None:
        start = len(self.recorder.operations)
        self.disk.ctx.run(self.disk.driver.snapshot_create(name))
        self.snapshots[name] = bytes(self.content)
        self._note(start, is_durable=True)

    def apply(self, name: str) -> None:
        start = len(self.recorder.operations)
        self.disk.ctx.run(self.disk.driver.snapshot_apply(name))
        self.content = bytearray(self.snapshots[name])
        self._note(start, is_durable=True)

    def delete(self, name: str) -> None:
        start = len(self.recorder.operations)
        self.disk.ctx.run(self.disk.driver.snapshot_delete(name))
        del self.snapshots[name]
        self._note(start, is_durable=True)

    def close(self) -> None:
        start = len(self.recorder.operations)
        self.disk.close()
        self._note(start, is_durable=True)


def possible(story: Story, cut: int) -> list[Moment]:
    """What may be there after a cut: from the last durable moment on, whatever had begun."""
    begun = [moment for moment in story.moments if moment.start < cut or not moment.start]
    last = max(at for at, moment in enumerate(begun) if moment.is_durable and moment.end <= cut)
    return begun[last:]


def judge(images: Images, story: Story, tmp_path: Path) -> None:
    operations = story.recorder.operations
    disk = CutDisk(story.recorder.content, operations, story.recorder.flush_starts)
    cuts = [at for at in range(1, len(operations) + 1) if operations[at - 1].kind != "read"]
    reopened = set(story.rng.sample(cuts, min(REOPENED, len(cuts))))
    asked = set(story.rng.sample(cuts, min(QEMU_CUTS, len(cuts))))
    for cut in cuts:
        image = disk.after_cut(cut, story.rng)
        judged = Checker(image)
        assert not judged.corruptions, (cut, judged.corruptions[:5])
        moments = possible(story, cut)
        check_disk(judged.read(), moments, cut)
        check_snapshots(judged.snapshot_contents(), moments, cut)
        if cut in reopened:
            go_on(images, image, judged)
        if cut in asked:
            ask_qemu(image, judged, tmp_path / "cut.qcow2")


def ask_qemu(image: bytearray, judged: Checker, path: Path) -> None:
    """QEMU finds leaks at most, and mends them."""
    path.write_bytes(image)
    verdict = QemuImg.check(path)
    assert (verdict.corruptions, verdict.errors) == (0, 0), verdict.text
    assert verdict.leaks == len(judged.leaks)
    run_tool(["qemu-img", "check", "-q", "-r", "all", path])
    mended = Checker(path.read_bytes())
    assert not mended.corruptions
    assert not mended.leaks
    assert mended.read() == judged.read()
    assert mended.snapshot_contents() == judged.snapshot_contents()


def check_disk(content: bytes, moments: list[Moment], cut: int) -> None:
    fitting = [moment.content for moment in moments if len(moment.content) == len(content)]
    assert fitting, f"{len(content)} bytes after {cut} operations"
    for start in range(0, len(content), SECTOR):
        found = content[start : start + SECTOR]
        assert any(found == other[start : start + SECTOR] for other in fitting), (
            f"sector {start // SECTOR} after {cut} operations"
        )


def check_snapshots(found: dict[str, bytes], moments: list[Moment], cut: int) -> None:
    assert set(found) in [set(moment.snapshots) for moment in moments], f"after {cut} operations"
    for name, content in found.items():
        wanted = next(m.snapshots[name] for m in moments if name in m.snapshots)
        assert content == wanted, f"snapshot {name} after {cut} operations"


def go_on(images: Images, image: bytearray, judged: Checker) -> None:
    """The image is opened and used; no snapshot suffers."""
    images.files.add("cut", image)
    disk = images.open("cut")
    content = bytearray(judged.read())
    assert disk.read(0, len(content)) == content
    contents = judged.snapshot_contents()
    for step in range(3):
        content[step * 5000 : step * 5000 + 4000] = bytes((step + 1,)) * 4000
        disk.write(step * 5000, bytes((step + 1,)) * 4000)
    disk.ctx.run(disk.driver.snapshot_create("new"))
    contents["new"] = bytes(content)
    disk.write(0, b"\xdd" * len(content))
    if len(contents) > 1:
        gone = next(iter(contents))
        disk.ctx.run(disk.driver.snapshot_delete(gone))
        del contents[gone]
    disk.close()
    after = Checker(images["cut"].content)
    assert not after.corruptions
    assert after.snapshot_contents() == contents
    assert after.read() == b"\xdd" * len(content)


FORMATS = [
    {"cluster_size": 512},
    {"cluster_size": 2048, "refcount_bits": 4},
    {"cluster_size": 1024, "refcount_bits": 64},
    {"cluster_size": 4096},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": "on"},
]


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_power_cut_while_a_snapshot_is_made_leaves_the_old_or_the_new_table(
    images: Images, seed: int, options: dict[str, Any], tmp_path: Path
) -> None:
    story = Story(images, random.Random(seed), **options)
    story.scribble()
    story.create("one")
    story.scribble()
    story.create("two")
    story.scribble()
    story.close()
    judge(images, story, tmp_path)
    images.check("image", tmp_path)


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_power_cut_while_the_disk_goes_back_leaves_the_old_or_the_new_disk(
    images: Images, seed: int, options: dict[str, Any], tmp_path: Path
) -> None:
    story = Story(images, random.Random(seed), **options)
    story.scribble()
    story.create("one")
    story.scribble()
    if options.get("compat") != "0.10":
        story.grow(DISK_BYTES + 100 * SECTOR)
    story.scribble()
    story.apply("one")
    story.scribble()
    story.apply("one")
    story.scribble()
    story.close()
    judge(images, story, tmp_path)
    images.check("image", tmp_path)


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_power_cut_while_a_snapshot_is_deleted_leaves_it_whole_or_gone(
    images: Images, seed: int, options: dict[str, Any], tmp_path: Path
) -> None:
    story = Story(images, random.Random(seed), **options)
    story.scribble()
    story.create("one")
    story.scribble()
    story.create("two")
    story.scribble()
    story.delete("one")
    story.scribble()
    story.delete("two")
    story.scribble()
    story.close()
    judge(images, story, tmp_path)
    images.check("image", tmp_path)
