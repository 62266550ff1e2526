# SPDX-License-Identifier: Apache-2.0
"""What isn't servers side by side on one load: a table, verdicts and samples of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.targets import Verdict


@dataclass(frozen=True, slots=True)
class Section:
    """What the report prints under a heading of its own."""

    name: str
    title: str
    introduction: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    verdicts: Sequence[Verdict]
    verdicts_wanted: int
    samples: Sequence[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {
            "name": self.name,
            "table": [dict(zip(self.header, row, strict=True)) for row in self.rows],
            "samples": list(self.samples),
        }
