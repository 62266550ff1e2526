# SPDX-License-Identifier: Apache-2.0
"""The list of internal snapshots, as `qemu-img snapshot -l` and `info` of version 7.2 print it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockemu.img.size import format_size
from blockemu.loop.clock import local_time_text

_NS_PER_MS = 1_000_000


def format_snapshots(snapshots: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for the facts of SnapshotInfo; none where there is no snapshot. Dates are local."""
    if not snapshots:
        return []
    titles = ("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    return ["Snapshot list:", _line(*titles), *(_snapshot_line(facts) for facts in snapshots)]


def _snapshot_line(facts: dict[str, Any]) -> str:
    seconds = facts["vm-clock-sec"]
    milliseconds = facts["vm-clock-nsec"] // _NS_PER_MS
    return _line(
        facts["id"],
        facts["name"],
        format_size(facts["vm-state-size"]),
        local_time_text(facts["date-sec"]),
        f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}",
        str(facts.get("icount", "")),
    )


def _line(own_id: str, tag: str, size: str, date: str, clock: str, icount: str) -> str:
    return f"{_padded(own_id, 9)} {_padded(tag, 16)} {size:>8}{date:>20}{clock:>13}{icount:>11}"


def _padded(text: str, width: int) -> str:
    """By bytes, as theirs: a column of names that aren't ASCII is narrower."""
    return text + " " * (width - len(text.encode("utf-8", "surrogateescape")))
