# SPDX-License-Identifier: Apache-2.0
"""From samples to medians, spreads and ratios."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contestants import NBDKIT, OURS
from benchmarks.measure import Sample

# The peer "qsd" is, in every round, the better of qemu-storage-daemon's modes that took part, and
# "best" the better of those and nbdkit. The roofline is no peer: it does nobody's job.
QSD_BEST = "qsd"
PEERS_BEST = "best"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"

    def as_json(self) -> dict[str, float]:
        """A plain dictionary."""
        return {"median": self.median, "low": self.low, "high": self.high}


def _spreads_json(spreads: dict[str, Spread]) -> dict[str, dict[str, float]]:
    return {name: spread.as_json() for name, spread in spreads.items()}


@dataclass(frozen=True, slots=True)
class Line:
    """One server in one workload."""

    server: str
    iops: Spread
    mb_per_s: Spread
    cpu_us: Spread
    mean_us: Spread
    p50_us: Spread
    p99_us: Spread


@dataclass(frozen=True, slots=True)
class Case:
    """One workload in one setting: a line per server, and our ratios to each peer.

    A ratio is ours divided by the peer's: of IOPS more is better, of the others less.
    """

    setting: str
    workload: str
    lines: tuple[Line, ...]
    ratios: dict[str, Spread]
    cpu_ratios: dict[str, Spread] = field(default_factory=dict)
    mean_ratios: dict[str, Spread] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        servers = {
            line.server: {
                "iops": line.iops.as_json(),
                "mb_per_s": line.mb_per_s.as_json(),
                "cpu_us_per_request": line.cpu_us.as_json(),
                "mean_us": line.mean_us.as_json(),
                "p50_us": line.p50_us.as_json(),
                "p99_us": line.p99_us.as_json(),
            }
            for line in self.lines
        }
        return {
            "setting": self.setting,
            "workload": self.workload,
            "servers": servers,
            "ratios": _spreads_json(self.ratios),
            "cpu_ratios": _spreads_json(self.cpu_ratios),
            "mean_ratios": _spreads_json(self.mean_ratios),
        }


def _line(server: str, samples: Sequence[Sample]) -> Line:
    return Line(
        server=server,
        iops=Spread.of([sample.iops for sample in samples]),
        mb_per_s=Spread.of([sample.mb_per_s for sample in samples]),
        cpu_us=Spread.of([sample.cpu_us_per_request for sample in samples]),
        mean_us=Spread.of([sample.mean_us for sample in samples]),
        p50_us=Spread.of([sample.p50_us for sample in samples]),
        p99_us=Spread.of([sample.p99_us for sample in samples]),
    )


def _ratios(
    samples: Sequence[Sample],
    value: Callable[[Sample], float],
    better: Callable[[Iterable[float]], float],
) -> dict[str, Spread]:
    """Ours over each peer's, formed within a round; `better` is max or min."""
    rounds: dict[int, dict[str, float]] = defaultdict(dict)
    for sample in samples:
        rounds[sample.round][sample.server] = value(sample)
    found: dict[str, list[float]] = defaultdict(list)
    for values in rounds.values():
        ours = values.pop(OURS, None)
        if ours is None:
            continue
        qsd_modes = [one for server, one in values.items() if server.startswith("qsd-")]
        others = [values[NBDKIT]] if NBDKIT in values else []
        if qsd_modes:
            values[QSD_BEST] = better(qsd_modes)
        if qsd_modes and others:
            values[PEERS_BEST] = better([*qsd_modes, *others])
        for peer, theirs in values.items():
            if theirs > 0:
                found[peer].append(ours / theirs)
    return {peer: Spread.of(ratios) for peer, ratios in found.items()}


def summarise(samples: Iterable[Sample]) -> list[Case]:
    """Cases in the order in which they were measured."""
    grouped: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        grouped[sample.setting, sample.workload].append(sample)
    cases = []
    for (setting, workload), members in grouped.items():
        servers = sorted(
            {sample.server for sample in members}, key=lambda name: (name != OURS, name)
        )
        lines = tuple(
            _line(server, [sample for sample in members if sample.server == server])
            for server in servers
        )
        cases.append(
            Case(
                setting,
                workload,
                lines,
                ratios=_ratios(members, lambda sample: sample.iops, max),
                cpu_ratios=_ratios(members, lambda sample: sample.cpu_us_per_request, min),
                mean_ratios=_ratios(members, lambda sample: sample.mean_us, min),
            )
        )
    return cases
