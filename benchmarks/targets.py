# SPDX-License-Identifier: Apache-2.0
"""The speed and the memory that the project promises, as a table that ``--check`` enforces.

Ratios are medians of IOPS, blockemu's divided by the peer's in the same round. The peer "qsd" is
the better of qemu-storage-daemon's modes that took part in that round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contestants import OURS
from benchmarks.summary import QSD_BEST, Case

PEAK_RSS_MIB_MAX = 200


@dataclass(frozen=True, slots=True)
class Target:
    """At least `ratio` times the peer's IOPS."""

    setting: str
    workload: str
    ratio: float
    peer: str = QSD_BEST


TARGETS = (
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


def judge(cases: Sequence[Case], peak_rss_kib: Mapping[str, Mapping[str, int]]) -> list[Verdict]:
    """A verdict for each target whose workload ran with its peer, and one a setting for memory."""
    verdicts = []
    for target in TARGETS:
        for case in cases:
            ratio = case.ratios.get(target.peer)
            if (case.setting, case.workload) != (target.setting, target.workload) or ratio is None:
                continue
            verdicts.append(
                Verdict(
                    f"{case.setting} {case.workload} / {target.peer}",
                    f">= {target.ratio:.2f}x",
                    f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})",
                    ratio.median >= target.ratio,
                )
            )
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
