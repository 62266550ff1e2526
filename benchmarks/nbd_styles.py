# SPDX-License-Identifier: Apache-2.0
"""What structured replies and extended headers cost, against simple replies from the same server.

4 KiB at depth 32 on one raw image in the page cache, by the lean client, which takes a processor's
time for itself but not for the server. The styles take turns, seconds apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.cpu_clock import process_cpu_ns
from benchmarks.load import run_load
from benchmarks.measure import rotated
from benchmarks.nbd_sample import Sample
from benchmarks.workloads import KIB, MIB, Workload
from tests.peers.blockemu import BlockemuDaemon

STYLES = ("simple", "structured", "extended")
PATTERNS = ("randread", "randwrite")
IMAGE_BYTES = 256 * MIB


def measure_styles(folder: Path, *, rounds: int, runtime_s: float) -> Iterator[Sample]:
    """IOPS, and CPU time of the server per request. Raises: ServerFailed, ToolFailed."""
    image = folder / "styles.raw"
    block = bytes(range(256)) * (MIB // 256)
    with image.open("wb") as file:
        for _ in range(IMAGE_BYTES // MIB):
            file.write(block)
    with BlockemuDaemon(image, fmt="raw", socket_path=folder / "styles.sock") as server:
        for pattern in PATTERNS:
            for turn in range(rounds):
                for style in rotated(STYLES, turn):
                    load = Workload(pattern, pattern, 4 * KIB, 32, lean=True, style=style)
                    cpu_ns = process_cpu_ns(server.pid)
                    found = run_load(server.uri, load, runtime_s=runtime_s)
                    cpu_ns = process_cpu_ns(server.pid) - cpu_ns
                    cpu_us = cpu_ns / 1000 / max(found.requests, 1)
                    yield Sample(f"{pattern}-4k-d32", style, "IOPS", turn, found.iops)
                    yield Sample(f"{pattern}-4k-d32 CPU", style, "us/req", turn, cpu_us)
    image.unlink()
