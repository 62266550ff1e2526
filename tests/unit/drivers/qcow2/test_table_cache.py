# SPDX-License-Identifier: Apache-2.0
"""The slice cache: bounded, written back in captures, read once."""

from __future__ import annotations

import random
import struct

import pytest

from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.qcow2.image_file import ImageFile
from blockemu.drivers.qcow2.table_cache import MERGE_MAX, TableCache, merge
from blockemu.loop.sync import gather
from tests.unit.drivers.qcow2.support import Images

SLICE = 4096
SLICES = 64


class Fixture:
    def __init__(self, images: Images, slices: int, *, ahead_bytes: int = 0) -> None:
        words = [index * 3 for index in range(SLICES * SLICE // 8)]
        self.image = images.files.add("file", struct.pack(f">{len(words)}Q", *words))
        self.ctx = images.ctx
        node = images.ctx.run(images.opener.open({"driver": "file", "filename": "file"}))
        child = BdrvChild(
            "file", node, parent=None, role=Role.DATA, perm=Permission.ALL, shared=Permission.ALL
        )
        self.file = ImageFile(child, cluster_size=65536, name="file")
        self.writes_back = 0
        self.cache = TableCache(
            self.file, typecode="Q", slice_bytes=SLICE, bytes_max=slices * SLICE,
            write_back=self.write_back, ahead_bytes=ahead_bytes,
        )  # fmt: skip

    async def write_back(self) -> None:
        self.writes_back += 1
        captured = self.cache.capture()
        await self.file.write_all(captured.writes)
        self.cache.settle(captured, failed=False)


def test_load_reads_big_endian_words_once(images: Images) -> None:
    found = Fixture(images, 8)
    first = found.ctx.run(found.cache.load(SLICE))
    again = found.ctx.run(found.cache.load(SLICE))
    assert first is again
    assert first.words[1] == (SLICE // 8 + 1) * 3
    assert len(found.image.operations("read")) == 1


def test_two_loads_at_once_are_one_read(images: Images) -> None:
    found = Fixture(images, 8)
    found.image.latency_ns = lambda kind, offset, length: 1000
    one, two = found.ctx.run(gather(found.cache.load(0), found.cache.load(0)))
    assert one is two
    assert len(found.image.operations("read")) == 1


def test_failed_load_is_tried_again_by_the_next(images: Images) -> None:
    found = Fixture(images, 8)
    found.image.fault = lambda kind, offset, length: 5
    with pytest.raises(OSError):
        found.ctx.run(found.cache.load(0))
    found.image.fault = None
    assert found.ctx.run(found.cache.load(0)).words[1] == 3


def test_memory_stays_below_its_bound_and_keeps_the_recently_used(images: Images) -> None:
    found = Fixture(images, 8)
    for index in range(SLICES):
        found.ctx.run(found.cache.load(0))
        found.ctx.run(found.cache.load(index * SLICE))
        assert found.cache.bytes_used <= found.cache.bytes_max
    assert 0 in found.cache.slices


def test_only_dirty_granules_are_written(images: Images) -> None:
    found = Fixture(images, 8)
    loaded = found.ctx.run(found.cache.load(0))
    loaded.words[64], loaded.words[500] = 7, 8
    found.cache.mark_dirty(loaded, 64)
    found.cache.mark_dirty(loaded, 500)
    captured = found.cache.capture()
    assert [(offset, len(data)) for offset, data in captured.writes] == [(512, 512), (3584, 512)]
    assert not found.cache.is_dirty
    found.cache.settle(captured, failed=True)
    assert found.cache.is_dirty


def test_slice_changed_during_write_back_is_dirty_again(images: Images) -> None:
    found = Fixture(images, 8)
    loaded = found.ctx.run(found.cache.load(0))
    loaded.words[0] = 1
    found.cache.mark_dirty(loaded, 0)
    captured = found.cache.capture()
    loaded.words[0] = 2
    found.cache.mark_dirty(loaded, 0)
    found.cache.settle(captured, failed=False)
    assert captured.writes[0][1][:8] == (1).to_bytes(8, "big")
    assert found.cache.capture().writes[0][1][:8] == (2).to_bytes(8, "big")


def test_dirty_slices_are_written_back_before_they_are_evicted(images: Images, seed: int) -> None:
    found = Fixture(images, 8)
    rng = random.Random(seed)
    model: dict[int, int] = {}
    for _ in range(500):
        index = rng.randrange(SLICES)
        loaded = found.ctx.run(found.cache.load(index * SLICE))
        assert loaded.words[5] == model.get(index, (index * SLICE // 8 + 5) * 3)
        model[index] = loaded.words[5] = rng.randrange(2**64)
        found.cache.mark_dirty(loaded, 5)
        assert found.cache.bytes_used <= found.cache.bytes_max
    assert found.writes_back > 10


def test_neighbours_are_merged_up_to_a_bound() -> None:
    writes = [(offset, bytes(SLICE)) for offset in range(0, 2 * MERGE_MAX, SLICE)]
    random.Random(1).shuffle(writes)
    assert [(offset, len(data)) for offset, data in merge(writes)] == [
        (0, MERGE_MAX), (MERGE_MAX, MERGE_MAX),
    ]  # fmt: skip
    assert merge([(0, b"a"), (2, b"b")]) == [(0, b"a"), (2, b"b")]


def test_slice_dropped_while_it_is_read_is_read_again(images: Images) -> None:
    found = Fixture(images, 8)
    found.image.latency_ns = lambda kind, offset, length: 1000
    task = found.ctx.spawn(found.cache.load(0))
    found.cache.drop(0, SLICE)  # the read is under way
    while not task.done():
        found.ctx.poll(blocking=True)
    assert task.result().words[1] == 3
    assert len(found.image.operations("read")) == 2


def reads(found: Fixture) -> list[tuple[int, int]]:
    """What was read of the file, in slices: first, how many."""
    return [
        (operation.offset // SLICE, operation.length // SLICE)
        for operation in found.image.operations("read")
    ]


def test_miss_loads_what_is_around_it_while_there_is_room(images: Images) -> None:
    found = Fixture(images, 12, ahead_bytes=8 * SLICE)
    for index in (3, 0, 7, 9):
        loaded = found.ctx.run(found.cache.load(index * SLICE))
        assert loaded.words[1] == (index * SLICE // 8 + 1) * 3
    assert reads(found) == [(0, 8), (9, 4)], "the whole range, then what the bound left room for"
    found.ctx.run(found.cache.load(20 * SLICE))
    assert reads(found)[2:] == [(20, 1)]
    assert found.cache.bytes_used <= found.cache.bytes_max


def test_slices_that_are_here_are_not_loaded_again(images: Images) -> None:
    found = Fixture(images, 32, ahead_bytes=8 * SLICE)
    changed = found.ctx.run(found.cache.insert_zeroed(2 * SLICE))
    changed.words[0] = 77
    found.cache.mark_dirty(changed, 0)
    found.ctx.run(found.cache.load(4 * SLICE))
    assert reads(found) == [(3, 5)]
    assert found.ctx.run(found.cache.load(2 * SLICE)).words[0] == 77


def test_slice_dropped_while_it_is_read_ahead_is_not_kept(images: Images) -> None:
    found = Fixture(images, 32, ahead_bytes=8 * SLICE)

    def drop(kind: str, offset: int, length: int) -> int:
        found.cache.drop(5 * SLICE, SLICE)
        return 0

    found.image.fault = drop
    found.ctx.run(found.cache.load(SLICE))
    found.image.fault = None
    assert 5 * SLICE not in found.cache.slices
    assert 6 * SLICE in found.cache.slices


def test_two_that_want_neighbours_wait_for_one_read(images: Images) -> None:
    found = Fixture(images, 32, ahead_bytes=8 * SLICE)
    found.image.latency_ns = lambda kind, offset, length: 1000
    one, two = found.ctx.run(gather(found.cache.load(0), found.cache.load(SLICE)))
    assert (one.words[0], two.words[0]) == (0, SLICE // 8 * 3)
    assert reads(found) == [(0, 8)]
