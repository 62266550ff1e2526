# SPDX-License-Identifier: Apache-2.0
"""``blockemu img`` beside ``qemu-img``: conversions, a check, and opening images of 16 TiB.

Whole processes are timed, from their start to their end, as their users do; what Python itself
takes is told beside it. The image has 4 GiB with a quarter of data, in extents from 64 KiB to
4 MiB, of random bytes. Sources are read once before, so they are in the page cache; targets go
into it and are removed before the next program runs.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.contestants import OURS
from benchmarks.measure import rotated
from benchmarks.section import Section
from benchmarks.summary import Spread
from benchmarks.targets import Verdict
from benchmarks.workloads import KIB, MIB
from tests.peers.qemu import QemuImg

THEIRS = "qemu-img"
FLOOR = "python -c pass"

DISK_BYTES = 4096 * MIB
EXTENTS = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
HUGE = "16T"

CONVERT_MAX = 1.3
CHECK_MAX = 3.0
OPEN_MS_MAX, OPEN_MIB_MAX = 100.0, 50.0

CONVERTS = ("raw to qcow2", "qcow2 to raw")
CHECK = "check"
OPENS = ("info of 16 TiB, 64k clusters", "info of 16 TiB, 2M clusters")
START = "start"

VERDICTS = len(CONVERTS) + 1 + 2 * len(OPENS)

HEADER = ("command", "program", "ms", "spread", "CPU ms", "peak MiB", "blockemu / it")

INTRODUCTION = """\
`blockemu img` and `qemu-img` as whole processes, one after the other in each round. The disk has
4 GiB, a quarter of it data; everything is in the page cache. Half of a short command is Python's
own start, which is a row of the table. Opening is judged by what is left when that is taken away.
Peak memory is that of the program, or of the benchmark itself where that has more: the kernel
counts so.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One command of one program in one round."""

    command: str
    program: str
    round: int
    wall_ms: float
    cpu_ms: float
    peak_mib: float


def make_disk(path: Path) -> Path:
    """A raw file of DISK_BYTES, a quarter of it data, the same for everybody."""
    choose = random.Random(DISK_BYTES)
    block = choose.randbytes(2 * max(EXTENTS))
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
        position = 0
        while position < DISK_BYTES:
            length = min(choose.choice(EXTENTS), DISK_BYTES - position)
            start = choose.randrange(len(block) - length)
            file.seek(position)
            file.write(block[start : start + length])
            position += 4 * length
    return path


def run(words: Sequence[str | Path]) -> tuple[float, float, float]:
    """Wall and CPU milliseconds and the most memory, in MiB, of a process that must succeed.

    Python keeps what it compiles, as it does for its users, whatever our environment says.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall_ms = (time.perf_counter() - begun) * 1000
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [str(word) for word in words])
    return wall_ms, (usage.ru_utime + usage.ru_stime) * 1000, usage.ru_maxrss / 1024


def commands(folder: Path) -> dict[str, list[str | Path]]:
    """What each program is told, by the name of the command."""
    raw = make_disk(folder / "disk.raw")
    packed = folder / "disk.qcow2"
    QemuImg.convert(raw, packed, source_fmt="raw", target_fmt="qcow2")
    target = folder / "target"
    found: dict[str, list[str | Path]] = {
        CONVERTS[0]: ["convert", "-f", "raw", "-O", "qcow2", raw, target],
        CONVERTS[1]: ["convert", "-f", "qcow2", "-O", "raw", packed, target],
        CHECK: ["check", "-f", "qcow2", packed],
    }
    for name, size in zip(OPENS, ("64k", "2M"), strict=True):
        huge = folder / f"huge-{size}.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={size}"]
        subprocess.run([*create, huge, HUGE], check=True)
        found[name] = ["info", "-f", "qcow2", huge]
    return found


def run_img(folder: Path, *, rounds: int, complain: Callable[[str], None]) -> list[Sample]:
    """Every command by both programs, and Python's start, in each round."""
    programs: dict[str, list[str | Path]] = {
        OURS: [Path(sys.executable).with_name("blockemu"), "img"],
        THEIRS: ["qemu-img"],
    }
    target = folder / "target"
    samples = []
    for name, words in commands(folder).items():
        for turn in range(-1, rounds):  # the first warms the caches up
            for program in rotated(list(programs), turn):
                target.unlink(missing_ok=True)
                try:
                    found = run([*programs[program], *words])
                except subprocess.CalledProcessError as error:
                    complain(f"img, {name}: {program} is out: {error}")
                    return samples
                if turn >= 0:
                    samples.append(Sample(name, program, turn, *found))
    target.unlink(missing_ok=True)
    for turn in range(rounds):
        samples.append(Sample(START, FLOOR, turn, *run([sys.executable, "-c", "pass"])))
    return samples


def ratios(samples: Sequence[Sample], command: str) -> list[float]:
    """Our wall time over qemu-img's, round by round."""
    rounds: dict[int, dict[str, float]] = {}
    for sample in samples:
        if sample.command == command:
            rounds.setdefault(sample.round, {})[sample.program] = sample.wall_ms
    return [one[OURS] / one[THEIRS] for one in rounds.values() if one.keys() >= {OURS, THEIRS}]


def _of(samples: Sequence[Sample], command: str, program: str) -> list[Sample]:
    return [one for one in samples if (one.command, one.program) == (command, program)]


def judge_img(samples: Sequence[Sample]) -> list[Verdict]:
    """Conversions and checks by qemu-img's time; opening by itself."""
    limits = {**dict.fromkeys(CONVERTS, CONVERT_MAX), CHECK: CHECK_MAX}
    verdicts = [
        Verdict.at_most(f"img {command} / qemu-img", Spread.of(found), limit)
        for command, limit in limits.items()
        if (found := ratios(samples, command))
    ]
    start = _of(samples, START, FLOOR)
    for command in OPENS:
        mine = _of(samples, command, OURS)
        if not mine or not start:
            continue
        floor_ms = Spread.of([one.wall_ms for one in start]).median
        wall_ms = Spread.of([one.wall_ms for one in mine]).median - floor_ms
        peak = max(one.peak_mib for one in mine)
        verdicts += [
            Verdict(f"img {command}, without Python's start", f"<= {OPEN_MS_MAX:.0f} ms",
                    f"{wall_ms:.0f} ms", wall_ms <= OPEN_MS_MAX),
            Verdict(f"img {command}, memory", f"<= {OPEN_MIB_MAX:.0f} MiB",
                    f"{peak:.0f} MiB", peak <= OPEN_MIB_MAX),
        ]  # fmt: skip
    return verdicts


def _row(samples: Sequence[Sample], command: str, program: str) -> tuple[str, ...]:
    mine = _of(samples, command, program)
    wall = Spread.of([one.wall_ms for one in mine])
    over = ratios(samples, command) if program == THEIRS else []
    return (
        command,
        program,
        f"{wall.median:,.1f}",
        f"{wall.low:,.1f}-{wall.high:,.1f}",
        f"{Spread.of([one.cpu_ms for one in mine]).median:,.1f}",
        f"{max(one.peak_mib for one in mine):.0f}",
        str(Spread.of(over)) if over else "",
    )


def img_section(samples: Sequence[Sample]) -> Section:
    """For the report."""
    pairs = dict.fromkeys((sample.command, sample.program) for sample in samples)
    return Section(
        name="img",
        title="The img commands",
        introduction=INTRODUCTION,
        header=HEADER,
        rows=[_row(samples, command, program) for command, program in sorted(pairs)],
        verdicts=judge_img(samples),
        verdicts_wanted=VERDICTS,
        samples=[asdict(sample) for sample in samples],
    )
