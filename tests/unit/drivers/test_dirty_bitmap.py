# SPDX-License-Identifier: Apache-2.0
"""A dirty bitmap: bytes of the disk to bits and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.dirty_bitmap import DirtyBitmap, default_granularity

KIB = 1024


def test_set_marks_every_granule_that_it_touches() -> None:
    bitmap = DirtyBitmap("b", 100 * KIB, granularity=4 * KIB)
    bitmap.set(4 * KIB - 1, 2)
    bitmap.set(99 * KIB, 5 * KIB)
    bitmap.set(200 * KIB, KIB)
    bitmap.set(50 * KIB, 0)
    assert list(bitmap.ranges()) == [(0, 8 * KIB), (96 * KIB, 4 * KIB)]
    assert bitmap.count() == 12 * KIB


def test_ranges_end_with_the_disk() -> None:
    bitmap = DirtyBitmap("b", 5 * KIB, granularity=4 * KIB)
    bitmap.set(0, 5 * KIB)
    assert list(bitmap.ranges()) == [(0, 5 * KIB)]
    bitmap.reset(4 * KIB, KIB)
    assert list(bitmap.ranges()) == [(0, 4 * KIB)]


@pytest.mark.parametrize(("mine", "theirs"), [(4, 4), (1, 16), (16, 1)])
def test_merge_takes_over_what_is_dirty(mine: int, theirs: int) -> None:
    bitmap = DirtyBitmap("b", 100 * KIB, granularity=mine * KIB)
    other = DirtyBitmap("c", 100 * KIB, granularity=theirs * KIB)
    bitmap.set(0, 1)
    other.set(32 * KIB, 1)
    other.set(99 * KIB, 1)
    bitmap.merge(other)
    coarse = max(mine, theirs) * KIB
    last = 99 * KIB // coarse * coarse
    assert list(bitmap.ranges()) == [
        (0, mine * KIB), (32 * KIB, coarse), (last, min(coarse, 100 * KIB - last)),
    ]  # fmt: skip


def test_resize_leaves_what_is_new_clean() -> None:
    bitmap = DirtyBitmap("b", 8 * KIB, granularity=4 * KIB)
    bitmap.set(0, 8 * KIB)
    bitmap.resize(4 * KIB)
    bitmap.resize(20 * KIB)
    assert list(bitmap.ranges()) == [(0, 4 * KIB)]


@pytest.mark.parametrize(
    ("cluster", "wanted"), [(1, 65536), (512, 4096), (16384, 16384), (2 << 20, 65536)]
)
def test_default_granularity_is_the_cluster_within_bounds(cluster: int, wanted: int) -> None:
    assert default_granularity(cluster) == wanted


@given(
    dirty=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 30)), max_size=8),
    length=st.integers(1, 100 * 512),
    offset=st.integers(0, 110 * 512),
    runs_max=st.sampled_from([1, 2, 100]),
)
def test_runs_tell_every_byte(
    dirty: list[tuple[int, int]], length: int, offset: int, runs_max: int
) -> None:
    bitmap = DirtyBitmap("b", length, granularity=512)
    for start, count in dirty:
        bitmap.set(start * 512, count * 512)
    model = [False] * (120 * 512)
    for start, size in bitmap.ranges():
        model[start : start + size] = [True] * size
    told: list[bool] = []
    while len(told) < 9 * 512:
        runs = bitmap.runs(offset + len(told), 9 * 512 - len(told), runs_max=runs_max)
        assert 0 < len(runs) <= runs_max
        for size, state in zip(runs.lengths, runs.states, strict=True):
            told += [bool(state)] * size
    assert told == model[offset : offset + 9 * 512]
