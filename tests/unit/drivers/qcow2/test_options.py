# SPDX-License-Identifier: Apache-2.0
"""Cache sizes: defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from blockemu.drivers.direct_map import PAGE_BYTES
from blockemu.drivers.errors import ImageError
from blockemu.drivers.metadata_budget import MetadataBudget
from blockemu.drivers.qcow2.driver import MAP_PAGES_MIN
from blockemu.drivers.qcow2.layout import Layout
from blockemu.drivers.qcow2.options import L2_CACHE_MIN, take_options
from tests.unit.drivers.qcow2.support import KIB, MIB, Images

LAYOUT = Layout(16, 4, 3)


@pytest.mark.parametrize(
    ("size", "l2_bytes"), [(MIB, MIB), (8 << 30, MIB), (64 << 30, 8 * MIB), (16 << 40, 32 * MIB)]
)
def test_default_l2_cache_maps_the_disk_within_bounds(size: int, l2_bytes: int) -> None:
    found = take_options("image", {}, LAYOUT, size, MetadataBudget().new_share())
    assert (found.l2_cache_bytes, found.refcount_cache_bytes) == (l2_bytes, 256 * KIB)


def test_total_is_split() -> None:
    found = take_options(
        "image", {"cache-size": 4 * MIB}, LAYOUT, MIB, MetadataBudget().new_share()
    )
    assert found.l2_cache_bytes + found.refcount_cache_bytes == 4 * MIB
    found = take_options(
        "image",
        {"cache-size": "4M", "l2-cache-size": "1M"},
        LAYOUT,
        MIB,
        MetadataBudget().new_share(),
    )
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
        take_options("image", options, LAYOUT, MIB, MetadataBudget().new_share())


def test_unknown_option_is_refused_by_name(images: Images) -> None:
    images.create("image", MIB)
    with pytest.raises(ImageError, match="no option 'l3-cache-size'"):
        images.open("image", l3_cache_size=1)


def test_shares_shrink_to_the_least_when_the_budget_is_used_up(images: Images) -> None:
    images.opener.metadata_budget = budget = MetadataBudget(20 * MIB)
    size = 64 << 30
    images.create("first", size)
    images.create("second", size)
    first, second = images.open("first"), images.open("second")
    shares = [disk.driver.metadata_share for disk in (first, second)]
    parts = [{name: part.bytes_max for name, part in share.parts.items()} for share in shares]
    assert parts[0]["l2-cache"] == 8 * MIB
    assert parts[1]["l2-cache"] == L2_CACHE_MIN
    assert parts[1]["direct-map"] == MAP_PAGES_MIN * PAGE_BYTES < parts[0]["direct-map"]
    assert budget.granted_bytes == sum(share.bytes_max for share in shares)
    first.close()
    assert budget.granted_bytes == shares[1].bytes_max
    second.close()
    assert budget.granted_bytes == 0


def test_cache_size_that_was_asked_for_is_granted_and_counted(images: Images) -> None:
    images.opener.metadata_budget = budget = MetadataBudget(MIB)
    images.create("image", 64 << 30)
    disk = images.open("image", l2_cache_size=4 * MIB)
    assert disk.driver.metadata_share.parts["l2-cache"].bytes_max == 4 * MIB
    assert budget.granted_bytes > 4 * MIB
    disk.close()


def test_image_that_is_refused_keeps_no_share(images: Images) -> None:
    images.create("image", MIB)
    with pytest.raises(ImageError):
        images.open("image", l2_cache_entry_size=1000)
    assert images.opener.metadata_budget.granted_bytes == 0


def test_what_is_used_is_measured(images: Images) -> None:
    images.create("image", MIB)
    disk = images.open("image")
    parts = disk.driver.metadata_share.parts
    assert parts["l2-cache"].used() == 0 < parts["root-tables"].used()
    disk.write(0, b"x" * 65536)
    assert parts["l2-cache"].used() == 65536, "a whole table, while there is room"
    assert disk.driver.direct_map() is not None
    disk.read(0, 512)
    assert parts["direct-map"].used() == PAGE_BYTES
    disk.close()
