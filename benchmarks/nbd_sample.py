# SPDX-License-Identifier: Apache-2.0
"""What the measurements of the NBD part have in common: a number, of whom, in which round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.summary import Spread


@dataclass(frozen=True, slots=True)
class Sample:
    """One number. `server` is who was measured, or how; the first one of a measure is compared with
    the others."""

    measure: str
    server: str
    unit: str
    round: int
    value: float


def ratios(samples: Sequence[Sample], measure: str, server: str, base: str) -> Spread | None:
    """`server`'s value over `base`'s, round by round; None where one of them is missing."""
    values = {
        name: {s.round: s.value for s in samples if (s.measure, s.server) == (measure, name)}
        for name in (server, base)
    }
    common = sorted(values[server].keys() & values[base].keys())
    found = [values[server][turn] / values[base][turn] for turn in common if values[base][turn]]
    return Spread.of(found) if found else None


def spread_of(samples: Sequence[Sample], measure: str, server: str) -> Spread | None:
    """Of all rounds; None where there are none."""
    found = [s.value for s in samples if (s.measure, s.server) == (measure, server)]
    return Spread.of(found) if found else None
