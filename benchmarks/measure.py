# SPDX-License-Identifier: Apache-2.0
"""The run itself: every round every server gets its turn, in rotated order.

On a shared virtual machine absolute numbers drift by tens of per cent within minutes. What holds
is the ratio of two servers measured seconds apart, so ratios are formed within a round, and the
median over the rounds is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.contestants import Stand
from benchmarks.cpu_clock import process_cpu_ns
from benchmarks.load import run_load
from benchmarks.workloads import Setting, Workload
from tests.peers.process import ServerFailed
from tests.peers.qemu import ToolFailed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """One server, one workload, one round."""

    setting: str
    workload: str
    server: str
    round: int
    requests: int
    iops: float
    mb_per_s: float
    cpu_us_per_request: float
    mean_us: float
    p50_us: float
    p99_us: float

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def rotated(stands: Sequence[T], turn: int) -> list[T]:
    """The order of round `turn`: nobody always runs after the same neighbour's leftovers."""
    shift = turn % len(stands)
    return [*stands[shift:], *stands[:shift]]


def exchange_images(stands: Sequence[Stand], images: Sequence[Path], turn: int) -> None:
    """Round `turn`'s images: in so many rounds as there are servers each has had every one."""
    for stand, image in zip(stands, rotated(images, turn), strict=True):
        stand.take(image)


def measure_once(stand: Stand, workload: Workload, turn: int, runtime_s: float) -> Sample:
    """One fio run against one server.

    Raises: ServerFailed, ToolFailed.
    """
    with stand.serving() as (server, uri):
        cpu_before = process_cpu_ns(server.pid)
        found = run_load(
            uri,
            workload,
            runtime_s=runtime_s,
            under_load=lambda: stand.note_peak_rss(server),
        )
        cpu_after = process_cpu_ns(server.pid)
    return Sample(
        setting=stand.setting.name,
        workload=workload.name,
        server=stand.contestant.name,
        round=turn,
        requests=found.requests,
        iops=found.iops,
        mb_per_s=found.bandwidth_bytes / 1e6,
        cpu_us_per_request=(cpu_after - cpu_before) / 1000 / max(found.requests, 1),
        mean_us=found.mean_us,
        p50_us=found.p50_us,
        p99_us=found.p99_us,
    )


def run_setting(
    setting: Setting,
    stands: Sequence[Stand],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    runtime_s: float,
    complain: Callable[[str], None],
) -> Iterator[Sample]:
    """All workloads of one setting, interleaved; a server that fails is dropped with a word.

    On a disk, images change hands from round to round: where one lies decides how fast it is, on a
    virtual disk by tens of per cent.
    """
    alive = list(stands)
    images = [stand.image for stand in stands]
    for workload in workloads:
        for turn in range(rounds):
            if setting.direct:
                exchange_images(stands, images, turn)
            for stand in rotated(alive, turn):
                try:
                    yield measure_once(stand, workload, turn, runtime_s)
                except (ServerFailed, ToolFailed) as error:
                    line = str(error).splitlines()[0]
                    complain(f"{setting.name}: {stand.contestant.name} is out: {line}")
                    alive.remove(stand)
            if not alive:
                return
