# SPDX-License-Identifier: Apache-2.0
"""The NBD part: what the protocol has beyond reads and writes, and what clients do to a server.

Styles of replies (nbd_styles), the block status of a fragmented image (fragmented), idle clients,
connecting, hostile clients (nbd_clients), TLS (nbd_tls). What is missing here, a program or a
server's feature, is left out with a word.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.contestants import OURS
from benchmarks.fragmented import EXTENTS, make_fragmented
from benchmarks.measure import rotated
from benchmarks.nbd_clients import (
    ALONE,
    BESIDE,
    CONNECTIONS,
    DEPTHS,
    HOSTILE,
    QEMU_NBD,
    measure_clients,
    measure_hostile,
)
from benchmarks.nbd_sample import Sample, ratios, spread_of
from benchmarks.nbd_styles import PATTERNS, STYLES, measure_styles
from benchmarks.nbd_tls import TLS, measure_tls
from benchmarks.section import Section
from benchmarks.summary import Spread
from benchmarks.targets import Verdict
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.process import ServerFailed, ServerProcess
from tests.peers.qemu import QemuNbd, ToolFailed, run_tool

STYLE_COST_MAX = 1.05
MAP_RATIO_MAX = 1.2
IDLE_MIB_MAX = 64
FIRST_READ_MS_MAX = 2
TLS_RATIO_MIN = 0.9
P99_RATIO_MAX = 10
"""A bound for this machine, whose two cores the hostile clients share with the server."""

VERDICTS = 2 * (len(STYLES) - 1) * len(PATTERNS) + 2 + 2 + len(DEPTHS)

HEADER = ("measure", "of", "median", "range", "ratio")

INTRODUCTION = f"""\
Styles of replies: 4 KiB at depth 32 by the lean client, from one server; "ratio" is against simple
replies. Map: `nbdinfo --map` of a qcow2 image of 100 GiB with {EXTENTS:,} extents. Idle: the
server's memory with {CONNECTIONS} connected clients above that with none. First read: from
connecting to the first 4 KiB, a median over many clients. p99: of one client's 4 KiB reads, alone
and beside {HOSTILE} hostile clients on the same IOThread (they never read, stall in a payload, in a
header, in negotiation, flood, or come again and again with garbage), which have a processor's time
for themselves only while nobody else wants it.
"""

MAP = "nbdinfo --map"
Complain = Callable[[str], None]


def measure_map(folder: Path, *, rounds: int) -> Iterator[Sample]:
    """Until the status of all of the image is known. Raises: ServerFailed, ToolFailed."""
    image = make_fragmented(folder / "fragmented.qcow2")
    path = folder / "map.sock"
    servers: list[tuple[str, Callable[[], ServerProcess]]] = [
        (OURS, lambda: BlockemuDaemon(image, fmt="qcow2", socket_path=path, read_only=True)),
        (QEMU_NBD, lambda: QemuNbd(image, fmt="qcow2", socket_path=path, read_only=True)),
    ]
    for turn in range(rounds):
        for name, make in rotated(servers, turn):
            with make() as server:
                began = time.monotonic()
                listing = run_tool(["nbdinfo", "--map", server.uri]).stdout
                took_s = time.monotonic() - began
            if listing.count("\n") != EXTENTS:
                raise ServerFailed(f"{name} tells of {listing.count(chr(10))} extents", "")
            yield Sample(MAP, name, "s", turn, took_s)


def run_nbd(folder: Path, *, rounds: int, runtime_s: float, complain: Complain) -> list[Sample]:
    """All measurements whose programs are here."""
    samples: list[Sample] = []
    have_nbdinfo = all(shutil.which(name) for name in ("nbdinfo", "nbdcopy", "qemu-nbd"))
    parts: list[tuple[str, Callable[[], Iterator[Sample]]]] = [
        ("styles", lambda: measure_styles(folder, rounds=rounds, runtime_s=runtime_s)),
        ("clients", lambda: measure_clients(folder, rounds=rounds, complain=complain)),
        ("hostile clients", lambda: measure_hostile(folder, rounds=rounds)),
    ]
    if have_nbdinfo:
        parts.append(("map", lambda: measure_map(folder, rounds=rounds)))
        parts.append(("TLS", lambda: measure_tls(folder, rounds=rounds)))
    else:
        complain("nbd: no map and no TLS: nbdinfo, nbdcopy or qemu-nbd isn't installed")
    for name, measure in parts:
        try:
            samples += measure()
        except (ServerFailed, ToolFailed, OSError) as error:
            complain(f"nbd: {name} is out: {str(error).splitlines()[0]}")
    return samples


def judge_nbd(samples: Sequence[Sample]) -> list[Verdict]:
    """All targets that something was measured for."""
    verdicts = []

    def ratio(what: str, found: Spread | None, limit: float, *, at_least: bool = False) -> None:
        if found is not None:
            form = Verdict.at_least if at_least else Verdict.at_most
            verdicts.append(form(what, found, limit))

    for pattern in PATTERNS:
        load = f"{pattern}-4k-d32"
        for style in STYLES[1:]:
            found = ratios(samples, load, style, STYLES[0])
            ratio(f"{load} {style} / simple", found, 1 / STYLE_COST_MAX, at_least=True)
            found = ratios(samples, f"{load} CPU", style, STYLES[0])
            ratio(f"{load} CPU {style} / simple", found, STYLE_COST_MAX)
    ratio(f"{MAP} / qemu-nbd", ratios(samples, MAP, OURS, QEMU_NBD), MAP_RATIO_MAX)
    ratio(f"{TLS} / qemu-nbd", ratios(samples, TLS, OURS, QEMU_NBD), TLS_RATIO_MIN, at_least=True)
    for depth in DEPTHS:
        name = f"p99 d{depth}"
        ratio(f"{name} {BESIDE} / {ALONE}", ratios(samples, name, BESIDE, ALONE), P99_RATIO_MAX)
    idle = spread_of(samples, f"{CONNECTIONS} idle", OURS)
    if idle is not None:
        mib = idle.median / 1024
        verdicts.append(
            Verdict(
                f"{CONNECTIONS} idle connections",
                f"< {IDLE_MIB_MAX} MiB",
                f"{mib:.1f} MiB",
                mib < IDLE_MIB_MAX,
            )
        )
    first = spread_of(samples, "first read", OURS)
    if first is not None:
        ms = first.median / 1000
        verdicts.append(
            Verdict(
                "first read", f"< {FIRST_READ_MS_MAX} ms", f"{ms:.2f} ms", ms < FIRST_READ_MS_MAX
            )
        )
    return verdicts


def _row(samples: Sequence[Sample], measure: str, server: str, base: str) -> tuple[str, ...]:
    mine = [s for s in samples if (s.measure, s.server) == (measure, server)]
    spread = Spread.of([sample.value for sample in mine])
    digits = 0 if spread.median >= 1000 else 2
    over = None if server == base else ratios(samples, measure, server, base)
    return (
        measure,
        server,
        f"{spread.median:,.{digits}f} {mine[0].unit}",
        f"{spread.low:,.{digits}f}-{spread.high:,.{digits}f}",
        str(over) if over else "",
    )


BASES = (STYLES[0], ALONE, QEMU_NBD)
"""What others are compared with."""


def nbd_section(samples: Sequence[Sample]) -> Section:
    """For the report."""
    rows = []
    for measure in dict.fromkeys(sample.measure for sample in samples):
        servers = list(dict.fromkeys(s.server for s in samples if s.measure == measure))
        base = next((name for name in BASES if name in servers), servers[0])
        rows += [_row(samples, measure, server, base) for server in servers]
    return Section(
        name="nbd",
        title="NBD beyond reads and writes",
        introduction=INTRODUCTION,
        header=HEADER,
        rows=rows,
        verdicts=judge_nbd(samples),
        verdicts_wanted=VERDICTS,
        samples=[asdict(sample) for sample in samples],
    )
