# SPDX-License-Identifier: Apache-2.0
"""A dirty bitmap: bytes of the disk to bits and back."""

from __future__ import annotations

import pytest

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
