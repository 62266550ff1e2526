# SPDX-License-Identifier: Apache-2.0
"""Command line of the benchmark: ``python -m benchmarks``, or ``make bench``.

Runs what is installed, says what is missing, prints as it goes, and ends with the targets.
``--check`` makes a missed target an exit status of 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contestants import CONTESTANTS, EXTRA_CONTESTANTS, Contestant, Stand
from benchmarks.images import copy_image, make_master, takes_direct_io
from benchmarks.machine import describe_machine
from benchmarks.measure import Sample, run_setting
from benchmarks.report import markdown_page, text_table, text_verdicts
from benchmarks.summary import summarise
from benchmarks.targets import judge
from benchmarks.workloads import MIB, QUICK_WORKLOADS, SETTINGS, WORKLOADS, Setting, Workload

ROUNDS, RUNTIME_S = 5, 2.0
QUICK_ROUNDS, QUICK_RUNTIME_S = 3, 1.0


def say(text: str) -> None:
    """Print and flush: a run takes minutes."""
    print(text, flush=True)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer workloads, shorter rounds")
    parser.add_argument(
        "--rounds", type=int, help=f"rounds per workload ({ROUNDS}; {QUICK_ROUNDS} with --quick)"
    )
    parser.add_argument(
        "--runtime", type=float, help=f"seconds per round ({RUNTIME_S:g}; {QUICK_RUNTIME_S:g})"
    )
    parser.add_argument("--size", type=int, default=512, help="image size in MiB (512)")
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
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--list", action="store_true", help="print settings, workloads and servers")
    return parser.parse_args(words)


def chosen(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a name passes a filter."""
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def choose_workloads(options: argparse.Namespace) -> list[Workload]:
    """The workloads of this run."""
    if options.workload:
        return [workload for workload in WORKLOADS if chosen(workload.name, options.workload)]
    return [
        workload for workload in WORKLOADS if not options.quick or workload.name in QUICK_WORKLOADS
    ]


def choose_contestants(options: argparse.Namespace) -> list[Contestant]:
    """The servers of this run; the extra ones only when they are asked for."""
    pool = [*CONTESTANTS, *EXTRA_CONTESTANTS] if options.server else CONTESTANTS
    wanted = [contestant for contestant in pool if chosen(contestant.name, options.server)]
    for contestant in wanted:
        if contestant.missing:
            say(f"{contestant.name} doesn't take part: {contestant.program} is not installed")
    return [contestant for contestant in wanted if not contestant.missing]


@dataclass
class Run:
    """One run of the benchmark: options in, samples out."""

    options: argparse.Namespace
    rounds: int
    runtime_s: float
    samples: list[Sample] = field(default_factory=list)
    peak_rss_kib: dict[str, dict[str, int]] = field(default_factory=dict)

    def run_setting(
        self, setting: Setting, workloads: Sequence[Workload], contestants: Sequence[Contestant]
    ) -> None:
        """Measure one setting in a temporary folder of its own."""
        parent: Path = self.options.direct_dir if setting.direct else self.options.cache_dir
        if setting.direct and not takes_direct_io(parent):
            say(f"{setting.name} is left out: {parent} doesn't take O_DIRECT (--direct-dir)")
            return
        with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as name:
            folder = Path(name)
            size_bytes = self.options.size * MIB
            master = make_master(folder, setting, size_bytes)
            stands = []
            for contestant in contestants:
                image = copy_image(master, folder / f"{contestant.name}.img", direct=setting.direct)
                stands.append(Stand(contestant, setting, image, folder, size_bytes))
            try:
                self._measure(setting, stands, workloads)
            finally:
                for stand in stands:
                    stand.close()
            peaks = {
                stand.contestant.name: stand.peak_rss_kib for stand in stands if stand.peak_rss_kib
            }
            self.peak_rss_kib[setting.name] = peaks

    def _measure(
        self, setting: Setting, stands: Sequence[Stand], workloads: Sequence[Workload]
    ) -> None:
        for workload in workloads:
            found = list(
                run_setting(
                    setting,
                    stands,
                    [workload],
                    rounds=self.rounds,
                    runtime_s=self.runtime_s,
                    complain=say,
                )
            )
            self.samples += found
            for case in summarise(found):
                say(text_table(case) + "\n")

    def results(self, machine: dict[str, str]) -> dict[str, Any]:
        """Everything, for JSON."""
        cases = summarise(self.samples)
        verdicts = judge(cases, self.peak_rss_kib)
        return {
            "machine": machine,
            "rounds": self.rounds,
            "runtime_s": self.runtime_s,
            "image_mib": self.options.size,
            "cases": [case.as_json() for case in cases],
            "targets": [
                {"what": v.what, "wanted": v.wanted, "found": v.found, "reached": v.reached}
                for v in verdicts
            ],
            "peak_rss_kib": self.peak_rss_kib,
            "samples": [sample.as_json() for sample in self.samples],
        }


def print_choices() -> None:
    """What the filters can name."""
    for title, names in (
        ("settings", [setting.name for setting in SETTINGS]),
        ("workloads", [workload.name for workload in WORKLOADS]),
        ("servers", [contestant.name for contestant in (*CONTESTANTS, *EXTRA_CONTESTANTS)]),
    ):
        say(f"{title}: {', '.join(names)}")


def main() -> int:
    """Run the benchmark; the exit status."""
    options = parse_arguments()
    if options.list:
        print_choices()
        return 0
    for program in ("fio", "qemu-img"):
        if shutil.which(program) is None:
            sys.exit(f"the benchmark needs {program}")
    machine = describe_machine(cache_dir=options.cache_dir, direct_dir=options.direct_dir)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    run = Run(options, rounds, options.runtime or (QUICK_RUNTIME_S if options.quick else RUNTIME_S))
    workloads, contestants = choose_workloads(options), choose_contestants(options)
    for setting in SETTINGS:
        if chosen(setting.name, options.setting):
            run.run_setting(
                setting, workloads, [one for one in contestants if one.takes_part(setting)]
            )
    cases = summarise(run.samples)
    verdicts = judge(cases, run.peak_rss_kib)
    say("peak memory, MiB:")
    for name, found in run.peak_rss_kib.items():
        say(
            f"  {name}: " + ", ".join(f"{server} {kib / 1024:.0f}" for server, kib in found.items())
        )
    if verdicts:
        say("targets:\n" + text_verdicts(verdicts))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(run.results(machine), indent=1) + "\n")
    if options.markdown:
        page = markdown_page(
            cases,
            verdicts,
            machine=machine,
            peak_rss_kib=run.peak_rss_kib,
            rounds=run.rounds,
            runtime_s=run.runtime_s,
        )
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(page)
    missed = options.check and not (verdicts and all(verdict.reached for verdict in verdicts))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
