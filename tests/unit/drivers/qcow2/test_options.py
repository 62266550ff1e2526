# SPDX-License-Identifier: Apache-2.0
"""Cache sizes: defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.layout import Layout
from blockemu.drivers.qcow2.options import take_options
from tests.unit.drivers.qcow2.support import KIB, MIB, Images

LAYOUT = Layout(16, 4, 3)


@pytest.mark.parametrize(
    ("size", "l2_bytes"), [(MIB, MIB), (8 << 30, MIB), (64 << 30, 8 * MIB), (16 << 40, 32 * MIB)]
)
def test_default_l2_cache_maps_the_disk_within_bounds(size: int, l2_bytes: int) -> None:
    found = take_options("image", {}, LAYOUT, size)
    assert (found.l2_cache_bytes, found.refcount_cache_bytes) == (l2_bytes, 256 * KIB)


def test_total_is_split() -> None:
    found = take_options("image", {"cache-size": 4 * MIB}, LAYOUT, MIB)
    assert found.l2_cache_bytes + found.refcount_cache_bytes == 4 * MIB
    found = take_options("image", {"cache-size": "4M", "l2-cache-size": "1M"}, LAYOUT, MIB)
    assert (found.l2_cache_bytes, found.refcount_cache_bytes) == (MIB, 3 * MIB)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache-size": MIB, "l2-cache-size": 2 * MIB}, "larger than cache-size"),
        ({"cache-size": 1, "l2-cache-size": 1, "refcount-cache-size": 1}, "two of them"),
        ({"l2-cache-entry-size": 1000}, "power of two"),
        ({"l2-cache-size": "much"}, "not a size"),
    ],
)
def test_impossible_cache_sizes_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        take_options("image", options, LAYOUT, MIB)


def test_unknown_option_is_refused_by_name(images: Images) -> None:
    images.create("image", MIB)
    with pytest.raises(ImageError, match="no option 'l3-cache-size'"):
        images.open("image", l3_cache_size=1)
