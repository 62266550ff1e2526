# SPDX-License-Identifier: Apache-2.0
"""The command line's options, and what they choose."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contestants import CONTESTANTS, EXTRA_CONTESTANTS, Contestant
from benchmarks.targets import NATIVE_TARGETS, PYTHON_TARGETS, Target
from benchmarks.workloads import QUICK_WORKLOADS, WORKLOADS, Workload

ROUNDS, RUNTIME_S = 5, 2.0
QUICK_ROUNDS, QUICK_RUNTIME_S = 3, 1.0

SERVERS, ISOLATION, IOTHREADS = "servers", "isolation", "iothreads"
ALLOCATION, L2_CACHE, IMG, NBD = "allocation", "l2-cache", "img", "nbd"
PARTS = (SERVERS, ISOLATION, IOTHREADS, ALLOCATION, L2_CACHE, IMG, NBD)


def parse_arguments(
    words: Sequence[str] | None = None, *, description: str | None = None
) -> argparse.Namespace:
    """The options, their defaults filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer workloads, shorter rounds")
    parser.add_argument(
        "--rounds", type=int, help=f"rounds per workload ({ROUNDS}; {QUICK_ROUNDS} with --quick)"
    )
    parser.add_argument(
        "--runtime", type=float, help=f"seconds per round ({RUNTIME_S:g}; {QUICK_RUNTIME_S:g})"
    )
    parser.add_argument("--size", type=int, default=512, help="image size in MiB (512)")
    parser.add_argument(
        "--only",
        action="append",
        choices=PARTS,
        help="only this part of the benchmark; without it all, with --python-only the servers",
    )
    parser.add_argument(
        "--python-only",
        action="store_true",
        help="run blockemu without its C code (BLOCKEMU_NATIVE=0), against the targets for that",
    )
    parser.add_argument("--workload", action="append", metavar="GLOB", help="only these workloads")
    parser.add_argument(
        "--setting",
        action="append",
        metavar="GLOB",
        help="only these: raw-cache, qcow2-direct, ...",
    )
    parser.add_argument("--server", action="append", metavar="GLOB", help="only these servers")
    parser.add_argument(
        "--cache-dir", type=Path, default=Path("/dev/shm"), help="where page-cache images go"
    )
    parser.add_argument(
        "--direct-dir", type=Path, default=Path("/var/tmp"), help="where O_DIRECT images go"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write samples, medians and ratios here"
    )
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the report page here")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 when a target is missed, or, in a run of everything, wasn't measured",
    )
    parser.add_argument("--list", action="store_true", help="print settings, workloads and servers")
    options = parser.parse_args(words)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.runtime = options.runtime or (QUICK_RUNTIME_S if options.quick else RUNTIME_S)
    return options


def chosen(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a name passes a filter."""
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def runs_everything(options: argparse.Namespace) -> bool:
    """Whether no filter is in force, so that a target that wasn't measured is a failure."""
    filters = (options.only, options.workload, options.setting, options.server)
    return not any(filters)


def choose_parts(options: argparse.Namespace) -> Sequence[str]:
    """The parts of this run. A filter on the servers' part leaves the others out."""
    if options.only:
        return [part for part in PARTS if part in options.only]
    if options.python_only or options.workload or options.setting or options.server:
        return [SERVERS]
    return PARTS


def choose_targets(options: argparse.Namespace) -> Sequence[Target]:
    """The table that this run is judged by."""
    return PYTHON_TARGETS if options.python_only else NATIVE_TARGETS


def choose_workloads(options: argparse.Namespace) -> list[Workload]:
    """The workloads of this run."""
    if options.workload:
        return [workload for workload in WORKLOADS if chosen(workload.name, options.workload)]
    return [
        workload for workload in WORKLOADS if not options.quick or workload.name in QUICK_WORKLOADS
    ]


def choose_contestants(options: argparse.Namespace) -> list[Contestant]:
    """The servers of this run, missing ones included; extra ones only when they are asked for."""
    pool = [*CONTESTANTS, *EXTRA_CONTESTANTS] if options.server else CONTESTANTS
    return [contestant for contestant in pool if chosen(contestant.name, options.server)]
