# SPDX-License-Identifier: Apache-2.0
"""The counts of a check, against a Counter; refcount blocks as bytes, against RefcountWidth."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.disk_refcounts import BlockWidth
from blockemu.drivers.qcow2.refcount_width import RefcountWidth
from blockemu.drivers.qcow2.reference_counts import LARGE, Allowance, ReferenceCounts
from blockemu.drivers.qcow2.table_cache import words_from

RUNS = st.lists(
    st.tuples(st.integers(0, 70), st.integers(1, 40), st.sampled_from([1, 1, 2, 100, 254, 300])),
    max_size=20,
)


@pytest.mark.parametrize("count_max", [1, 3, 15, 255, 65535])
@given(runs=RUNS)
def test_counts_agree_with_a_counter(count_max: int, runs: list[tuple[int, int, int]]) -> None:
    counts = ReferenceCounts(Allowance("image"), count_max=count_max, page_bits=4)
    model: Counter[int] = Counter()
    for first, clusters, weight in runs:
        refused = 0
        for cluster in range(first, first + clusters):
            wanted = model[cluster] + weight
            model[cluster] = min(wanted, count_max)
            refused += wanted - model[cluster]
        assert counts.add(first, clusters, weight) == refused
    assert [counts.get(cluster) for cluster in range(130)] == [model[at] for at in range(130)]
    assert counts.clipped(3, 100) == bytes(min(model[at], LARGE) for at in range(3, 103))
    assert list(counts.counted()) == sorted((at, count) for at, count in model.items() if count)
    assert counts.end == max((first + clusters for first, clusters, _ in runs), default=0)


def test_pages_exist_only_where_something_is_counted() -> None:
    counts = ReferenceCounts(Allowance("image"), count_max=1)
    counts.add(1 << 50, 1)
    assert counts.next_page(0) == 1 << 50
    assert counts.next_page((1 << 50) + 5) == (1 << 50) + 5
    assert counts.next_page(1 << 51) is None
    assert counts.has_page(1 << 50, 1)
    assert not counts.has_page(0, 1 << 50)


def test_counts_that_take_too_much_memory_are_refused_by_name() -> None:
    counts = ReferenceCounts(Allowance("image", 2 << 20), count_max=1)
    counts.add(0, 32 << 16)
    with pytest.raises(ImageError, match="image: checking it takes more than 2 MiB"):
        counts.add(32 << 16, 1)


@pytest.mark.parametrize("order", range(7))
@given(data=st.data())
def test_blocks_are_clipped_and_encoded_as_the_format_says(order: int, data: st.DataObject) -> None:
    block = bytearray(
        data.draw(st.binary(min_size=64, max_size=64) | st.just(bytes(64)) | st.just(b"\0\1" * 32))
    )
    width, known = BlockWidth(order), RefcountWidth(order)
    words = words_from(known.typecode, block)
    values = [known.get(words, index) for index in range(known.entries(64))]
    clipped = width.clip(bytes(block))
    assert list(clipped) == [min(value, LARGE) for value in values]
    assert [width.get(block, index) for index in range(len(values))] == values
    encoded = width.encode(clipped)
    for index, value in enumerate(values):
        if value >= LARGE:
            width.set(encoded, index, value)
    assert encoded == block
