# SPDX-License-Identifier: Apache-2.0
"""After a power cut at any point of a bitmap's life: every bitmap that should be there, whole or
marked as in use. One that isn't marked never lacks what was written to the disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from blockemu.drivers import bitmap_commands
from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.qcow2.findings import CheckResult
from blockemu.drivers.qcow2.repair import Repair, check_image
from tests.peers.qemu import QemuImg
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import SECTOR, CutDisk, Recorder
from tests.unit.drivers.qcow2.support import KIB, Images

DISK_BYTES = 64 * KIB
GRANULARITY = 512
REOPENED = 15
QEMU_CUTS = 4
AUTO, IN_USE = 2, 1

Stored = dict[str, tuple[bool, frozenset[int]] | None]
"""By name: whether it records, and what is dirty; None: marked as in use."""


class Moment(NamedTuple):
    """Something that was done between the host's operations `start` and `end`, and what the image
    then has."""

    start: int
    end: int
    stored: Stored


class Story:
    """One thing after the other, each durable in itself, and what the image then has."""

    def __init__(self, images: Images, rng: random.Random, *, cluster_size: int) -> None:
        images.create("image", DISK_BYTES, cluster_size=cluster_size)
        self.images = images
        self.rng = rng
        self.recorder = Recorder(images["image"], rng)
        self.disk = images.open("image")
        self.known: dict[str, tuple[bool, set[int]]] = {}
        """What is true of each bitmap now."""
        self.stored: Stored = {}
        self.moments = [Moment(0, 0, {})]

    def _note(self, start: int) -> None:
        end = len(self.recorder.operations)
        self.moments.append(Moment(start, end, dict(self.stored)))

    def _run(self, work: Coroutine[Any, Any, Any]) -> None:
        start = len(self.recorder.operations)
        self.disk.ctx.run(work)
        self._note(start)

    def write(self) -> None:
        start = len(self.recorder.operations)
        for _ in range(self.rng.randrange(1, 4)):
            first = self.rng.randrange(DISK_BYTES // SECTOR - 8)
            data = self.rng.randbytes(SECTOR * self.rng.randrange(1, 9))
            self.disk.write(first * SECTOR, data)
            for enabled, dirty in self.known.values():
                if enabled:
                    dirty.update(range(first, first + len(data) // SECTOR))
        self.disk.flush()
        self._note(start)

    def add(self, name: str, *, enabled: bool = True) -> None:
        self.known[name] = (enabled, set())
        node = self.disk.node
        self._run(
            bitmap_commands.add(
                node, name, granularity=GRANULARITY, persistent=True, enabled=enabled
            )
        )

    def _marked(self, name: str) -> None:
        if name in self.stored:
            self.stored[name] = None

    def clear(self, name: str) -> None:
        self._marked(name)
        self.known[name][1].clear()
        self._run(bitmap_commands.clear(self.disk.node, name))

    def switch(self, name: str) -> None:
        self._marked(name)
        enabled, dirty = self.known[name]
        self.known[name] = (not enabled, dirty)
        verb = bitmap_commands.disable if enabled else bitmap_commands.enable
        self._run(verb(self.disk.node, name))

    def merge(self, name: str, source: str) -> None:
        self._marked(name)
        self.known[name][1].update(self.known[source][1])
        taken = self.disk.node.dirty_bitmaps[source]
        self._run(bitmap_commands.merge(self.disk.node, name, taken))

    def remove(self, name: str) -> None:
        del self.known[name]
        self.stored.pop(name, None)
        self._run(bitmap_commands.remove(self.disk.node, name))

    def grow(self) -> None:
        self.stored = dict.fromkeys(self.stored)
        length = self.disk.node.length_bytes + 4 * KIB
        self._run(self.disk.node.truncate(length))

    def reopen(self) -> None:
        start = len(self.recorder.operations)
        self.disk.close()
        self.stored = {
            name: (enabled, frozenset(dirty)) for name, (enabled, dirty) in self.known.items()
        }
        self._note(start)
        start = len(self.recorder.operations)
        self.disk = self.images.open("image")
        for name, (enabled, _) in self.known.items():
            if enabled:
                self.stored[name] = None
        self._note(start)


def possible(story: Story, cut: int) -> list[Moment]:
    """What may be there after a cut: what was last done, and whatever had begun after it."""
    begun = [moment for moment in story.moments if moment.start < cut or not moment.start]
    last = max(at for at, moment in enumerate(begun) if moment.end <= cut)
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
        found = stored_in(judged)
        check_stored(found, moments, cut)
        if cut in reopened:
            go_on(images, image, judged, found)
        if cut in asked:
            path = tmp_path / "cut.qcow2"
            path.write_bytes(image)
            verdict = QemuImg.check(path)
            assert (verdict.corruptions, verdict.errors) == (0, 0), verdict.text
            assert verdict.leaks == len(judged.leaks)


def stored_in(judged: Checker) -> Stored:
    return {
        name: None if flags & IN_USE else (bool(flags & AUTO), frozenset(dirty))
        for name, (flags, dirty) in judged.bitmaps().items()
    }


def check_stored(found: Stored, moments: list[Moment], cut: int) -> None:
    names = [set(moment.stored) for moment in moments]
    assert set(found) in names, (cut, set(found), names)
    for name, state in found.items():
        wanted = [moment.stored[name] for moment in moments if name in moment.stored]
        assert state in wanted, (cut, name, state, wanted)


def go_on(images: Images, image: bytearray, judged: Checker, found: Stored) -> None:
    """Whoever opens it next finds that, can write, and loses nothing."""
    mend(images, image, judged)
    images.files.add("again", bytes(image))
    disk = images.open("again")
    names = {bitmap.name: bitmap for bitmap in disk.node.dirty_bitmaps.values()}
    assert {name for name in names if names[name].inconsistent} == {
        name for name, state in found.items() if state is None
    }
    disk.write(0, b"more")
    disk.close()
    after = Checker(images["again"].content)
    assert not after.corruptions
    assert set(after.leaks) <= set(judged.leaks)
    for name, state in stored_in(after).items():
        before = found[name]
        assert state == (before and (before[0], before[1] | ({0} if before[0] else set())))


def mend(images: Images, image: bytearray, judged: Checker) -> None:
    """Our own check counts the same, and frees what leaks, and only that."""
    images.files.add("mended", bytes(image))

    async def run() -> CheckResult:
        node = await images.opener.open({"driver": "file", "filename": "mended"})
        backend = BlockBackend("check", node, writable=True)
        try:
            return await check_image("mended", backend.root, repair=Repair.ALL)
        finally:
            await backend.close()

    result = images.ctx.run(run())
    assert (result.corruptions_fixed, result.leaks_fixed) == (0, len(judged.leaks))
    mended = Checker(images["mended"].content)
    assert not mended.corruptions
    assert not mended.leaks
    assert mended.bitmaps() == judged.bitmaps()


def whole_life(story: Story) -> None:
    story.add("a")
    story.add("off", enabled=False)
    story.write()
    story.reopen()
    story.write()
    story.merge("off", "a")
    story.reopen()
    story.remove("a")
    story.switch("off")
    story.write()
    story.reopen()


def clearing(story: Story) -> None:
    for name in "abc":
        story.add(name, enabled=name != "c")
    story.write()
    story.reopen()
    story.clear("b")
    story.write()
    story.clear("c")
    story.reopen()
    story.clear("a")
    story.reopen()


def growing(story: Story) -> None:
    story.add("a")
    story.add("off", enabled=False)
    story.reopen()
    story.write()
    story.grow()
    story.write()
    story.reopen()


def random_steps(story: Story) -> None:
    story.add("first")
    for number in range(14):
        what = story.rng.choice(["add", "write", "write", "clear", "switch", "remove", "merge",
                                 "grow", "reopen", "reopen"])  # fmt: skip
        name = story.rng.choice(sorted(story.known) or [""])
        if what == "add":
            story.add(f"{number}" * story.rng.randrange(1, 90), enabled=story.rng.random() < 0.6)
        elif what in ("write", "grow", "reopen"):
            getattr(story, what)()
        elif what == "merge" and name:
            story.merge(name, story.rng.choice(sorted(story.known)))
        elif name:
            getattr(story, what)(name)
    story.reopen()


@pytest.mark.parametrize("cluster_size", [512, 4096])
@pytest.mark.parametrize("tell", [whole_life, clearing, growing, random_steps])
def test_power_cut_leaves_bitmaps_whole_or_marked(
    images: Images,
    tmp_path: Path,
    seed: int,
    tell: Callable[[Story], None],
    cluster_size: int,
) -> None:
    story = Story(images, random.Random(seed), cluster_size=cluster_size)
    tell(story)
    judge(images, story, tmp_path)
