# SPDX-License-Identifier: Apache-2.0
"""Isolation and IOThreads: the arithmetic, the verdicts, and what the options choose."""

from __future__ import annotations

import pytest

from benchmarks import allocation, img_tools, iothreads, isolation_report, l2_cache
from benchmarks.contestants import OURS
from benchmarks.iothreads import BOTH, FIRST, SECOND, TWO_DAEMONS
from benchmarks.isolation import TURNS
from benchmarks.isolation_report import BUSY, BUSY_BESIDE, IDLE, QMP, QMP_BESIDE, QSD
from benchmarks.options import (
    PARTS,
    choose_parts,
    choose_targets,
    parse_arguments,
    runs_everything,
)
from benchmarks.report import Page, markdown_page, text_section
from benchmarks.targets import NATIVE_TARGETS, PYTHON_TARGETS


def latency(server: str, phase: str, p99_us: float, turn: int = 0) -> isolation_report.Sample:
    """One turn; only p99 matters."""
    return isolation_report.Sample(server, phase, turn, 10_000, 60, 50, p99_us, 0)


def flood(
    phase: str, iops: float, *, server_us: float = 4, client_us: float = 4
) -> iothreads.Sample:
    """One phase of round 0."""
    return iothreads.Sample(phase, 0, iops, server_us, client_us)


def test_isolation_compares_with_idle_and_with_qsd() -> None:
    samples = [latency(OURS, IDLE, 100), latency(OURS, QMP, 190), latency(OURS, BUSY, 210)]
    samples += [latency(QSD, IDLE, 100), latency(QSD, QMP, 160)]
    verdicts = isolation_report.judge_isolation(samples)
    assert [verdict.reached for verdict in verdicts] == [True, True, False, False]
    assert len(verdicts) == isolation_report.VERDICTS


def test_isolation_ratio_needs_an_idle_turn_in_the_same_round() -> None:
    samples = [latency(OURS, IDLE, 100, turn=0), latency(OURS, QMP, 190, turn=1)]
    assert isolation_report.judge_isolation(samples) == []


def test_isolation_table_shows_what_remains_over_the_control() -> None:
    samples = [latency(OURS, IDLE, 100), latency(OURS, BUSY, 300), latency(OURS, BUSY_BESIDE, 200)]
    text = text_section(isolation_report.isolation_section(samples))
    assert "3.00x (3.00-3.00)" in text, "over idle"
    assert "1.50x (1.50-1.50)" in text, "over the control"


def test_every_load_of_isolation_has_its_control_and_its_idle_turn() -> None:
    for server, phase in TURNS:
        assert (server, IDLE) in TURNS
        if phase in (QMP, BUSY):
            assert (server, {QMP: QMP_BESIDE, BUSY: BUSY_BESIDE}[phase]) in TURNS


def test_cores_limit_is_their_time_over_the_price_of_a_request() -> None:
    found = {phase: flood(phase, 200_000) for phase in (FIRST, SECOND)}
    assert iothreads.cores_limit(found, cores=2) == 250_000
    assert iothreads.sum_alone(found) == 400_000


@pytest.mark.parametrize(
    ("iops", "server_us", "two_daemons", "reached"),
    [
        (230_000, 4, 250_000, [True, True]),
        (220_000, 4, 250_000, [False, True]),
        (230_000, 4.5, 250_000, [True, False]),
        (359_000, 4, 500_000, [False, True]),  # the sum of each is 400,000
    ],
)
def test_two_iothreads_are_judged_by_speed_and_price(
    iops: float, server_us: float, two_daemons: float, reached: list[bool]
) -> None:
    samples = [flood(FIRST, 200_000), flood(SECOND, 200_000), flood(TWO_DAEMONS, two_daemons)]
    samples.append(flood(BOTH, iops, server_us=server_us))
    verdicts = iothreads.judge_iothreads(samples)
    assert [verdict.reached for verdict in verdicts] == reached
    assert len(verdicts) == iothreads.VERDICTS


def test_two_iothreads_need_a_whole_round() -> None:
    assert iothreads.judge_iothreads([flood(BOTH, 1.0)]) == []


def test_sections_are_on_the_report_page() -> None:
    section = iothreads.iothreads_section(
        [flood(phase, 200_000) for phase in iothreads.PHASES], cores=2
    )
    page = markdown_page(
        Page(
            cases=[],
            sections=[section],
            verdicts=section.verdicts,
            machine={},
            peak_rss_kib={},
            rounds=1,
            runtime_s=1.0,
            python_only=True,
        )
    )
    assert "## Two IOThreads at once" in page
    assert "| both at once | 200,000 | 4.0 | 4.0 | 0.50x (0.50-0.50) | 0.80x (0.80-0.80) |" in page
    assert "BLOCKEMU_NATIVE=0" in page


def test_run_without_filters_is_everything() -> None:
    options = parse_arguments([])
    assert runs_everything(options)
    assert not runs_everything(parse_arguments(["--setting", "raw-*"]))
    assert choose_parts(options) == PARTS
    assert choose_targets(options) is NATIVE_TARGETS


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--only", "isolation"], ["isolation"]),
        (["--only", "iothreads", "--only", "isolation"], ["isolation", "iothreads"]),
        (["--setting", "raw-*"], ["servers"]),
        (["--python-only"], ["servers"]),
        (["--python-only", "--only", "isolation"], ["isolation"]),
    ],
)
def test_options_choose_the_parts(words: list[str], parts: list[str]) -> None:
    assert list(choose_parts(parse_arguments(words))) == parts


def test_python_only_has_targets_of_its_own() -> None:
    assert choose_targets(parse_arguments(["--python-only"])) is PYTHON_TARGETS


def grown(server: str, iops: float, turn: int = 0) -> allocation.Sample:
    """One measurement of allocating writes."""
    return allocation.Sample("qcow2-direct", "randwrite-4k-d16", server, turn, iops, 50, 1.5)


def test_allocating_writes_are_judged_by_the_better_of_the_others_in_each_round() -> None:
    samples = [grown(OURS, 100), grown("qsd-threads", 50), grown("qsd-io_uring", 80)]
    samples += [grown(OURS, 100, 1), grown("qsd-threads", 160, 1), grown("qsd-io_uring", 20, 1)]
    assert allocation.ratios(samples) == [1.25, 0.625]
    assert allocation.ratios(samples, "qsd-io_uring") == [1.25, 5]
    [verdict] = allocation.judge_allocation(samples)
    assert not verdict.reached


def test_allocating_writes_need_a_peer_in_the_round() -> None:
    assert allocation.judge_allocation([grown(OURS, 1), grown("qsd-threads", 1, turn=1)]) == []


def test_allocating_writes_table_shows_host_bytes() -> None:
    text = text_section(allocation.allocation_section([grown(OURS, 100), grown("qsd-native", 90)]))
    assert "1.50" in text
    assert "1.11x" in text


def img(command: str, program: str, wall_ms: float, turn: int = 0) -> img_tools.Sample:
    """One run of one command."""
    return img_tools.Sample(command, program, turn, wall_ms, wall_ms, 20.0)


def test_img_commands_are_judged_round_by_round() -> None:
    check, theirs = img_tools.CHECK, img_tools.THEIRS
    samples = [img(check, OURS, 30), img(check, theirs, 10)]
    samples += [img(check, OURS, 80, 1), img(check, theirs, 20, 1), img(check, OURS, 9, 2)]
    assert img_tools.ratios(samples, check) == [3.0, 4.0]
    [verdict] = img_tools.judge_img(samples)
    assert not verdict.reached
    assert "3.50x" in text_section(img_tools.img_section(samples))


def test_img_opening_is_judged_without_the_start_of_python() -> None:
    opening = img_tools.OPENS[0]
    start = img(img_tools.START, img_tools.FLOOR, 40)
    time, memory = img_tools.judge_img([img(opening, OURS, 120), start])
    assert (time.found, time.reached, memory.reached) == ("80 ms", True, True)
    time, _ = img_tools.judge_img([img(opening, OURS, 160), start])
    assert not time.reached


def found(server: str, iops: float, turn: int = 0) -> l2_cache.Sample:
    """One measurement of reads all over a large image."""
    return l2_cache.Sample("1 MiB", server, turn, iops, 20)


def test_finding_clusters_costs_what_the_best_peer_of_the_round_does_not() -> None:
    samples = [found(OURS, 100), found("qsd-threads", 110), found("qsd-io_uring", 90)]
    samples += [found(OURS, 100, 1), found("qsd-threads", 80, 1)]
    assert l2_cache.costs(samples, "1 MiB") == [1.1, 0.8]
    assert l2_cache.costs(samples, "128 MiB") == []
    [verdict] = l2_cache.judge_l2_cache(samples)
    assert verdict.reached
    assert "0.90x" in text_section(l2_cache.l2_cache_section([found(OURS, 90), found("qsd", 100)]))
