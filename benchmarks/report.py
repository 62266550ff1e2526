# SPDX-License-Identifier: Apache-2.0
"""The tables: for the terminal while it runs, and as the Markdown page ``docs/performance.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.contestants import OURS
from benchmarks.summary import Case, Line, Spread
from benchmarks.targets import Verdict

HEADER = ("server", "IOPS", "spread", "MB/s", "CPU us/req", "p50 us", "p99 us", "blockemu / it")

INTRODUCTION = """\
# Performance

How fast blockemu is beside the servers that do the same job, and what that costs in processor
time. The numbers are one run of `make bench ARGS='--markdown docs/performance.md'` on a machine
with nothing else to do.

How it is measured: fio's nbd engine over a unix socket, each server with its own copy of the same
image, every block of it written. The servers take turns within a round, in rotated order,
{rounds} rounds of {runtime:g} s a workload. IOPS, MB/s, CPU and latencies are medians over the
rounds. "blockemu / it" is the median of the ratio formed within each round, with the lowest and
the highest: on a virtual machine this holds where absolute numbers drift. "CPU us/req" is all
processor time of the server process, its ended threads included, per request. `cache` means page
cache (tmpfs), `direct` O_DIRECT. qemu-storage-daemon runs its export in an iothread; `qsd` in the
targets is, round by round, the better of its modes.
"""


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def _cells(case: Case, line: Line) -> tuple[str, ...]:
    ratio = case.ratios.get(line.server)
    return (
        line.server,
        f"{line.iops.median:,.0f}",
        f"{line.iops.low:,.0f}-{line.iops.high:,.0f}",
        f"{line.mb_per_s.median:,.0f}",
        f"{line.cpu_us.median:,.1f}",
        f"{line.p50_us.median:,.0f}",
        f"{line.p99_us.median:,.0f}",
        _spread(ratio) if ratio is not None else "",
    )


def text_table(case: Case) -> str:
    """One case for the terminal."""
    rows = [HEADER, *(_cells(case, line) for line in case.lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [f"{case.setting}  {case.workload}"]
    for row in rows:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


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


def markdown_page(
    cases: Sequence[Case],
    verdicts: Sequence[Verdict],
    *,
    machine: Mapping[str, str],
    peak_rss_kib: Mapping[str, Mapping[str, int]],
    rounds: int,
    runtime_s: float,
) -> str:
    """The whole of ``docs/performance.md``."""
    lines = [INTRODUCTION.format(rounds=rounds, runtime=runtime_s), "## The machine", ""]
    lines += _markdown_table(("what", "value"), list(machine.items()))
    rows: list[tuple[str, ...]]
    if verdicts:
        rows = [(v.what, v.wanted, v.found, "yes" if v.reached else "**no**") for v in verdicts]
        lines += [
            "",
            "## Targets",
            "",
            *_markdown_table(("target", "wanted", "measured", "reached"), rows),
        ]
    lines += ["", "## Results"]
    for case in cases:
        rows = [_cells(case, line) for line in case.lines]
        lines += ["", f"### {case.setting}, {case.workload}", "", *_markdown_table(HEADER, rows)]
    servers = sorted(
        {name for found in peak_rss_kib.values() for name in found}, key=lambda n: (n != OURS, n)
    )
    rows = [
        (setting, *(f"{found[name] / 1024:.0f}" if name in found else "" for name in servers))
        for setting, found in peak_rss_kib.items()
    ]
    lines += [
        "",
        "## Peak memory",
        "",
        "Peak resident memory (VmHWM) of each daemon under this load, in MiB.",
        "",
    ]
    lines += _markdown_table(("setting", *servers), rows)
    return "\n".join(lines) + "\n"
