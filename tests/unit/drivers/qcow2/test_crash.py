# SPDX-License-Identifier: Apache-2.0
"""After a power cut at any point: no corruption, and everything that was flushed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.loop.sync import gather
from tests.peers.qemu import QemuImg
from tests.unit.drivers.qcow2.checker import Checker
from tests.unit.drivers.qcow2.crash import SECTOR, CutDisk, GuestHistory, Recorder
from tests.unit.drivers.qcow2.support import KIB, Disk, Images, in_place

DISK_BYTES = 256 * KIB
ROUNDS = 10
TASKS = 6
CUTS = 250
QEMU_CUTS = 5


PLAIN = ("write", "write", "write", "zero", "unmap", "discard")
PACKED = ("compress", "compress", "compress", *PLAIN)


async def request(
    disk: Disk, recorder: Recorder, rng: random.Random, kinds: tuple[str, ...]
) -> None:
    """One random request of a guest, noted in the history before and after."""
    node = disk.node
    if rng.random() < 0.15:
        number = recorder.note("flush-start")
        await node.flush()
        recorder.note("flush-end", number)
        return
    first = rng.randrange(DISK_BYTES // SECTOR)
    count = min(rng.choice((1, 2, 8, 8, 20, 64)), DISK_BYTES // SECTOR - first)
    offset, length = first * SECTOR, count * SECTOR
    kind = rng.choice(kinds)
    value = bytes(SECTOR)
    if kind == "write":
        value = rng.randbytes(8) * (SECTOR // 8)
    elif kind == "compress":
        value = rng.randbytes(SECTOR // 4) * 4
    if kind in ("discard", "compress"):  # whole clusters, so that what a discard leaves is known
        mask = disk.driver.cluster_size - 1
        end = offset + length & ~mask
        offset = min(offset + mask & ~mask, end)
        first, count, length = offset // SECTOR, (end - offset) // SECTOR, end - offset
        if not length:
            return
    number = recorder.note("start", first=first, count=count, value=value)
    if kind == "write":
        await node.pwritev(offset, memoryview(value * count))
    elif kind == "compress":
        await node.pwritev(offset, memoryview(value * count), RequestFlags.WRITE_COMPRESSED)
    elif kind == "discard":
        await node.pdiscard(offset, length)
    else:
        flags = RequestFlags.MAY_UNMAP if kind == "unmap" else RequestFlags.NONE
        await node.pwrite_zeroes(offset, length, flags)
    recorder.note("end", number)


def run_workload(
    images: Images, rng: random.Random, *, kinds: tuple[str, ...] = PLAIN, **options: Any
) -> Recorder:
    """A guest's requests, several at once, recorded."""
    recorder = Recorder(images["image"], rng)
    disk = images.open("image", **options)
    disk.driver.image.compressor.offload = in_place
    for _ in range(ROUNDS):
        images.ctx.run(gather(*(request(disk, recorder, rng, kinds) for _ in range(TASKS))))
    disk.close()
    return recorder


def judge(recorder: Recorder, rng: random.Random, *, cuts: int, tmp_path: Path) -> None:
    operations = recorder.operations
    cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
    history = GuestHistory(DISK_BYTES // SECTOR)
    events = list(recorder.events)
    chosen = sorted(rng.randrange(len(operations) + 1) for _ in range(cuts))
    asked = set(rng.sample(range(cuts), QEMU_CUTS))
    for number, cut in enumerate(chosen):
        while events and events[0].at <= cut:
            history.play(events.pop(0))
        image = cut_disk.after_cut(cut, rng)
        judged = Checker(image)
        assert not judged.corruptions, (cut, judged.corruptions[:5])
        content = judged.read()
        for sector, values in enumerate(history.values):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            possible = {value for _, value in values}
            assert found in possible, f"sector {sector} after {cut} operations"
        if number in asked:
            path = tmp_path / "cut.qcow2"
            path.write_bytes(image)
            verdict = QemuImg.check(path)
            assert (verdict.corruptions, verdict.errors) == (0, 0), verdict.text
            assert verdict.leaks == len(judged.leaks)


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096},
        {"cluster_size": 16384},
        {"cluster_size": 1024, "refcount_bits": 64},
        {"cluster_size": 4096, "refcount_bits": 1},
        {"cluster_size": 4096, "compat": "0.10"},
        {"cluster_size": 16384, "extended_l2": "on"},
        {"cluster_size": 65536, "extended_l2": "on"},
    ],
    ids=str,
)
def test_power_cut_at_any_point_leaves_leaks_at_most(
    images: Images, seed: int, options: dict[str, Any], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    images.create("image", DISK_BYTES, **options)
    recorder = run_workload(images, rng)
    judge(recorder, rng, cuts=CUTS, tmp_path=tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096},
        {"cluster_size": 16384},
        {"cluster_size": 4096, "refcount_bits": 1},
        {"cluster_size": 4096, "refcount_bits": 2},
        {"cluster_size": 4096, "compat": "0.10"},
        {"cluster_size": 16384, "extended_l2": "on"},
        {"cluster_size": 65536, "extended_l2": "on"},
    ],
    ids=str,
)
def test_power_cut_between_compressed_writes_leaves_leaks_at_most(
    images: Images, seed: int, options: dict[str, Any], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    images.create("image", DISK_BYTES, **options)
    recorder = run_workload(images, rng, kinds=PACKED)
    judge(recorder, rng, cuts=CUTS, tmp_path=tmp_path)


def test_power_cut_with_caches_of_a_few_slices_leaves_leaks_at_most(
    images: Images, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    images.create("image", DISK_BYTES, cluster_size=512)
    recorder = run_workload(
        images, rng, l2_cache_size=2048, refcount_cache_size=2048, l2_cache_entry_size=512
    )
    judge(recorder, rng, cuts=CUTS, tmp_path=tmp_path)


def test_power_cut_while_the_refcount_table_moves_leaves_leaks_at_most(
    images: Images, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    size = 4 * 1024 * KIB
    images.create("image", size, cluster_size=512, refcount_bits=64)
    recorder = Recorder(images["image"], rng)
    disk = images.open("image")
    table = disk.driver.image.header.refcount_table_offset
    for offset in range(0, size, 256 * KIB):
        disk.write(offset, b"\x5a" * (256 * KIB))
    assert disk.driver.image.header.refcount_table_offset != table
    disk.close()
    operations = recorder.operations
    header_writes = [index for index, found in enumerate(operations) if not found.offset
                     and found.kind == "write"]  # fmt: skip
    assert header_writes
    cuts = sorted(
        {min(max(index + step, 0), len(operations)) for index in header_writes
         for step in range(-20, 21)}
    )  # fmt: skip
    cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
    for cut in cuts:
        judged = Checker(cut_disk.after_cut(cut, rng))
        assert not judged.corruptions, (cut, judged.corruptions[:5])
    images.check("image", tmp_path)


def test_power_cut_while_the_disk_grows_leaves_leaks_at_most(
    images: Images, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    images.create("image", 32 * KIB, cluster_size=512)
    recorder = Recorder(images["image"], rng)
    disk = images.open("image")
    disk.write(1024, b"\x5a" * 20000)
    images.ctx.run(disk.node.truncate(16 * 1024 * KIB))
    disk.write(15 * 1024 * KIB, b"\xa5" * 20000)
    disk.close()
    operations = recorder.operations
    cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
    for cut in range(len(operations) + 1):
        judged = Checker(cut_disk.after_cut(cut, rng))
        assert not judged.corruptions, (cut, judged.corruptions[:5])
        assert judged.disk_bytes in (32 * KIB, 16 * 1024 * KIB)
        if (
            judged.disk_bytes > 32 * KIB and not cut % 8
        ):  # what was there is, and what is new is empty
            content = judged.read()
            assert content[: 32 * KIB] == bytes(1024) + b"\x5a" * 20000 + bytes(32 * KIB - 21024)
            assert not any(content[32 * KIB : 15 * 1024 * KIB])
    images.check("image", tmp_path)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options", [{"cluster_size": 1024}, {"cluster_size": 16384, "extended_l2": "on"}], ids=str
)
def test_power_cut_while_the_disk_grows_with_preallocation_shows_nothing_that_lay_there(
    images: Images, seed: int, options: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    """Host clusters that held something are used again; nor is it there behind the old end."""
    rng = random.Random(seed)
    old, new = 512 * KIB, 1024 * KIB
    images.create("image", old, **options)
    disk = images.open("image", pass_discard_request=False)
    disk.write(0, b"\x5a" * old)
    disk.flush()
    images.ctx.run(disk.node.pdiscard(0, old // 2))
    disk.close()
    recorder = Recorder(images["image"], rng)
    disk = images.open("image")
    images.ctx.run(disk.node.truncate(new, preallocation=mode))
    disk.close()
    operations = recorder.operations
    cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
    for cut in range(len(operations) + 1):
        judged = Checker(cut_disk.after_cut(cut, rng))
        assert not judged.corruptions, (cut, judged.corruptions[:5])
        assert judged.disk_bytes in (old, new)
        content = judged.read(new)
        assert content[old // 2 : old] == b"\x5a" * (old // 2)
        assert not any(content[: old // 2])
        assert not any(content[old:]), cut
    images.check("image", tmp_path)


def test_power_cut_while_the_disk_shrinks_leaves_leaks_at_most(
    images: Images, seed: int, tmp_path: Path
) -> None:
    """And what stays is there, at either size; a smaller disk has nothing behind its end."""
    rng = random.Random(seed)
    images.create("image", DISK_BYTES, cluster_size=512)
    disk = images.open("image")
    disk.write(0, b"\x5a" * DISK_BYTES)
    disk.close()
    recorder = Recorder(images["image"], rng)
    disk = images.open("image")
    images.ctx.run(disk.node.truncate(50 * KIB))
    disk.close()
    operations = recorder.operations
    cut_disk = CutDisk(recorder.content, operations, recorder.flush_starts)
    for cut in range(len(operations) + 1):
        judged = Checker(cut_disk.after_cut(cut, rng))
        assert not judged.corruptions, (cut, judged.corruptions[:5])
        assert judged.disk_bytes in (50 * KIB, DISK_BYTES)
        assert judged.read()[: 50 * KIB] == b"\x5a" * (50 * KIB)
        if judged.disk_bytes < DISK_BYTES:
            words = judged.words(judged.l1[0], judged.l1[1])
            assert not any(words[2:]), cut
    images.check("image", tmp_path)
