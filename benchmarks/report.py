# SPDX-License-Identifier: Apache-2.0
"""The tables: for the terminal while it runs, and as the Markdown page ``docs/performance.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contestants import OURS
from benchmarks.section import Section
from benchmarks.summary import Case, Line
from benchmarks.targets import Verdict

HEADER = (
    *("server", "IOPS", "spread", "MB/s", "CPU us/req"),
    *("mean us", "p50 us", "p99 us", "blockemu / it"),
)

INTRODUCTION = """\
# Performance

How fast blockemu is beside the servers that do the same job, and what that costs in processor
time. The numbers are one run of `make bench ARGS='--markdown docs/performance.md'` on a machine
with nothing else to do.

How it is measured: fio's nbd engine over a unix socket, each server with its own copy of the same
image, every block of it written; on a disk the copies change hands from round to round, since
where one lies decides how fast it is. fio with libnbd takes some 5 us of processor time per
request, so at depth 32 it is fio that is full before a fast server is: the `-lean` workloads are
the same load by a client of our own (benchmarks/native/lean_client.c), which sends and takes
requests in batches. The servers take turns within a round, in rotated order,
{rounds} rounds of {runtime:g} s a workload. IOPS, MB/s, CPU and latencies are medians over the
rounds. "blockemu / it" is the median of the ratio formed within each round, with the lowest and
the highest: on a virtual machine this holds where absolute numbers drift. "CPU us/req" is all
processor time of the server process, its ended threads included, per request. `cache` means page
cache (tmpfs), `direct` O_DIRECT. qemu-storage-daemon runs its export in an iothread; `qsd` in the
targets is, round by round, the better of its modes, `best` the better of those and nbdkit.
`roofline` is no peer but a bound: a C loop that receives, reads the file and sends, and nothing
else (benchmarks/native/roofline.c). Latencies are from a request's submission to its reply.
"""

PYTHON_ONLY = """
In this run, blockemu was without its C code (`--python-only`, BLOCKEMU_NATIVE=0).
"""


def _cells(case: Case, line: Line) -> tuple[str, ...]:
    ratio = case.ratios.get(line.server)
    return (
        line.server,
        f"{line.iops.median:,.0f}",
        f"{line.iops.low:,.0f}-{line.iops.high:,.0f}",
        f"{line.mb_per_s.median:,.0f}",
        f"{line.cpu_us.median:,.1f}",
        f"{line.mean_us.median:,.0f}",
        f"{line.p50_us.median:,.0f}",
        f"{line.p99_us.median:,.0f}",
        str(ratio) if ratio is not None else "",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join([first, *rest]).rstrip())
    return lines


def text_table(case: Case) -> str:
    """One case for the terminal."""
    rows = [HEADER, *(_cells(case, line) for line in case.lines)]
    return "\n".join([f"{case.setting}  {case.workload}", *_aligned(rows)])


def text_section(section: Section) -> str:
    """Another measurement for the terminal."""
    return "\n".join([section.title, *_aligned([section.header, *section.rows])])


def text_verdicts(verdicts: Sequence[Verdict]) -> str:
    """The targets for the terminal."""
    lines = []
    for verdict in verdicts:
        mark = "ok    " if verdict.reached else "MISSED"
        lines.append(f"  {mark} {verdict.what}: {verdict.found}, wanted {verdict.wanted}")
    return "\n".join(lines)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *("--:" for _ in header[1:])]
    return [f"| {' | '.join(row)} |" for row in (header, aligned, *rows)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the report page is made of."""

    cases: Sequence[Case]
    sections: Sequence[Section]
    verdicts: Sequence[Verdict]
    machine: Mapping[str, str]
    peak_rss_kib: Mapping[str, Mapping[str, int]]
    rounds: int
    runtime_s: float
    python_only: bool = False


def _targets(page: Page) -> list[str]:
    if not page.verdicts:
        return []
    rows = [(v.what, v.wanted, v.found, "yes" if v.reached else "**no**") for v in page.verdicts]
    table = _markdown_table(("target", "wanted", "measured", "reached"), rows)
    return ["", "## Targets", "", *table]


def _results(page: Page) -> list[str]:
    lines = ["", "## Results"] if page.cases else []
    for case in page.cases:
        rows = [_cells(case, line) for line in case.lines]
        lines += ["", f"### {case.setting}, {case.workload}", "", *_markdown_table(HEADER, rows)]
    return lines


def _memory(page: Page) -> list[str]:
    if not page.peak_rss_kib:
        return []
    servers = sorted(
        {name for found in page.peak_rss_kib.values() for name in found},
        key=lambda name: (name != OURS, name),
    )
    rows = [
        (setting, *(f"{found[name] / 1024:.0f}" if name in found else "" for name in servers))
        for setting, found in page.peak_rss_kib.items()
    ]
    return [
        "",
        "## Peak memory",
        "",
        "Peak resident memory (VmHWM) of each daemon under this load, in MiB.",
        "",
        *_markdown_table(("setting", *servers), rows),
    ]


def markdown_page(page: Page) -> str:
    """The whole of ``docs/performance.md``."""
    lines = [INTRODUCTION.format(rounds=page.rounds, runtime=page.runtime_s)]
    if page.python_only:
        lines[0] += PYTHON_ONLY
    lines += ["## The machine", ""]
    lines += _markdown_table(("what", "value"), list(page.machine.items()))
    lines += _targets(page)
    for section in page.sections:
        lines += ["", f"## {section.title}", "", section.introduction]
        lines += _markdown_table(section.header, section.rows)
    lines += _results(page)
    lines += _memory(page)
    return "\n".join(lines) + "\n"
