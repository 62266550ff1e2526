# SPDX-License-Identifier: Apache-2.0
"""Two IOThreads flooded at once: are they as fast together as the sum of each alone?

The cores may not allow it: client and server of one flood take about two cores. How much they allow
is measured: two daemons, each a process of its own with one export, flooded in the same way share
the cores but no interpreter. It is also computed, as a check on that: the CPU time per request of
client and server, measured alone, says how many requests all cores together can do if sharing them
costs nothing. If both of one daemon's exports cost more CPU time per request than two daemons', the
threads are in each other's way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cpu_clock import process_cpu_ns
from benchmarks.images import copy_image, make_master
from benchmarks.load import run_loads
from benchmarks.measure import rotated
from benchmarks.section import Section
from benchmarks.summary import Spread
from benchmarks.targets import Verdict
from benchmarks.workloads import MIB, WORKLOADS, Setting
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.process import ServerFailed
from tests.peers.qemu import ToolFailed

SETTING = Setting("raw", direct=False)
SIZE_BYTES = 64 * MIB
WORKLOAD = next(workload for workload in WORKLOADS if workload.name == "randread-4k-d32")

FIRST, SECOND, BOTH = "first alone", "second alone", "both at once"
TWO_DAEMONS = "two daemons at once"
PHASES = (FIRST, SECOND, BOTH, TWO_DAEMONS)

SPEED_MIN = 0.9
"""Both at once, over what the cores allow: no loss, but for what two runs differ in."""

CPU_MAX = 1.1
"""CPU time per request of one daemon's two exports, over that of two daemons; as above."""

VERDICTS = 2
"""As many targets as there are."""

HEADER = (
    *("flooded", "IOPS", "server CPU us/req", "client CPU us/req"),
    *("IOPS / sum of each", "IOPS / cores' limit"),
)

INTRODUCTION = """\
Two exports of one daemon, each on an IOThread of its own, read at random in 4 KiB blocks at depth
32 by a client each. Two daemons with an export each are the control: they share the cores and
nothing else. What the cores allow is therefore the sum of each alone, or what two daemons reach if
that is less. "cores' limit" is what all cores could do at the CPU time per request (client and
server) that was measured alone.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One phase in one round; costs are means over all requests."""

    phase: str
    round: int
    iops: float
    server_cpu_us: float
    client_cpu_us: float


def measure(
    servers: Sequence[BlockemuDaemon],
    uris: Sequence[str],
    *,
    phase: str,
    turn: int,
    runtime_s: float,
) -> Sample:
    """Flood `uris` at once; the CPU time is that of `servers`. Raises: ToolFailed."""
    before = sum(process_cpu_ns(server.pid) for server in servers)
    found = run_loads(uris, WORKLOAD, runtime_s=runtime_s)
    cpu_ns = sum(process_cpu_ns(server.pid) for server in servers) - before
    requests = max(sum(one.requests for one in found), 1)
    return Sample(
        phase,
        turn,
        sum(one.iops for one in found),
        cpu_ns / 1000 / requests,
        sum(one.client_cpu_us for one in found) / requests,
    )


def run_iothreads(
    folder: Path, *, rounds: int, runtime_s: float, complain: Callable[[str], None]
) -> list[Sample]:
    """All phases, round by round, in rotated order."""
    master = make_master(folder, SETTING, SIZE_BYTES)
    images = [
        copy_image(master, folder / f"{name}.img", direct=False)
        for name in ("first", "second", "third", "fourth")
    ]
    samples = []
    try:
        with contextlib.ExitStack() as stack:
            one, left, right = (
                stack.enter_context(
                    BlockemuDaemon(*served, fmt="raw", socket_path=folder / f"{name}.sock")
                )
                for name, served in (
                    ("one", images[:2]),
                    ("left", images[2:3]),
                    ("right", images[3:]),
                )
            )
            first, second = one.export_uri("first"), one.export_uri("second")
            plan = {
                FIRST: ([one], [first]),
                SECOND: ([one], [second]),
                BOTH: ([one], [first, second]),
                TWO_DAEMONS: ([left, right], [left.uri, right.uri]),
            }
            for turn in range(rounds):
                for phase in rotated(PHASES, turn):
                    servers, uris = plan[phase]
                    samples.append(
                        measure(servers, uris, phase=phase, turn=turn, runtime_s=runtime_s)
                    )
    except (ServerFailed, ToolFailed) as error:
        complain(f"iothreads: ended early: {str(error).splitlines()[0]}")
    return samples


def by_round(samples: Sequence[Sample]) -> list[dict[str, Sample]]:
    """The rounds that are whole."""
    rounds: dict[int, dict[str, Sample]] = {}
    for sample in samples:
        rounds.setdefault(sample.round, {})[sample.phase] = sample
    return [found for found in rounds.values() if len(found) == len(PHASES)]


def sum_alone(found: dict[str, Sample]) -> float:
    """IOPS of each alone, added up."""
    return found[FIRST].iops + found[SECOND].iops


def cores_limit(found: dict[str, Sample], cores: int) -> float:
    """IOPS of `cores` that do nothing else, at the price of a request measured alone."""
    alone = found[FIRST], found[SECOND]
    price_us = sum(one.server_cpu_us + one.client_cpu_us for one in alone) / len(alone)
    return cores * 1e6 / max(price_us, 1e-9)


def judge_iothreads(samples: Sequence[Sample]) -> list[Verdict]:
    """Speed and price of both at once."""
    rounds = by_round(samples)
    if not rounds:
        return []
    speed = Spread.of(
        [found[BOTH].iops / min(sum_alone(found), found[TWO_DAEMONS].iops) for found in rounds]
    )
    price = Spread.of(
        [
            found[BOTH].server_cpu_us / max(found[TWO_DAEMONS].server_cpu_us, 1e-9)
            for found in rounds
        ]
    )
    return [
        Verdict.at_least("two IOThreads at once / what the cores allow", speed, SPEED_MIN),
        Verdict.at_most("two IOThreads at once, CPU per request / two daemons", price, CPU_MAX),
    ]


def _row(samples: Sequence[Sample], phase: str, cores: int) -> tuple[str, ...]:
    mine = [one for one in samples if one.phase == phase]
    rounds = by_round(samples) if phase in (BOTH, TWO_DAEMONS) else []
    of_sum = [found[phase].iops / sum_alone(found) for found in rounds]
    of_limit = [found[phase].iops / cores_limit(found, cores) for found in rounds]
    return (
        phase,
        f"{Spread.of([one.iops for one in mine]).median:,.0f}",
        f"{Spread.of([one.server_cpu_us for one in mine]).median:.1f}",
        f"{Spread.of([one.client_cpu_us for one in mine]).median:.1f}",
        *(str(Spread.of(ratios)) if ratios else "" for ratios in (of_sum, of_limit)),
    )


def iothreads_section(samples: Sequence[Sample], cores: int | None = None) -> Section:
    """For the report; `cores` is how many we may use."""
    cores = cores or len(os.sched_getaffinity(0))
    present = {sample.phase for sample in samples}
    return Section(
        name="iothreads",
        title="Two IOThreads at once",
        introduction=INTRODUCTION,
        header=HEADER,
        rows=[_row(samples, phase, cores) for phase in PHASES if phase in present],
        verdicts=judge_iothreads(samples),
        verdicts_wanted=VERDICTS,
        samples=[asdict(sample) for sample in samples],
    )
