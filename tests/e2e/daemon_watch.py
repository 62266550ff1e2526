# SPDX-License-Identifier: Apache-2.0
"""What a daemon costs, seen from outside: descriptors and memory, and whether they come back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

GONE_S = 20.0


def open_descriptors(pid: int) -> int:
    """How many a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_kib(pid: int) -> int:
    """Memory that a process has now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def wait_for_descriptors(pid: int, count: int, ask: Callable[[], object]) -> None:
    """Until no more than `count` are open: the server may notice late that somebody has gone.
    `ask` has it do something meanwhile."""
    deadline = time.monotonic() + GONE_S
    while (found := open_descriptors(pid)) > count:
        assert time.monotonic() < deadline, f"{found} descriptors are open instead of {count}"
        ask()
