# SPDX-License-Identifier: Apache-2.0
"""The commit job: pauses, errors, and power cuts, after each of which the guest sees the same."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.errors import ImageError
from blockemu.jobs.commit import CommitJob
from blockemu.jobs.job import JobCancelled
from blockemu.loop.memory_file import MemoryImage
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import CutDisk, Recorder
from tests.unit.drivers.qcow2.support import KIB, Images

DISK_BYTES = 96 * KIB
BASE_BYTES = 64 * KIB
CUTS = 150


def make_pair(images: Images, rng: random.Random, cluster_size: int) -> bytes:
    """`top` over the shorter `base`, both with data and zeroes. Returns what the guest sees."""
    images.create("base", BASE_BYTES, cluster_size=cluster_size)
    names = {"backing_file": "base", "backing_fmt": "qcow2"}
    images.create("top", DISK_BYTES, cluster_size=cluster_size, **names)
    for path, length in (("base", BASE_BYTES), ("top", DISK_BYTES)):
        disk = images.open(path)
        for _ in range(12):
            start, count = rng.randrange(length // 512) * 512, rng.choice((512, 3000, 9000))
            disk.write(start, rng.randbytes(min(count, length - start)))
        start = rng.randrange(length - 8192)
        images.ctx.run(disk.node.pwrite_zeroes(start, 8192))
        disk.close()
    return guest_view(images)


def guest_view(images: Images) -> bytes:
    disk = images.open("top", read_only=True)
    data = disk.read(0, DISK_BYTES)
    disk.close()
    return data


def commit(
    images: Images, *, on_step: Callable[[CommitJob], object] = lambda job: None
) -> CommitJob:
    """Runs the job to its end; `on_step` is called after each piece."""
    top = BlockBackend("top", images.open("top", backing=None).node, writable=True)
    base = BlockBackend("base", images.open("base").node, writable=True, resizable=True)
    job = CommitJob(
        "commit", top=top, base=base, empty=True, main_ctx=images.ctx, auto_dismiss=False,
        on_progress=lambda done, total: on_step(job),
    )  # fmt: skip

    async def run() -> None:
        job.start()
        try:
            await job.wait()
        finally:
            await base.close()
            await top.close()

    images.ctx.run(run())
    return job


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_power_cut_at_any_point_changes_nothing_for_the_guest(
    images: Images, seed: int, cluster_size: int
) -> None:
    rng = random.Random(seed)
    expected = make_pair(images, rng, cluster_size)
    recorders = {path: Recorder(images[path], rng) for path in ("base", "top")}
    commit(images)
    for path in recorders:
        images[path].latency_ns = None
    final = {path: bytes(images[path].content) for path in recorders}
    assert guest_view(images) == expected
    for path, other in (("base", recorders["top"].content), ("top", final["base"])):
        operations = recorders[path].operations
        cut_disk = CutDisk(recorders[path].content, operations, recorders[path].flush_starts)
        for cut in sorted(rng.randrange(len(operations) + 1) for _ in range(CUTS)):
            left = bytes(cut_disk.after_cut(cut, rng))
            assert not Checker(left).corruptions
            images.files.images[path] = MemoryImage(left)
            images.files.images["top" if path == "base" else "base"] = MemoryImage(other)
            assert guest_view(images) == expected, (path, cut)


def test_base_is_durable_before_the_top_is_written(images: Images, seed: int) -> None:
    make_pair(images, random.Random(seed), 4096)
    seen: list[tuple[str, str]] = []

    def watch(path: str) -> None:
        def note(kind: str, offset: int, length: int) -> int:
            seen.append((path, kind))
            return 0

        images[path].fault = note

    watch("base")
    watch("top")
    commit(images)
    first_top_write = seen.index(("top", "write"))
    before = [kind for path, kind in seen[:first_top_write] if path == "base"]
    last_base_write = len(before) - 1 - before[::-1].index("write")
    assert "flush" in before[last_base_write:]


def test_job_counts_all_bytes_and_tells_of_them(images: Images, seed: int) -> None:
    make_pair(images, random.Random(seed), 4096)
    job = commit(images)
    assert (job.progress_current, job.progress_total) == (DISK_BYTES, DISK_BYTES)
    assert job.query()["type"] == "commit"


def test_cancelled_job_leaves_the_top_as_it_was(images: Images, seed: int) -> None:
    expected = make_pair(images, random.Random(seed), 4096)
    before = bytes(images["top"].content)
    with pytest.raises(JobCancelled):
        commit(images, on_step=lambda job: job.cancel(force=True))
    assert images["top"].content == before
    assert guest_view(images) == expected


def test_full_disk_below_the_base_is_reported_with_its_name(images: Images, seed: int) -> None:
    expected = make_pair(images, random.Random(seed), 4096)
    before = bytes(images["top"].content)
    images["base"].fault = lambda kind, offset, length: errno.ENOSPC if kind == "write" else 0
    with pytest.raises(ImageError, match=r"^base: .*No space left on device"):
        commit(images)
    images["base"].fault = None
    assert images["top"].content == before
    assert guest_view(images) == expected
