# SPDX-License-Identifier: Apache-2.0
"""Isolation: what is measured in each phase, and what is made of it. See benchmarks.isolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.contestants import OURS
from benchmarks.section import Section
from benchmarks.summary import Spread
from benchmarks.targets import Verdict

QSD = "qsd"
IDLE = "idle"
QMP, QMP_BESIDE = "commands", "commands to another daemon"
BUSY, BUSY_BESIDE = "Python code", "Python code in another process"
PHASES = (IDLE, QMP, QMP_BESIDE, BUSY, BUSY_BESIDE)
CONTROLS = {QMP: QMP_BESIDE, BUSY: BUSY_BESIDE}

SLOWDOWN_MAX = 2.0
"""p99 under load over p99 with an idle main thread."""

BESIDE_QSD_MAX = 1.3
"""That, over the same of qemu-storage-daemon under control commands."""

VERDICTS = 4
"""As many targets as there are."""

HEADER = ("main thread: server", "p50 us", "p99 us", "p99 / idle", "p99 / control", "commands/s")

INTRODUCTION = """\
A client at depth 1 reads 4 KiB blocks from an export on an IOThread, while the daemon's main thread
is idle, answers control commands at full speed, or runs Python code all the time. "to another
daemon" and "in another process" are the controls: the same load on the machine's cores, but not in
the daemon. "p99 / control" is therefore what remains when the competition for cores is taken away.
Ratios are formed within a round.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One server in one phase in one round."""

    server: str
    phase: str
    round: int
    iops: float
    mean_us: float
    p50_us: float
    p99_us: float
    commands_per_s: float


def ratios(samples: Sequence[Sample], server: str, phase: str, base: str) -> dict[int, float]:
    """p99 in `phase` over p99 in `base`, by round; rounds that have both."""
    found = {
        (sample.phase, sample.round): sample.p99_us for sample in samples if sample.server == server
    }
    return {
        turn: p99 / found[base, turn]
        for (name, turn), p99 in found.items()
        if name == phase and found.get((base, turn), 0) > 0
    }


def _spread(found: dict[int, float]) -> Spread | None:
    return Spread.of(list(found.values())) if found else None


def _row(samples: Sequence[Sample], server: str, phase: str) -> tuple[str, ...]:
    mine = [one for one in samples if (one.server, one.phase) == (server, phase)]
    slower = _spread(ratios(samples, server, phase, IDLE)) if phase != IDLE else None
    control = (
        _spread(ratios(samples, server, phase, CONTROLS[phase])) if phase in CONTROLS else None
    )
    rate = Spread.of([one.commands_per_s for one in mine]).median
    return (
        f"{phase}: {server}",
        f"{Spread.of([one.p50_us for one in mine]).median:,.0f}",
        f"{Spread.of([one.p99_us for one in mine]).median:,.0f}",
        str(slower or ""),
        str(control or ""),
        f"{rate:,.0f}" if rate else "",
    )


def judge_isolation(samples: Sequence[Sample]) -> list[Verdict]:
    """Two targets for each load on our main thread; those that were measured."""
    verdicts = []
    qsd = ratios(samples, QSD, QMP, IDLE)
    for phase in (QMP, BUSY):
        ours = ratios(samples, OURS, phase, IDLE)
        if ours:
            what = f"isolation, {phase}: p99 / idle"
            verdicts.append(Verdict.at_most(what, Spread.of(list(ours.values())), SLOWDOWN_MAX))
        beside = [ours[turn] / qsd[turn] for turn in ours if qsd.get(turn, 0) > 0]
        if beside:
            what = f"isolation, {phase}: that / qsd's under commands"
            verdicts.append(Verdict.at_most(what, Spread.of(beside), BESIDE_QSD_MAX))
    return verdicts


def isolation_section(samples: Sequence[Sample]) -> Section:
    """For the report."""
    present = {(sample.server, sample.phase) for sample in samples}
    return Section(
        name="isolation",
        title="Isolation from the main thread",
        introduction=INTRODUCTION,
        header=HEADER,
        rows=[
            _row(samples, server, phase)
            for phase in PHASES
            for server in (OURS, QSD)
            if (server, phase) in present
        ],
        verdicts=judge_isolation(samples),
        verdicts_wanted=VERDICTS,
        samples=[asdict(sample) for sample in samples],
    )
