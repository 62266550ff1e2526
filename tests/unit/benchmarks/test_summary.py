# SPDX-License-Identifier: Apache-2.0
"""The benchmark's arithmetic: ratios within a round, medians over rounds, verdicts, pages."""

from __future__ import annotations

import os

import pytest

from benchmarks.contestants import CONTESTANTS, NBDKIT, OURS, ROOFLINE
from benchmarks.cpu_clock import process_cpu_ns
from benchmarks.measure import Sample, rotated
from benchmarks.report import Page, markdown_page, text_table, text_verdicts
from benchmarks.summary import PEERS_BEST, QSD_BEST, Spread, summarise
from benchmarks.targets import NATIVE_TARGETS, PYTHON_TARGETS, Metric, Target, judge, unmeasured
from benchmarks.workloads import QUICK_WORKLOADS, SETTINGS, WORKLOADS

SETTING, WORKLOAD = "raw-cache", "randread-4k-d32"


def sample(
    server: str, turn: int, iops: float, *, cpu_us: float = 5.0, mean_us: float = 110.0
) -> Sample:
    """One measurement; most of it doesn't matter here."""
    return Sample(
        setting=SETTING,
        workload=WORKLOAD,
        server=server,
        round=turn,
        requests=1000,
        iops=iops,
        mb_per_s=iops / 250,
        cpu_us_per_request=cpu_us,
        mean_us=mean_us,
        p50_us=100.0,
        p99_us=300.0,
    )


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


def test_best_is_the_fastest_peer_and_not_the_roofline() -> None:
    speeds = {OURS: 200, "qsd-threads": 50, NBDKIT: 100, ROOFLINE: 400}
    [case] = summarise([sample(server, 0, iops) for server, iops in speeds.items()])
    assert case.ratios[PEERS_BEST] == Spread(2.0, 2.0, 2.0)
    assert case.ratios[ROOFLINE] == Spread(0.5, 0.5, 0.5)


def test_best_of_both_is_unknown_when_one_is_missing() -> None:
    [case] = summarise([sample(OURS, 0, 200), sample(NBDKIT, 0, 100)])
    assert PEERS_BEST not in case.ratios


def test_cheaper_mode_is_the_better_one_for_costs() -> None:
    samples = [
        sample(OURS, 0, 100, cpu_us=3, mean_us=60),
        sample("qsd-threads", 0, 100, cpu_us=12, mean_us=120),
        sample("qsd-io_uring", 0, 100, cpu_us=6, mean_us=240),
    ]
    [case] = summarise(samples)
    assert case.cpu_ratios[QSD_BEST].median == 0.5
    assert case.mean_ratios[QSD_BEST].median == 0.5


@pytest.mark.parametrize("metric", [Metric.CPU, Metric.MEAN])
@pytest.mark.parametrize(("cost", "reached"), [(6.0, True), (6.1, False)])
def test_cost_target_is_an_upper_bound(metric: Metric, cost: float, reached: bool) -> None:
    ours = sample(OURS, 0, 100, cpu_us=cost, mean_us=cost)
    theirs = sample(NBDKIT, 0, 100, cpu_us=10, mean_us=10)
    target = Target(SETTING, WORKLOAD, 0.6, NBDKIT, metric)
    [verdict] = judge(summarise([ours, theirs]), {}, [target])
    assert verdict.reached is reached
    assert verdict.wanted == "<= 0.60x"


def test_target_whose_peer_is_missing_is_named() -> None:
    cases = summarise([sample(OURS, 0, 100), sample("qsd-threads", 0, 10)])
    targets = [Target(SETTING, WORKLOAD, 3.0), Target(SETTING, WORKLOAD, 1.3, NBDKIT)]
    assert unmeasured(cases, targets) == [f"{SETTING} {WORKLOAD} / nbdkit"]


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
    [verdict] = judge(cases, {}, PYTHON_TARGETS)
    assert verdict.reached is reached
    assert ("MISSED" in text_verdicts([verdict])) is not reached


@pytest.mark.parametrize(("kib", "reached"), [(200 * 1024, False), (199 * 1024, True)])
def test_memory_target_is_under_200_mib(kib: int, reached: bool) -> None:
    [verdict] = judge([], {SETTING: {OURS: kib, "nbdkit": 1 << 30}})
    assert verdict.reached is reached


def test_every_target_names_a_setting_and_a_workload_that_exist() -> None:
    known = {(setting.name, workload.name) for setting in SETTINGS for workload in WORKLOADS}
    targets = (*NATIVE_TARGETS, *PYTHON_TARGETS)
    assert {(target.setting, target.workload) for target in targets} <= known
    assert {target.workload for target in targets} <= set(QUICK_WORKLOADS)


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
    assert "3.00x (2.00-6.00)" in text_table(cases[0])
    page = markdown_page(
        Page(
            cases=cases,
            sections=[],
            verdicts=judge(cases, {}),
            machine={"cpu": "a fast one"},
            peak_rss_kib={SETTING: {OURS: 30 * 1024}},
            rounds=3,
            runtime_s=1.5,
        )
    )
    assert "| qsd-threads | 75 | 5-100 |" in page
    assert "| raw-cache | 30 |" in page
    assert "3 rounds of 1.5 s" in page
