# SPDX-License-Identifier: Apache-2.0
"""The benchmark's arithmetic: ratios within a round, medians over rounds, verdicts, pages."""

from __future__ import annotations

import os

import pytest

from benchmarks.contestants import CONTESTANTS, OURS
from benchmarks.cpu_clock import process_cpu_ns
from benchmarks.measure import Sample, rotated
from benchmarks.report import markdown_page, text_table, text_verdicts
from benchmarks.summary import QSD_BEST, Spread, summarise
from benchmarks.targets import TARGETS, judge
from benchmarks.workloads import SETTINGS, WORKLOADS

SETTING, WORKLOAD = "raw-cache", "randread-4k-d32"


def sample(server: str, turn: int, iops: float) -> Sample:
    """One measurement; only the speed matters here."""
    return Sample(SETTING, WORKLOAD, server, turn, 1000, iops, iops / 250, 5.0, 100.0, 300.0)


def three_rounds() -> list[Sample]:
    """The machine gets slower from round to round; the ratios stay."""
    speeds = {OURS: (300, 150, 30), "qsd-threads": (100, 75, 5), "qsd-io_uring": (150, 50, 10)}
    return [
        sample(server, turn, iops)
        for server, rounds in speeds.items()
        for turn, iops in enumerate(rounds)
    ]


def test_ratio_is_formed_within_a_round() -> None:
    [case] = summarise(three_rounds())
    assert case.ratios["qsd-threads"] == Spread(3.0, 2.0, 6.0)
    assert case.ratios["qsd-io_uring"] == Spread(3.0, 2.0, 3.0)


def test_qsd_is_the_faster_mode_of_each_round() -> None:
    [case] = summarise(three_rounds())
    assert case.ratios[QSD_BEST] == Spread(2.0, 2.0, 3.0)


def test_case_without_us_has_no_ratios() -> None:
    [case] = summarise([one for one in three_rounds() if one.server != OURS])
    assert case.ratios == {}


def test_round_that_a_server_missed_gives_it_no_ratio() -> None:
    samples = [one for one in three_rounds() if (one.server, one.round) != ("qsd-threads", 2)]
    [case] = summarise(samples)
    assert case.ratios["qsd-threads"] == Spread(2.5, 2.0, 3.0)


@pytest.mark.parametrize(("ours", "reached"), [(149, False), (150, True)])
def test_target_is_reached_at_its_ratio(ours: float, reached: bool) -> None:
    cases = summarise([sample(OURS, 0, ours), sample("qsd-threads", 0, 100)])
    [verdict] = judge(cases, {})
    assert verdict.reached is reached
    assert ("MISSED" in text_verdicts([verdict])) is not reached


@pytest.mark.parametrize(("kib", "reached"), [(200 * 1024, False), (199 * 1024, True)])
def test_memory_target_is_under_200_mib(kib: int, reached: bool) -> None:
    [verdict] = judge([], {SETTING: {OURS: kib, "nbdkit": 1 << 30}})
    assert verdict.reached is reached


def test_every_target_names_a_setting_and_a_workload_that_exist() -> None:
    known = {(setting.name, workload.name) for setting in SETTINGS for workload in WORKLOADS}
    assert {(target.setting, target.workload) for target in TARGETS} <= known


def test_every_server_takes_part_somewhere() -> None:
    for contestant in CONTESTANTS:
        assert any(contestant.takes_part(setting) for setting in SETTINGS), contestant.name


def test_order_rotates_so_that_everybody_goes_first() -> None:
    orders = [rotated(["a", "b", "c"], turn) for turn in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_cpu_clock_of_a_process_counts_its_work() -> None:
    before = process_cpu_ns(os.getpid())
    assert sum(range(100_000)) > 0
    assert process_cpu_ns(os.getpid()) > before


def test_report_shows_each_server_with_its_ratio() -> None:
    cases = summarise(three_rounds())
    assert "3.00 (2.00-6.00)" in text_table(cases[0])
    page = markdown_page(
        cases,
        judge(cases, {}),
        machine={"cpu": "a fast one"},
        peak_rss_kib={SETTING: {OURS: 30 * 1024}},
        rounds=3,
        runtime_s=1.5,
    )
    assert "| qsd-threads | 75 | 5-100 |" in page
    assert "| raw-cache | 30 |" in page
    assert "3 rounds of 1.5 s" in page
