# SPDX-License-Identifier: Apache-2.0
"""The amend job: after a power cut at any point the image is of one version, and reads the same."""

from __future__ import annotations

import random
from typing import Any

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.qcow2.amend import Amendment
from blockemu.drivers.qcow2.header import EXTENSION_FEATURE_NAMES, parse
from blockemu.jobs.amend import AmendJob
from blockemu.loop.memory_file import MemoryImage
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import CutDisk, Recorder
from tests.unit.drivers.qcow2.support import KIB, Images

DISK_BYTES = 100 * KIB
BASE_BYTES = 64 * KIB
CUTS = 150


def make_image(images: Images, rng: random.Random, *, backing: str | None, **options: Any) -> None:
    """`image` with data, zero clusters with and without space of their own, and holes."""
    images.files.add(backing or "base", rng.randbytes(BASE_BYTES))
    if backing is not None:
        options |= {"backing_file": backing, "backing_fmt": "raw"}
    images.create("image", DISK_BYTES, **options)
    disk = images.open("image")
    for _ in range(12):
        start, count = rng.randrange(DISK_BYTES // 512) * 512, rng.choice((512, 3000, 9000))
        count = min(count, DISK_BYTES - start)
        if rng.random() < 0.5:
            disk.write(start, rng.randbytes(count))
        else:
            images.ctx.run(disk.node.pwrite_zeroes(start, count))
    disk.close()


def guest_view(images: Images) -> bytes:
    disk = images.open("image", read_only=True)
    data = disk.read(0, disk.node.length_bytes)
    disk.close()
    return data


def amend(images: Images, **options: Any) -> AmendJob:
    node = images.open("image").node
    backend = BlockBackend("image", node, writable=True, resizable=True)
    job = AmendJob(
        "amend", backend, Amendment.parse("image", options), main_ctx=images.ctx,
        auto_dismiss=False,
    )  # fmt: skip

    async def run() -> None:
        job.start()
        try:
            await job.wait()
        finally:
            await backend.close()

    images.ctx.run(run())
    return job


LONG_NAME = "long" * 100


@pytest.mark.parametrize("backing", [None, "base", LONG_NAME], ids=["none", "short", "long"])
@pytest.mark.parametrize(
    ("compat", "wanted", "cluster_size"),
    [("1.1", "0.10", 512), ("1.1", "0.10", 4096), ("1.1", "0.10", 16384), ("0.10", "1.1", 4096)],
)
def test_power_cut_leaves_one_version_with_the_same_content(
    images: Images, seed: int, backing: str | None, compat: str, wanted: str, cluster_size: int
) -> None:
    if cluster_size == 512 and backing == LONG_NAME:
        backing = "base"  # no room for the other one
    rng = random.Random(seed)
    make_image(images, rng, backing=backing, compat=compat, cluster_size=cluster_size)
    expected = guest_view(images)
    recorder = Recorder(images["image"], rng)
    amend(images, compat=wanted)
    operations = recorder.operations
    cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
    cuts = [rng.randrange(len(operations) + 1) for _ in range(CUTS)]
    cuts += [*range(len(operations) - 20, len(operations) + 1)] * 5  # around the header's switch
    versions = set()
    for cut in sorted(max(cut, 0) for cut in cuts):
        left = bytes(cut_disk.after_cut(cut, rng))
        assert not Checker(left).corruptions
        header = parse("image", left)
        assert header.backing_file == backing
        versions.add(header.version)
        images.files.images["image"] = MemoryImage(left)
        assert guest_view(images) == expected, cut
    assert versions == {2, 3}


def test_versions_there_and_back_keep_feature_names_and_content(images: Images, seed: int) -> None:
    make_image(images, random.Random(seed), backing="base", cluster_size=4096)
    expected = guest_view(images)
    names = parse("image", bytes(images["image"].content)).extension(EXTENSION_FEATURE_NAMES)
    assert names
    job = amend(images, compat="0.10")
    assert (job.progress_current, job.progress_total) == (DISK_BYTES, DISK_BYTES)
    assert parse("image", bytes(images["image"].content)).extensions[1:] == []
    amend(images, compat="1.1")
    header = parse("image", bytes(images["image"].content))
    assert (header.version, header.extension(EXTENSION_FEATURE_NAMES)) == (3, names)
    assert guest_view(images) == expected


def test_amendment_that_is_the_case_already_writes_nothing(images: Images, seed: int) -> None:
    make_image(images, random.Random(seed), backing="base", cluster_size=4096)
    images["image"].log.clear()
    amend(images, compat="1.1", lazy_refcounts=False, size=DISK_BYTES)
    assert not images["image"].operations("write", "zero")


def test_disk_grows_with_zeroes(images: Images, seed: int) -> None:
    make_image(images, random.Random(seed), backing="base", cluster_size=4096)
    before = guest_view(images)
    amend(images, size=2 * DISK_BYTES)
    assert guest_view(images) == before + bytes(DISK_BYTES)
