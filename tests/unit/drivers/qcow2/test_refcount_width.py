# SPDX-License-Identifier: Apache-2.0
"""Every width of reference counts, against a list."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.qcow2.refcount_width import RefcountWidth

SLICE = 64
ORDERS = range(7)


def words_of(width: RefcountWidth) -> array[int]:
    return array(width.typecode, bytes(SLICE))


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
def test_set_and_get_touch_only_their_entry(order: int, data: st.DataObject) -> None:
    width = RefcountWidth(order)
    words, model = words_of(width), [0] * width.entries(SLICE)
    entries = st.integers(0, len(model) - 1)
    for index, value in data.draw(
        st.lists(st.tuples(entries, st.integers(0, (1 << (1 << order)) - 1)), max_size=20)
    ):
        width.set(words, index, value)
        model[index] = value
    assert [width.get(words, index) for index in range(len(model))] == model


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
def test_runs_and_searches_agree_with_a_list(order: int, data: st.DataObject) -> None:
    width = RefcountWidth(order)
    words, model = words_of(width), [0] * width.entries(SLICE)
    bounds = st.tuples(st.integers(0, len(model)), st.integers(0, len(model))).map(sorted)
    for start, stop in data.draw(st.lists(bounds, max_size=5)):
        if start < stop:
            width.set_ones(words, start, stop - start)
            model[start:stop] = [1] * (stop - start)
    assert [width.get(words, index) for index in range(len(model))] == model
    start, stop = data.draw(bounds)
    free = next((index for index in range(start, stop) if not model[index]), -1)
    assert width.find_free(words, start, stop) == free
    assert width.count_used(words, stop) == sum(bool(count) for count in model[:stop])
    used = next((index for index in range(start, stop) if model[index]), stop)
    assert width.free_run(words, start, stop) == used - start


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
def test_common_value_is_found_and_filled_in(order: int, data: st.DataObject) -> None:
    width = RefcountWidth(order)
    words = words_of(width)
    entries = width.entries(SLICE)
    first = data.draw(st.integers(0, entries - 1))
    stop = data.draw(st.integers(first + 1, entries))
    other = data.draw(st.integers(0, entries - 1))
    assert width.common(words, first, stop) == (0 if order >= 3 else None)
    width.set(words, other, 1)
    alone = other == first and stop == first + 1
    if order < 3 or (first <= other < stop and not alone):
        assert width.common(words, first, stop) is None
        return
    assert width.common(words, first, stop) == int(alone)
    width.fill(words, first, stop, 200)
    found = [width.get(words, index) for index in range(entries)]
    assert found[first:stop] == [200] * (stop - first)
    assert sum(found) - 200 * (stop - first) == (0 if first <= other < stop else 1)


def test_bit_0_is_the_least_significant_of_its_byte() -> None:
    width = RefcountWidth(0)
    words = words_of(width)
    width.set(words, 9, 1)
    assert bytes(words[:2]) == b"\x00\x02"
