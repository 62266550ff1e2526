# SPDX-License-Identifier: Apache-2.0
"""The speed and the memory that the project promises, as tables that ``--check`` enforces.

Ratios are medians of blockemu's number divided by the peer's in the same round: at least so many
times the peer's IOPS, at most so much of its CPU time per request or of its mean latency. The peer
"qsd" is the better of qemu-storage-daemon's modes that took part in that round, "best" the better
of those and nbdkit.

There are two tables: what the daemon promises as it is installed, and what it promises without
its C code (``--python-only``). The targets of isolation and of several IOThreads stand with their
measurements, in benchmarks.isolation and benchmarks.iothreads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from benchmarks.contestants import NBDKIT, OURS, ROOFLINE
from benchmarks.summary import PEERS_BEST, QSD_BEST, Case, Spread

PEAK_RSS_MIB_MAX = 200


class Metric(Enum):
    """What is compared."""

    IOPS = "IOPS"
    CPU = "CPU per request"
    MEAN = "mean latency"


@dataclass(frozen=True, slots=True)
class Target:
    """At least `ratio` times the peer's IOPS, or at most `ratio` times its cost."""

    setting: str
    workload: str
    ratio: float
    peer: str = QSD_BEST
    metric: Metric = Metric.IOPS

    @property
    def what(self) -> str:
        """Its name in tables."""
        metric = "" if self.metric is Metric.IOPS else f" {self.metric.value}"
        return f"{self.setting} {self.workload}{metric} / {self.peer}"

    def found_in(self, case: Case) -> Spread | None:
        """The ratio that it is about, if `case` has it."""
        if (case.setting, case.workload) != (self.setting, self.workload):
            return None
        ratios = {
            Metric.IOPS: case.ratios,
            Metric.CPU: case.cpu_ratios,
            Metric.MEAN: case.mean_ratios,
        }
        return ratios[self.metric].get(self.peer)


NATIVE_TARGETS = (
    # Once as fio sees it, and once by a client that isn't the bottleneck.
    *(
        target
        for client in ("", "-lean")
        for target in (
            Target("raw-cache", f"randread-4k-d32{client}", 3.0),
            Target("qcow2-cache", f"randread-4k-d32{client}", 3.0),
            Target("raw-cache", f"randread-4k-d32{client}", 1.3, NBDKIT),
            Target("raw-cache", f"randread-4k-d32{client}", 0.6, NBDKIT, Metric.CPU),
            Target("raw-cache", f"randread-4k-d32{client}", 0.85, ROOFLINE),
            Target("raw-cache", f"randwrite-4k-d32{client}", 2.5),
            Target("raw-cache", f"randwrite-4k-d32{client}", 1.0, NBDKIT),
            Target("raw-direct", f"randread-4k-d32{client}", 1.3),
        )
    ),
    Target("raw-cache", "randread-64k-d16", 1.1, NBDKIT),
    Target("raw-cache", "read-1m-d8", 1.1, PEERS_BEST),
    Target("raw-cache", "write-1m-d8", 1.1, PEERS_BEST),
    Target("raw-cache", "randread-4k-d1", 0.6, QSD_BEST, Metric.MEAN),
)

PYTHON_TARGETS = (
    *(
        Target(setting, workload, 1.5)
        for setting in ("raw-cache", "qcow2-cache")
        for workload in ("randread-4k-d32", "randwrite-4k-d32")
    ),
    *(
        Target(setting, workload, 1.0)
        for setting in ("raw-direct", "qcow2-direct")
        for workload in ("randread-4k-d32", "randwrite-4k-d32")
    ),
    *(
        Target(setting, workload, 1.0)
        for setting in ("raw-cache", "qcow2-cache", "raw-direct", "qcow2-direct")
        for workload in ("read-1m-d8", "write-1m-d8")
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, what was measured, and whether that is enough."""

    what: str
    wanted: str
    found: str
    reached: bool

    @classmethod
    def at_least(cls, what: str, found: Spread, ratio: float) -> Verdict:
        """The median is to be `ratio` or more."""
        return cls(what, f">= {ratio:.2f}x", str(found), found.median >= ratio)

    @classmethod
    def at_most(cls, what: str, found: Spread, ratio: float) -> Verdict:
        """The median is to be `ratio` or less."""
        return cls(what, f"<= {ratio:.2f}x", str(found), found.median <= ratio)


def judge(
    cases: Sequence[Case],
    peak_rss_kib: Mapping[str, Mapping[str, int]],
    targets: Sequence[Target] = NATIVE_TARGETS,
) -> list[Verdict]:
    """A verdict for each target whose workload ran with its peer, and one a setting for memory."""
    verdicts = []
    for target in targets:
        for case in cases:
            ratio = target.found_in(case)
            if ratio is None:
                continue
            form = Verdict.at_least if target.metric is Metric.IOPS else Verdict.at_most
            verdicts.append(form(target.what, ratio, target.ratio))
    for setting, servers in peak_rss_kib.items():
        if OURS in servers:
            mib = servers[OURS] / 1024
            verdicts.append(
                Verdict(
                    f"{setting} peak memory",
                    f"< {PEAK_RSS_MIB_MAX} MiB",
                    f"{mib:.0f} MiB",
                    mib < PEAK_RSS_MIB_MAX,
                )
            )
    return verdicts


def unmeasured(cases: Sequence[Case], targets: Sequence[Target]) -> list[str]:
    """The targets that nothing was measured for: a filter left them out, or a peer isn't here."""
    return [
        target.what for target in targets if all(target.found_in(case) is None for case in cases)
    ]
