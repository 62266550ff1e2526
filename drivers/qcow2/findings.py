# SPDX-License-Identifier: Apache-2.0
"""What a check finds: how much of each kind, and a line for each.

Three kinds, as qemu-img tells them apart. A *corruption* may cost data, now or at the next write. A
*leak* is space that is counted as used and that nothing names. A *check error* is something that
couldn't be looked at, so that the other two numbers are not the whole story.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LINES_MAX = 1000
"""Lines said about one image; the counts go on."""

Say = Callable[[str], None]
"""Takes one line."""


def say_nothing(line: str) -> None:
    """For a check that only counts."""


class Findings:
    """The running counts. `say` is called for each finding, LINES_MAX times at most."""

    def __init__(self, say: Say) -> None:
        self.corruptions = 0
        self.leaks = 0
        self.check_errors = 0
        self.lines_left_out = 0
        self._say = say
        self._said = 0

    @property
    def wants_lines(self) -> bool:
        """Whether the next finding's line will be said."""
        return self._said < LINES_MAX

    def corruption(self, line: str, count: int = 1) -> None:
        self.corruptions += count
        self._tell(f"corruption: {line}")

    def leak(self, line: str, count: int = 1) -> None:
        self.leaks += count
        self._tell(f"leak: {line}")

    def check_error(self, line: str, count: int = 1) -> None:
        self.check_errors += count
        self._tell(f"error: {line}")

    def _tell(self, line: str) -> None:
        if not self.wants_lines:
            self.lines_left_out += 1
            return
        self._said += 1
        self._say(line)

    def close(self) -> None:
        """Say how much was left unsaid."""
        if self.lines_left_out:
            self._say(f"... and {self.lines_left_out} more findings")


@dataclass(slots=True)
class CheckResult:
    """The sums of a check, under the names of QEMU's ImageCheck. Clusters, but for the offset."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    """Bytes: behind the last cluster that is used, or counted as used."""
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0

    @property
    def is_clean(self) -> bool:
        """No damage; there may be leaks."""
        return not self.corruptions and not self.check_errors
