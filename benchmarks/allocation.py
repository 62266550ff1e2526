# SPDX-License-Identifier: Apache-2.0
"""Writes that allocate: random ones into an empty qcow2 image, and what they cost on the host.

Each measurement has an image of its own, made just before. It is so many times larger than what is
written that nearly every request meets a cluster that isn't there yet. The load is a number of
requests, not a time, or the faster server would have to write into a fuller image; it ends with a
flush, which is part of the time: metadata that was put off until then counts.

Bytes written on the host are those that the kernel counts for the process as written to a disk,
so they are known with O_DIRECT only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.contestants import CONTESTANTS, OURS, Contestant, Stand
from benchmarks.cpu_clock import process_cpu_ns
from benchmarks.load import parse_result
from benchmarks.measure import rotated
from benchmarks.section import Section
from benchmarks.summary import Spread
from benchmarks.targets import Verdict
from benchmarks.workloads import KIB, MIB, Setting, Workload
from tests.peers.fio import Fio
from tests.peers.process import ServerFailed
from tests.peers.qemu import QemuImg, ToolFailed, run_tool

SETTINGS = (Setting("qcow2", direct=False), Setting("qcow2", direct=True))

DISK_BYTES = 8 * 1024 * MIB
SEED = 20
"""The same offsets for everybody."""

LOAD_TIMEOUT_S = 120.0

VERDICTS = 4
"""As many targets as there are."""

HEADER = (
    *("setting", "load", "server", "IOPS", "spread", "CPU us/req", "host bytes / guest byte"),
    "blockemu / it",
)

INTRODUCTION = """\
Random writes at depth 16 into an empty image of 8 GiB with 64 KiB clusters, made anew for each
measurement; a fixed number of requests and a flush at the end, which is part of the time. "host
bytes / guest byte" is what the process wrote to the disk, metadata and copied parts of clusters
included, for each byte that the client wrote; the kernel counts it for O_DIRECT only. The targets
compare with the better of qemu-storage-daemon's modes in each round.
"""


@dataclass(frozen=True, slots=True)
class Load:
    """A workload, and how much of it."""

    workload: Workload
    io_bytes: int


LOADS = (
    Load(Workload("randwrite-4k-d16", "randwrite", 4 * KIB, 16), 64 * MIB),
    Load(Workload("randwrite-64k-d16", "randwrite", 64 * KIB, 16), 512 * MIB),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One server, one load, one round."""

    setting: str
    load: str
    server: str
    round: int
    iops: float
    cpu_us: float
    """Of the server, per request."""
    amplification: float | None
    """Bytes to the disk per byte of the client's; None where nothing counts them."""


def disk_bytes_written(pid: int) -> int:
    """What the kernel has counted for a process, its ended threads included."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "write_bytes":
            return int(value)
    raise ValueError(f"/proc/{pid}/io has no write_bytes")


def measure(
    contestant: Contestant, setting: Setting, load: Load, turn: int, folder: Path
) -> Sample:
    """A new image, and one load on it. Raises: ServerFailed, ToolFailed."""
    image = QemuImg.create(folder / f"{contestant.name}.qcow2", DISK_BYTES)
    stand = Stand(contestant, setting, image, folder, DISK_BYTES)
    workload = load.workload
    try:
        with stand.serving() as (server, uri):
            command = Fio(uri).command(
                pattern=workload.pattern,
                block_bytes=workload.block_bytes,
                depth=workload.depth,
                extra=[f"--io_size={load.io_bytes}", "--end_fsync=1", f"--randseed={SEED + turn}"],
            )
            cpu, written = process_cpu_ns(server.pid), disk_bytes_written(server.pid)
            found = parse_result(run_tool(command, timeout_s=LOAD_TIMEOUT_S).stdout)
            cpu = process_cpu_ns(server.pid) - cpu
            written = disk_bytes_written(server.pid) - written
    finally:
        stand.close()
    return Sample(
        setting.name,
        workload.name,
        contestant.name,
        turn,
        found.iops,
        cpu / 1000 / max(found.requests, 1),
        written / load.io_bytes if setting.direct else None,
    )


def run_allocation(
    folders: dict[str, Path], *, rounds: int, complain: Callable[[str], None]
) -> list[Sample]:
    """All loads in each setting that has a folder, round by round, in rotated order."""
    samples = []
    for setting in SETTINGS:
        if setting.name not in folders:
            continue
        present = [c for c in CONTESTANTS if c.takes_part(setting) and not c.missing]
        for load in LOADS:
            alive = list(present)
            for turn in range(rounds):
                for contestant in rotated(alive, turn):
                    try:
                        samples.append(
                            measure(contestant, setting, load, turn, folders[setting.name])
                        )
                    except (ServerFailed, ToolFailed) as error:
                        line = str(error).splitlines()[0]
                        complain(f"allocation, {setting.name}: {contestant.name} is out: {line}")
                        alive.remove(contestant)
    return samples


def ratios(samples: Sequence[Sample], server: str | None = None) -> list[float]:
    """Ours over `server`, or over the best of the others, round by round; of one load's samples."""
    rounds: dict[int, dict[str, float]] = {}
    for sample in samples:
        rounds.setdefault(sample.round, {})[sample.server] = sample.iops
    found = []
    for by_server in rounds.values():
        peers = [
            iops for name, iops in by_server.items() if name != OURS and server in (None, name)
        ]
        if OURS in by_server and peers:
            found.append(by_server[OURS] / max(peers))
    return found


def _groups(samples: Sequence[Sample]) -> dict[tuple[str, str], list[Sample]]:
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.setting, sample.load), []).append(sample)
    return groups


def judge_allocation(samples: Sequence[Sample]) -> list[Verdict]:
    """At least as fast as the better of QEMU's modes."""
    return [
        Verdict.at_least(f"{setting} allocating {load} / qsd", Spread.of(found), 1.0)
        for (setting, load), group in _groups(samples).items()
        if (found := ratios(group))
    ]


def _row(samples: Sequence[Sample], server: str) -> tuple[str, ...]:
    mine = [sample for sample in samples if sample.server == server]
    iops = Spread.of([sample.iops for sample in mine])
    costs = [sample.amplification for sample in mine if sample.amplification is not None]
    over = [] if server == OURS else ratios(samples, server)
    return (
        mine[0].setting,
        mine[0].load,
        server,
        f"{iops.median:,.0f}",
        f"{iops.low:,.0f}-{iops.high:,.0f}",
        f"{Spread.of([sample.cpu_us for sample in mine]).median:.1f}",
        f"{Spread.of(costs).median:.2f}" if costs else "",
        str(Spread.of(over)) if over else "",
    )


def allocation_section(samples: Sequence[Sample]) -> Section:
    """For the report."""
    return Section(
        name="allocation",
        title="Writes that allocate",
        introduction=INTRODUCTION,
        header=HEADER,
        rows=[
            _row(group, server)
            for group in _groups(samples).values()
            for server in dict.fromkeys(sample.server for sample in group)
        ],
        verdicts=judge_allocation(samples),
        verdicts_wanted=VERDICTS,
        samples=[asdict(sample) for sample in samples],
    )
