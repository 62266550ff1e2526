# SPDX-License-Identifier: Apache-2.0
"""The direct map's rules, one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from blockemu.drivers import direct_map as direct_map_module
from blockemu.drivers.direct_map import WHOLE_DEVICE_BITS, DirectMap
from blockemu.loop.aio_context import AioContext

PAGE = 65536


def make_map(*, page_bits: int = 16, length: int = 1 << 30, alignment: int = 1) -> DirectMap:
    file: Any = SimpleNamespace(request_alignment=alignment)
    return DirectMap(file, page_bits=page_bits, length=length)


def test_empty_map_misses() -> None:
    assert make_map().lookup_read(0, 512) == -1
    assert make_map().lookup_write(0, 512) == -1


def test_published_page_hits_at_its_host_offset() -> None:
    direct_map = make_map()
    direct_map.publish(3 * PAGE, 10 * PAGE, writable=True)
    assert direct_map.lookup_read(3 * PAGE + 100, 512) == 10 * PAGE + 100
    assert direct_map.lookup_write(3 * PAGE + 100, 512) == 10 * PAGE + 100
    assert direct_map.lookup_read(4 * PAGE, 512) == -1


def test_page_at_host_offset_zero_is_a_hit() -> None:
    direct_map = make_map()
    direct_map.publish(0, 0, writable=False)
    assert direct_map.lookup_read(7, 1) == 7


def test_read_only_page_misses_for_writes() -> None:
    direct_map = make_map()
    direct_map.publish(0, PAGE, writable=False)
    assert direct_map.lookup_read(0, 512) == PAGE
    assert direct_map.lookup_write(0, 512) == -1


def test_range_over_pages_hits_only_where_the_host_is_contiguous() -> None:
    direct_map = make_map()
    direct_map.publish(0, 5 * PAGE, writable=True)
    direct_map.publish(PAGE, 6 * PAGE, writable=False)
    direct_map.publish(2 * PAGE, 9 * PAGE, writable=True)
    assert direct_map.lookup_read(0, 2 * PAGE) == 5 * PAGE
    assert direct_map.lookup_write(0, 2 * PAGE) == -1
    assert direct_map.lookup_read(0, 2 * PAGE + 1) == -1


def test_unaligned_range_and_range_past_the_end_miss() -> None:
    direct_map = make_map(page_bits=WHOLE_DEVICE_BITS, length=10_000, alignment=512)
    direct_map.publish(0, 0, writable=True)
    assert direct_map.lookup_read(512, 512) == 512
    assert direct_map.lookup_read(100, 512) == -1
    assert direct_map.lookup_read(512, 100) == -1
    assert direct_map.lookup_read(9728, 512) == -1  # the last, partial block


def test_invalidate_withdraws_the_pages_that_it_touches(ctx: AioContext) -> None:
    direct_map = make_map()
    for page in range(4):
        direct_map.publish(page * PAGE, page * PAGE, writable=True)
    ctx.run(direct_map.invalidate(PAGE + 1, PAGE))
    assert [direct_map.lookup_read(page * PAGE, 512) for page in range(4)] == [
        0,
        -1,
        -1,
        3 * PAGE,
    ]


def test_invalidate_of_a_huge_range_withdraws_all(ctx: AioContext) -> None:
    direct_map = make_map()
    direct_map.publish(PAGE, PAGE, writable=True)
    ctx.run(direct_map.invalidate(0, 2**62))
    assert len(direct_map) == 0


def test_invalidate_waits_for_older_pins_and_not_for_newer(ctx: AioContext) -> None:
    direct_map = make_map()
    direct_map.publish(0, 0, writable=True)
    old = direct_map.pin()
    task = ctx.spawn(direct_map.invalidate(0, PAGE))
    new = direct_map.pin()
    assert not task.done()
    direct_map.unpin(old)
    ctx.poll(blocking=False)
    assert task.done()
    direct_map.unpin(new)


def test_second_invalidate_waits_for_pins_of_the_first(ctx: AioContext) -> None:
    direct_map = make_map()
    pin = direct_map.pin()
    first = ctx.spawn(direct_map.invalidate(0, PAGE))
    second = ctx.spawn(direct_map.invalidate(PAGE, PAGE))
    assert not first.done()
    assert not second.done()
    direct_map.unpin(pin)
    ctx.poll(blocking=False)
    assert first.done()
    assert second.done()


def test_held_map_misses_until_the_last_release() -> None:
    direct_map = make_map()
    direct_map.publish(0, 0, writable=True)
    direct_map.hold()
    direct_map.hold()
    direct_map.release()
    direct_map.publish(PAGE, PAGE, writable=True)
    assert direct_map.lookup_read(0, 512) == -1
    direct_map.release()
    assert direct_map.lookup_read(0, 512) == 0
    assert direct_map.lookup_read(PAGE, 512) == PAGE


def test_full_map_is_emptied_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_map_module, "PAGES_MAX", 4)
    direct_map = make_map()
    for page in range(5):
        direct_map.publish(page * PAGE, page * PAGE, writable=True)
    assert len(direct_map) == 1
    assert direct_map.lookup_read(4 * PAGE, 512) == 4 * PAGE


def test_closed_map_misses_for_ever_and_waits_for_pins(ctx: AioContext) -> None:
    direct_map = make_map()
    direct_map.publish(0, 0, writable=True)
    pin = direct_map.pin()
    task = ctx.spawn(direct_map.close())
    ctx.poll(blocking=False)
    assert not task.done()
    direct_map.unpin(pin)
    ctx.poll(blocking=False)
    assert task.done()
    direct_map.hold()
    direct_map.release()
    direct_map.publish(0, PAGE, writable=True)
    assert direct_map.lookup_read(0, 512) == -1


def test_publishing_over_a_full_map_what_it_knows_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct_map_module, "PAGES_MAX", 2)
    direct_map = make_map()
    for page in (0, 1, 1):
        direct_map.publish(page * PAGE, page * PAGE, writable=True)
    assert len(direct_map) == 2
