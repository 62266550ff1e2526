# SPDX-License-Identifier: Apache-2.0
"""How long a well-behaved client waits for its reads."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.protocol.client import Client
from tests.protocol.wire import Cmd

BLOCK_BYTES = 4096


def read_latencies_s(path: Path, export: str, *, depth: int, requests: int) -> list[float]:
    """The latency of each of so many random reads of 4 KiB, sorted, the quickest first."""
    rng = random.Random(1)
    began: dict[int, float] = {}
    took: list[float] = []
    with Client.entered(path, export) as client:
        blocks = client.size_bytes // BLOCK_BYTES

        def begin() -> None:
            offset = rng.randrange(blocks) * BLOCK_BYTES
            began[client.request(Cmd.READ, offset, BLOCK_BYTES)] = time.perf_counter()

        for _ in range(depth):
            begin()
        while len(took) < requests:
            reply = client.reply()
            took.append(time.perf_counter() - began.pop(reply.cookie))
            begin()
    return sorted(took)


def quantile(latencies: list[float], share: float) -> float:
    """Of a sorted list."""
    return latencies[min(int(len(latencies) * share), len(latencies) - 1)]
