# SPDX-License-Identifier: Apache-2.0
"""An image with an external data file after a power cut at any point, which hits both files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.loop.sync import gather
from tests.peers.qemu import QemuImg
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import SECTOR, GuestHistory
from tests.unit.drivers.qcow2.support import KIB, Images
from tests.unit.drivers.qcow2.test_crash import DISK_BYTES, PLAIN, request
from tests.unit.drivers.qcow2.two_files import TwoFileDisk, TwoFileRecorder

ROUNDS = 10
TASKS = 6
CUTS = 250
QEMU_CUTS = 3
SUBCLUSTERS = {"cluster_size": 16384, "extended_l2": "on"}
LAYOUTS: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 4096},
    {"cluster_size": 16384},
    SUBCLUSTERS,
    {**SUBCLUSTERS, "cluster_size": 65536},
]


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To QEMU, the data file's name is relative to the working directory."""
    monkeypatch.chdir(tmp_path)


def record(images: Images, rng: random.Random, **options: Any) -> TwoFileRecorder:
    recorder = TwoFileRecorder(images["image"], images["data"], rng)
    disk = images.open("image", **options)
    for _ in range(ROUNDS):
        images.ctx.run(gather(*(request(disk, recorder, rng, PLAIN) for _ in range(TASKS))))
    disk.close()
    return recorder


def judge(recorder: TwoFileRecorder, rng: random.Random, *, raw: bool, tmp_path: Path) -> None:
    cut_disk = TwoFileDisk(recorder)
    history = GuestHistory(DISK_BYTES // SECTOR)
    events = list(recorder.events)
    chosen = sorted(rng.randrange(len(recorder) + 1) for _ in range(CUTS))
    asked = set(rng.sample(range(CUTS), QEMU_CUTS))
    for number, cut in enumerate(chosen):
        while events and events[0].at <= cut:
            history.play(events.pop(0))
        image, data = cut_disk.after_cut(cut, rng)
        judged = Checker(image, data)
        assert not judged.corruptions, (cut, judged.corruptions[:5])
        content = judged.read()
        for sector, values in enumerate(history.values):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            possible = {value for _, value in values}
            assert found in possible, f"sector {sector} after {cut} operations"
        if raw:
            assert content == data, f"the data file shows something else, after {cut} operations"
        if number in asked:
            path = tmp_path / "cut.qcow2"
            path.write_bytes(image)
            (tmp_path / "data").write_bytes(data)
            verdict = QemuImg.check(path)
            assert (verdict.corruptions, verdict.errors) == (0, 0), verdict.text


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_power_cut_at_any_point_keeps_what_was_flushed(
    images: Images, seed: int, options: dict[str, Any], raw: bool, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    images.create("image", DISK_BYTES, data_file="data", data_file_raw=raw, **options)
    judge(record(images, rng), rng, raw=raw, tmp_path=tmp_path)


def test_power_cut_with_caches_of_a_few_slices_keeps_what_was_flushed(
    images: Images, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    images.create("image", DISK_BYTES, cluster_size=512, data_file="data")
    recorder = record(
        images, rng, l2_cache_size=2048, refcount_cache_size=2048, l2_cache_entry_size=512
    )
    judge(recorder, rng, raw=False, tmp_path=tmp_path)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    ("target", "mode"), [(50 * KIB, "off"), (2048 * KIB, "off"), (2048 * KIB, "full")]
)
@pytest.mark.parametrize("options", [{"cluster_size": 1024}, SUBCLUSTERS], ids=str)
def test_power_cut_while_the_disk_changes_its_size_leaves_one_or_the_other(
    images: Images, seed: int, options: dict[str, Any], target: int, mode: str, raw: bool
) -> None:
    rng = random.Random(seed)
    images.create("image", DISK_BYTES, data_file="data", data_file_raw=raw, **options)
    disk = images.open("image")
    disk.write(0, b"\x5a" * DISK_BYTES)
    disk.close()
    recorder = TwoFileRecorder(images["image"], images["data"], rng)
    disk = images.open("image")
    images.ctx.run(disk.node.truncate(target, preallocation=mode))
    disk.close()
    cut_disk = TwoFileDisk(recorder)
    kept = min(target, DISK_BYTES)
    for cut in range(len(recorder) + 1):
        image, data = cut_disk.after_cut(cut, rng)
        judged = Checker(image, data)
        assert not judged.corruptions, (cut, judged.corruptions[:5])
        assert judged.disk_bytes in (target, DISK_BYTES)
        assert len(data) >= judged.disk_bytes
        content = judged.read()
        assert content[:kept] == b"\x5a" * kept
        if judged.disk_bytes > DISK_BYTES:
            assert content[DISK_BYTES:] == bytes(target - DISK_BYTES)
        if raw and judged.disk_bytes == target:
            assert content == data[:target]
    assert len(images["data"].content) == target


@pytest.mark.parametrize("options", [{"cluster_size": 4096}, SUBCLUSTERS], ids=str)
def test_zeroed_cluster_that_is_written_again_never_shows_what_it_held_before(
    images: Images, seed: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Its old bytes are still in the data file, so the new ones have to be there before the entry
    says that they are."""
    rng = random.Random(seed)
    images.create("image", DISK_BYTES, data_file="data", **options)
    recorder = TwoFileRecorder(images["image"], images["data"], rng)
    disk = images.open("image")
    count = 16 * KIB // SECTOR

    async def guest() -> None:
        for _ in range(12):
            for value in (rng.randbytes(8) * (SECTOR // 8), bytes(SECTOR)):
                number = recorder.note("start", count=count, value=value)
                if any(value):
                    await disk.node.pwritev(0, memoryview(value * count))
                else:
                    await disk.node.pwrite_zeroes(0, count * SECTOR, RequestFlags.NONE)
                recorder.note("end", number)
                number = recorder.note("flush-start")
                await disk.node.flush()
                recorder.note("flush-end", number)

    images.ctx.run(guest())
    disk.close()
    judge(recorder, rng, raw=False, tmp_path=tmp_path)
