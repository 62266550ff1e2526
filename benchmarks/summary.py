# SPDX-License-Identifier: Apache-2.0
"""From samples to medians, spreads and ratios."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contestants import OURS
from benchmarks.measure import Sample

# The peer "qsd" is, in every round, the faster of qemu-storage-daemon's modes that took part.
QSD_BEST = "qsd"


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

    def as_json(self) -> dict[str, float]:
        """A plain dictionary."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Line:
    """One server in one workload."""

    server: str
    iops: Spread
    mb_per_s: Spread
    cpu_us: Spread
    p50_us: Spread
    p99_us: Spread


@dataclass(frozen=True, slots=True)
class Case:
    """One workload in one setting: a line per server, and our ratio to each peer."""

    setting: str
    workload: str
    lines: tuple[Line, ...]
    ratios: dict[str, Spread]

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        servers = {
            line.server: {
                "iops": line.iops.as_json(),
                "mb_per_s": line.mb_per_s.as_json(),
                "cpu_us_per_request": line.cpu_us.as_json(),
                "p50_us": line.p50_us.as_json(),
                "p99_us": line.p99_us.as_json(),
            }
            for line in self.lines
        }
        ratios = {peer: spread.as_json() for peer, spread in self.ratios.items()}
        return {
            "setting": self.setting,
            "workload": self.workload,
            "servers": servers,
            "ratios": ratios,
        }


def _line(server: str, samples: Sequence[Sample]) -> Line:
    return Line(
        server=server,
        iops=Spread.of([sample.iops for sample in samples]),
        mb_per_s=Spread.of([sample.mb_per_s for sample in samples]),
        cpu_us=Spread.of([sample.cpu_us_per_request for sample in samples]),
        p50_us=Spread.of([sample.p50_us for sample in samples]),
        p99_us=Spread.of([sample.p99_us for sample in samples]),
    )


def _ratios(samples: Sequence[Sample]) -> dict[str, Spread]:
    rounds: dict[int, dict[str, float]] = defaultdict(dict)
    for sample in samples:
        rounds[sample.round][sample.server] = sample.iops
    found: dict[str, list[float]] = defaultdict(list)
    for speeds in rounds.values():
        ours = speeds.pop(OURS, None)
        if ours is None:
            continue
        qsd_modes = [iops for server, iops in speeds.items() if server.startswith("qsd-")]
        if qsd_modes:
            speeds[QSD_BEST] = max(qsd_modes)
        for peer, iops in speeds.items():
            if iops > 0:
                found[peer].append(ours / iops)
    return {peer: Spread.of(values) for peer, values in found.items()}


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
        cases.append(Case(setting, workload, lines, _ratios(members)))
    return cases
