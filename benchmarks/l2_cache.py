# SPDX-License-Identifier: Apache-2.0
"""Random reads over a qcow2 image of 1 TiB, whose L2 tables are 128 MiB: what finding them costs.

With 1 MiB of cache, nearly every read meets an entry that isn't in memory. With a cache that covers
the image, the first one to meet a part of a table reads it, and the others find it there. Every
measurement begins with a fresh server, whose cache is empty.

The image's clusters are allocated and never written, so the reads themselves are of holes: what is
measured is the way there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.contestants import OURS
from benchmarks.cpu_clock import process_cpu_ns
from benchmarks.decoy import Decoy
from benchmarks.load import parse_result
from benchmarks.measure import rotated
from benchmarks.section import Section
from benchmarks.summary import Spread
from benchmarks.targets import Verdict
from benchmarks.workloads import KIB, MIB
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.fio import Fio
from tests.peers.process import ServerFailed, ServerProcess, nbd_uri
from tests.peers.qemu import QemuImg, QemuStorageDaemon, ToolFailed, run_tool

DISK_BYTES = 1 << 40
CACHES = {"1 MiB": MIB, "128 MiB": 128 * MIB}
BLOCK_BYTES, DEPTH = 4 * KIB, 16
REQUESTS = 40_000
SEED = 40
LOAD_TIMEOUT_S = 120.0

COST_MAX = 1.2
"""Time per request over that of the better of qemu-storage-daemon's modes."""

VERDICTS = len(CACHES)
"""As many targets as there are."""

HEADER = ("L2 cache", "server", "IOPS", "spread", "CPU us/req", "blockemu / it")

INTRODUCTION = """\
Random reads of 4 KiB at depth 16 over an image of 1 TiB with 64 KiB clusters, all of them allocated
and none written, in page cache. Its L2 tables are 128 MiB. Each measurement is 40,000 requests to a
server that has just been started. The targets compare the time per request with the better of
qemu-storage-daemon's modes in each round.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One server with one size of cache, one round."""

    cache: str
    server: str
    round: int
    iops: float
    cpu_us: float
    """Of the server, per request."""


def make_servers(image: Path, folder: Path, cache_bytes: int) -> dict[str, ServerProcess]:
    """By name, not started."""
    option = f"l2-cache-size={cache_bytes}"
    ours = Path(f"driver=qcow2,file.filename={image},{option}")
    servers: dict[str, ServerProcess] = {
        OURS: BlockemuDaemon(
            ours,
            fmt=None,
            socket_path=folder / "ours.sock",
            export="disk",
            read_only=True,
            extra=("--image-opts",),
        )
    }
    for aio in ("threads", "io_uring"):
        servers[f"qsd-{aio}"] = QemuStorageDaemon(
            image,
            fmt="qcow2",
            socket_path=folder / f"{aio}.sock",
            aio=aio,
            read_only=True,
            format_options=option,
        )
    return servers


def measure(name: str, server: ServerProcess, cache: str, turn: int) -> Sample:
    """One load on a server that is started for it. Raises: ServerFailed, ToolFailed."""
    with contextlib.ExitStack() as stack:
        stack.callback(server.discard)
        server.start()
        public = server.socket_path
        if name != OURS:
            public = public.with_suffix(".public")
            decoy = Decoy(real=server.socket_path, public=public, size_bytes=DISK_BYTES)
            stack.callback(decoy.close)
        command = Fio(nbd_uri(public, server.export)).command(
            pattern="randread",
            block_bytes=BLOCK_BYTES,
            depth=DEPTH,
            extra=[f"--io_size={REQUESTS * BLOCK_BYTES}", f"--randseed={SEED + turn}"],
        )
        cpu = process_cpu_ns(server.pid)
        found = parse_result(run_tool(command, timeout_s=LOAD_TIMEOUT_S).stdout)
        cpu = process_cpu_ns(server.pid) - cpu
    return Sample(cache, name, turn, found.iops, cpu / 1000 / max(found.requests, 1))


def run_l2_cache(folder: Path, *, rounds: int, complain: Callable[[str], None]) -> list[Sample]:
    """All servers with both caches, round by round, in rotated order."""
    samples = []
    image = QemuImg.create(
        folder / "terabyte.qcow2", DISK_BYTES, options={"preallocation": "metadata"}
    )
    out: set[str] = set()
    for cache, cache_bytes in CACHES.items():
        for turn in range(rounds):
            servers = make_servers(image, folder, cache_bytes)
            for name in rotated(tuple(servers), turn):
                if name in out:
                    continue
                try:
                    samples.append(measure(name, servers[name], cache, turn))
                except (ServerFailed, ToolFailed) as error:
                    complain(f"L2 cache: {name} is out: {str(error).splitlines()[0]}")
                    out.add(name)
    return samples


def costs(samples: Sequence[Sample], cache: str) -> list[float]:
    """Our time per request over the best peer's, round by round."""
    rounds: dict[int, dict[str, float]] = {}
    for sample in samples:
        if sample.cache == cache:
            rounds.setdefault(sample.round, {})[sample.server] = sample.iops
    return [
        max(iops for name, iops in found.items() if name != OURS) / found[OURS]
        for found in rounds.values()
        if OURS in found and len(found) > 1
    ]


def judge_l2_cache(samples: Sequence[Sample]) -> list[Verdict]:
    """The time of a request, with each size of cache."""
    return [
        Verdict.at_most(f"time of a read, {cache} of L2 cache / qsd", Spread.of(found), COST_MAX)
        for cache in CACHES
        if (found := costs(samples, cache))
    ]


def _row(samples: Sequence[Sample], cache: str, server: str) -> tuple[str, ...]:
    mine = [one for one in samples if (one.cache, one.server) == (cache, server)]
    iops = Spread.of([one.iops for one in mine])
    pair = [one for one in samples if one.server in (OURS, server)]
    ratios = [1 / cost for cost in costs(pair, cache)] if server != OURS else []
    return (
        cache,
        server,
        f"{iops.median:,.0f}",
        f"{iops.low:,.0f}-{iops.high:,.0f}",
        f"{Spread.of([one.cpu_us for one in mine]).median:.1f}",
        str(Spread.of(ratios)) if ratios else "",
    )


def l2_cache_section(samples: Sequence[Sample]) -> Section:
    """For the report."""
    return Section(
        name="l2-cache",
        title="Finding clusters of a large image",
        introduction=INTRODUCTION,
        header=HEADER,
        rows=[
            _row(samples, cache, server)
            for cache in CACHES
            for server in dict.fromkeys(one.server for one in samples if one.cache == cache)
        ],
        verdicts=judge_l2_cache(samples),
        verdicts_wanted=VERDICTS,
        samples=[asdict(sample) for sample in samples],
    )
