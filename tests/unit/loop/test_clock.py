# SPDX-License-Identifier: Apache-2.0
"""Clocks stand still, move and jump as told, and a context has only the one it was given."""

from __future__ import annotations

import time

import pytest

from blockemu.loop import AioContext, ClockType, HostClock, MonotonicClock, VirtualClock
from blockemu.loop.clock import local_time_text


def test_virtual_clock_starts_at_zero_and_moves_only_when_told() -> None:
    clock = VirtualClock()
    assert clock.now_ns() == 0
    clock.advance_ns(7)
    clock.advance_ns(0)
    assert clock.now_ns() == 7


def test_virtual_clock_advance_refuses_to_go_back() -> None:
    with pytest.raises(ValueError, match="-1 ns"):
        VirtualClock().advance_ns(-1)


def test_virtual_clock_set_jumps_both_ways() -> None:
    clock = VirtualClock()
    clock.set_ns(100)
    clock.set_ns(3)
    assert clock.now_ns() == 3


def test_monotonic_clock_never_goes_back() -> None:
    clock = MonotonicClock()
    assert clock.now_ns() <= clock.now_ns()


def test_host_clock_counts_from_1970() -> None:
    assert HostClock().now_ns() > 1_600_000_000 * 10**9


def test_context_with_a_handed_in_clock_has_no_other_time(
    ctx: AioContext, clock: VirtualClock
) -> None:
    clock.set_ns(55)
    assert [ctx.now_ns(kind) for kind in ClockType] == [55, 55, 55]


def test_context_without_a_clock_tells_the_host_time() -> None:
    ctx = AioContext()
    assert abs(ctx.now_ns(ClockType.HOST) - HostClock().now_ns()) < 10**10
    ctx.close()


def test_local_time_is_of_the_machines_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        monkeypatch.setenv("TZ", "XYZ-2")  # two hours ahead
        time.tzset()
        assert local_time_text(1_709_243_999) == "2024-02-29 23:59:59"
    finally:
        monkeypatch.undo()
        time.tzset()
