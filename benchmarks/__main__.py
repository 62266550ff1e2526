# SPDX-License-Identifier: Apache-2.0
"""Command line of the benchmark: ``python -m benchmarks``, or ``make bench``.

Runs what is installed, says what is missing, prints as it goes, and ends with the targets.
``--check`` makes a missed target an exit status of 1. The parts: the servers side by side, an
export's isolation from a busy main thread, two IOThreads at once, writes that allocate, the img
commands beside qemu-img, and what the NBD protocol has beyond reads and writes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import allocation, img_tools, l2_cache, nbd
from benchmarks.contestants import CONTESTANTS, EXTRA_CONTESTANTS, OURS, Contestant, Stand
from benchmarks.images import copy_image, make_master, takes_direct_io
from benchmarks.iothreads import iothreads_section, run_iothreads
from benchmarks.isolation import run_isolation
from benchmarks.isolation_report import QSD, isolation_section
from benchmarks.machine import describe_machine
from benchmarks.measure import Sample, run_setting
from benchmarks.options import (
    ALLOCATION,
    IMG,
    IOTHREADS,
    ISOLATION,
    L2_CACHE,
    NBD,
    SERVERS,
    choose_contestants,
    choose_parts,
    choose_targets,
    choose_workloads,
    chosen,
    parse_arguments,
    runs_everything,
)
from benchmarks.report import Page, markdown_page, text_section, text_table, text_verdicts
from benchmarks.section import Section
from benchmarks.summary import summarise
from benchmarks.targets import Verdict, judge, unmeasured
from benchmarks.workloads import MIB, SETTINGS, WORKLOADS, Setting, Workload


def say(text: str) -> None:
    """Print and flush: a run takes minutes."""
    print(text, flush=True)


@dataclass
class Run:
    """One run of the benchmark: options in, samples out."""

    options: argparse.Namespace
    samples: list[Sample] = field(default_factory=list)
    peak_rss_kib: dict[str, dict[str, int]] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    def run_servers(self) -> None:
        """The servers side by side, in every setting."""
        present = []
        for contestant in choose_contestants(self.options):
            if contestant.missing:
                say(f"{contestant.name} doesn't take part: {contestant.program} is not installed")
            else:
                present.append(contestant)
        workloads = choose_workloads(self.options)
        for setting in SETTINGS:
            if chosen(setting.name, self.options.setting):
                self.run_setting(setting, workloads, [c for c in present if c.takes_part(setting)])

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
                    rounds=self.options.rounds,
                    runtime_s=self.options.runtime,
                    complain=say,
                )
            )
            self.samples += found
            for case in summarise(found):
                say(text_table(case) + "\n")

    def run_isolation(self) -> None:
        """An export beside a busy main thread."""
        servers = [OURS]
        if shutil.which("qemu-storage-daemon"):
            servers.append(QSD)
        else:
            say("isolation: qemu-storage-daemon is not installed: there is nothing to compare with")
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.options.cache_dir) as name:
            samples = run_isolation(
                Path(name),
                servers,
                rounds=self.options.rounds,
                runtime_s=self.options.runtime,
                complain=say,
            )
        self._add(isolation_section(samples))

    def run_iothreads(self) -> None:
        """Two IOThreads at once."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.options.cache_dir) as name:
            samples = run_iothreads(
                Path(name),
                rounds=self.options.rounds,
                runtime_s=self.options.runtime,
                complain=say,
            )
        self._add(iothreads_section(samples))

    def run_allocation(self) -> None:
        """Writes that allocate clusters of qcow2 images."""
        parents = {False: self.options.cache_dir, True: self.options.direct_dir}
        with contextlib.ExitStack() as stack:
            folders = {}
            for setting in allocation.SETTINGS:
                parent = parents[setting.direct]
                if setting.direct and not takes_direct_io(parent):
                    say(f"allocation: {setting.name} is left out: {parent} doesn't take O_DIRECT")
                    continue
                folder = tempfile.TemporaryDirectory(prefix="bench-", dir=parent)
                folders[setting.name] = Path(stack.enter_context(folder))
            samples = allocation.run_allocation(folders, rounds=self.options.rounds, complain=say)
        self._add(allocation.allocation_section(samples))

    def run_l2_cache(self) -> None:
        """Finding clusters of an image of 1 TiB."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.options.cache_dir) as name:
            samples = l2_cache.run_l2_cache(Path(name), rounds=self.options.rounds, complain=say)
        self._add(l2_cache.l2_cache_section(samples))

    def run_img(self) -> None:
        """The img commands beside qemu-img."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.options.cache_dir) as name:
            samples = img_tools.run_img(Path(name), rounds=self.options.rounds, complain=say)
        self._add(img_tools.img_section(samples))

    def run_nbd(self) -> None:
        """Styles of replies, block status, idle and hostile clients, connecting, and TLS."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.options.cache_dir) as name:
            samples = nbd.run_nbd(
                Path(name),
                rounds=self.options.rounds,
                runtime_s=self.options.runtime,
                complain=say,
            )
        self._add(nbd.nbd_section(samples))

    def _add(self, section: Section) -> None:
        self.sections.append(section)
        say(text_section(section) + "\n")

    def verdicts(self) -> list[Verdict]:
        """Of all that was measured."""
        cases = summarise(self.samples)
        found = judge(cases, self.peak_rss_kib, choose_targets(self.options))
        return [*found, *(verdict for one in self.sections for verdict in one.verdicts)]

    def unmeasured(self) -> list[str]:
        """The targets of the chosen parts that nothing was measured for."""
        parts = choose_parts(self.options)
        missing = []
        if SERVERS in parts:
            missing += unmeasured(summarise(self.samples), choose_targets(self.options))
        missing += [
            f"{one.title}: {one.verdicts_wanted - len(one.verdicts)} of its targets"
            for one in self.sections
            if len(one.verdicts) < one.verdicts_wanted
        ]
        return missing

    def results(self, machine: dict[str, str]) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "machine": machine,
            "rounds": self.options.rounds,
            "runtime_s": self.options.runtime,
            "image_mib": self.options.size,
            "python_only": self.options.python_only,
            "cases": [case.as_json() for case in summarise(self.samples)],
            "sections": [section.as_json() for section in self.sections],
            "targets": [
                {"what": v.what, "wanted": v.wanted, "found": v.found, "reached": v.reached}
                for v in self.verdicts()
            ],
            "targets_not_measured": self.unmeasured(),
            "peak_rss_kib": self.peak_rss_kib,
            "samples": [sample.as_json() for sample in self.samples],
        }

    def page(self, machine: dict[str, str]) -> str:
        """Everything, as Markdown."""
        return markdown_page(
            Page(
                cases=summarise(self.samples),
                sections=self.sections,
                verdicts=self.verdicts(),
                machine=machine,
                peak_rss_kib=self.peak_rss_kib,
                rounds=self.options.rounds,
                runtime_s=self.options.runtime,
                python_only=self.options.python_only,
            )
        )


def print_choices() -> None:
    """What the filters can name."""
    for title, names in (
        ("settings", [setting.name for setting in SETTINGS]),
        ("workloads", [workload.name for workload in WORKLOADS]),
        ("servers", [contestant.name for contestant in (*CONTESTANTS, *EXTRA_CONTESTANTS)]),
    ):
        say(f"{title}: {', '.join(names)}")


def choose_native(options: argparse.Namespace) -> None:
    """Whether blockemu uses its C code: said by the option alone, whatever our environment says.

    Every server inherits it; only blockemu looks at it.
    """
    # Some build machines keep Python from saving compiled modules; a user's start has them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.pop("BLOCKEMU_NATIVE", None)
    if options.python_only:
        os.environ["BLOCKEMU_NATIVE"] = "0"


def conclude(run: Run) -> bool:
    """Print memory and targets; whether all is well."""
    if run.peak_rss_kib:
        say("peak memory, MiB:")
    for name, found in run.peak_rss_kib.items():
        say(
            f"  {name}: " + ", ".join(f"{server} {kib / 1024:.0f}" for server, kib in found.items())
        )
    verdicts = run.verdicts()
    missing = run.unmeasured() if runs_everything(run.options) else []
    if verdicts:
        say("targets:\n" + text_verdicts(verdicts))
    for what in missing:
        say(f"  not measured: {what}")
    return bool(verdicts) and not missing and all(verdict.reached for verdict in verdicts)


def main() -> int:
    """Run the benchmark; the exit status."""
    options = parse_arguments(description=__doc__)
    if options.list:
        print_choices()
        return 0
    for program in ("fio", "qemu-img"):
        if shutil.which(program) is None:
            sys.exit(f"the benchmark needs {program}")
    choose_native(options)
    machine = describe_machine(cache_dir=options.cache_dir, direct_dir=options.direct_dir)
    run = Run(options)
    parts = {
        SERVERS: run.run_servers,
        ISOLATION: run.run_isolation,
        IOTHREADS: run.run_iothreads,
        ALLOCATION: run.run_allocation,
        L2_CACHE: run.run_l2_cache,
        IMG: run.run_img,
        NBD: run.run_nbd,
    }
    for part in choose_parts(options):
        parts[part]()
    well = conclude(run)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(run.results(machine), indent=1) + "\n")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(run.page(machine))
    return 1 if options.check and not well else 0


if __name__ == "__main__":
    sys.exit(main())
