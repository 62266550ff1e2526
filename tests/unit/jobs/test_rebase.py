# SPDX-License-Identifier: Apache-2.0
"""The rebase job: after a power cut, a cancel or an error the guest sees the same as before."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.header import parse
from blockemu.jobs.job import JobCancelled
from blockemu.jobs.rebase import RebaseJob
from blockemu.loop.memory_file import MemoryImage
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import CutDisk, Recorder
from tests.unit.drivers.qcow2.support import KIB, Images

DISK_BYTES = 100 * KIB
CUTS = 200


def make_images(images: Images, rng: random.Random, *, cluster_size: int, compat: str) -> bytes:
    """`top` over `old`, and `new`, which is shorter and in part the same. Returns the guest's view.

    Both are raw, with data and zeroes.
    """
    old = bytearray(rng.randbytes(DISK_BYTES))
    old[10 * KIB : 40 * KIB] = bytes(30 * KIB)
    new = old[: 80 * KIB]
    new[20 * KIB : 60 * KIB] = rng.randbytes(40 * KIB)
    images.files.add("old", bytes(old))
    images.files.add("new", bytes(new))
    names = {"backing_file": "old", "backing_fmt": "raw"}
    images.create("top", DISK_BYTES, cluster_size=cluster_size, compat=compat, **names)
    disk = images.open("top")
    disk.write(25 * KIB + 512, rng.randbytes(9000))
    disk.close()
    return guest_view(images)


def guest_view(images: Images) -> bytes:
    disk = images.open("top", read_only=True)
    data = disk.read(0, DISK_BYTES)
    disk.close()
    return data


def rebase(
    images: Images,
    target: str | None,
    *,
    on_step: Callable[[RebaseJob], object] = lambda job: None,
) -> RebaseJob:
    """Runs the job to its end; `on_step` is called after each piece."""

    async def run() -> RebaseJob:
        node = await images.opener.open(
            {"driver": "qcow2", "file": {"driver": "file", "filename": "top"}}
        )
        top = BlockBackend("top", node, writable=True)
        new = None
        if target is not None:
            file = {"driver": "file", "filename": target}
            new = await images.opener.open({"driver": "raw", "read-only": True, "file": file})
        job = RebaseJob(
            "rebase", top, new_backing=new, filename=target, fmt="raw" if target else None,
            granule=4096, main_ctx=images.ctx, auto_dismiss=False,
            on_progress=lambda done, total: on_step(job),
        )  # fmt: skip
        job.start()
        try:
            await job.wait()
        finally:
            if new is not None:
                await new.close()
            await top.close()
        return job

    return images.ctx.run(run())


@pytest.mark.parametrize("target", ["new", None])
@pytest.mark.parametrize(
    ("cluster_size", "compat"), [(512, "1.1"), (4096, "1.1"), (16384, "1.1"), (4096, "0.10")]
)
def test_power_cut_at_any_point_changes_nothing_for_the_guest(
    images: Images, seed: int, target: str | None, cluster_size: int, compat: str
) -> None:
    rng = random.Random(seed)
    expected = make_images(images, rng, cluster_size=cluster_size, compat=compat)
    recorder = Recorder(images["top"], rng)
    rebase(images, target)
    operations = recorder.operations
    cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
    cuts = [rng.randrange(len(operations) + 1) for _ in range(CUTS)]
    cuts += [*range(max(len(operations) - 12, 0), len(operations) + 1)] * 5
    found = set()
    for cut in sorted(cuts):
        left = bytes(cut_disk.after_cut(cut, rng))
        assert not Checker(left).corruptions
        found.add(parse("top", left).backing_file)
        images.files.images["top"] = MemoryImage(left)
        assert guest_view(images) == expected, cut
    assert found == {"old", target}


def test_job_counts_all_bytes(images: Images, seed: int) -> None:
    make_images(images, random.Random(seed), cluster_size=4096, compat="1.1")
    job = rebase(images, "new")
    assert (job.progress_current, job.progress_total) == (DISK_BYTES, DISK_BYTES)


def test_cancelled_job_leaves_the_old_backing_file(images: Images, seed: int) -> None:
    expected = make_images(images, random.Random(seed), cluster_size=4096, compat="1.1")
    with pytest.raises(JobCancelled):
        rebase(images, "new", on_step=lambda job: job.cancel(force=True))
    assert parse("top", bytes(images["top"].content)).backing_file == "old"
    assert guest_view(images) == expected


def test_full_disk_is_reported_with_the_image_and_leaves_the_old_backing_file(
    images: Images, seed: int
) -> None:
    expected = make_images(images, random.Random(seed), cluster_size=4096, compat="1.1")
    images["top"].fault = lambda kind, offset, length: errno.ENOSPC if kind == "write" else 0
    with pytest.raises((ImageError, OSError), match="No space left on device"):
        rebase(images, "new")
    images["top"].fault = None
    assert parse("top", bytes(images["top"].content)).backing_file == "old"
    assert guest_view(images) == expected
