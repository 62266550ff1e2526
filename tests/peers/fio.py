# SPDX-License-Identifier: Apache-2.0
"""``fio`` with its nbd engine: load, latencies, and data verification."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.peers.libnbd import home_with
from tests.peers.qemu import ToolFailed, ToolResult, run_tool


@dataclass(frozen=True, slots=True)
class FioResult:
    """What one fio job did."""

    requests: int
    iops: float
    bandwidth_bytes: float
    p50_us: float
    p99_us: float


def _direction(job: dict[str, Any]) -> dict[str, Any]:
    """The half of a job that did the work: read or write."""
    read: dict[str, Any] = job["read"]
    write: dict[str, Any] = job["write"]
    return read if read["total_ios"] >= write["total_ios"] else write


def _run_watched(command: Sequence[str], runtime_s: float, under_load: Callable[[], None]) -> str:
    """Run fio with a call in the middle; `runtime_s` begins after connecting: it is busy then."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=runtime_s * 0.9)
        except subprocess.TimeoutExpired:
            under_load()
            try:
                stdout, stderr = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    if process.returncode != 0 or "{" not in stdout:
        raise ToolFailed(command, ToolResult(process.returncode, "", stderr))
    return stdout


class Fio:
    """``fio --ioengine=nbd`` against one URI."""

    def __init__(self, uri: str, *, credentials: Path | None = None) -> None:
        """`credentials`: a folder with the client's certificate, for `verify` with TLS; libnbd
        takes none from fio's URI."""
        self.uri = uri
        self._credentials = credentials

    def command(
        self, *, pattern: str, block_bytes: int, depth: int, extra: Sequence[str] = ()
    ) -> list[str]:
        """The command line of one job."""
        return [
            "fio",
            "--name=load",
            "--thread",
            "--ioengine=nbd",
            f"--uri={self.uri}",
            f"--rw={pattern}",
            f"--bs={block_bytes}",
            f"--iodepth={depth}",
            "--randrepeat=0",
            "--norandommap",
            "--output-format=json",
            *extra,
        ]

    def run(
        self,
        *,
        pattern: str,
        block_bytes: int,
        depth: int,
        runtime_s: float,
        extra: Sequence[str] = (),
        under_load: Callable[[], None] = lambda: None,
    ) -> FioResult:
        """Load for `runtime_s` seconds; `under_load` is called once while the load still runs.

        Raises: ToolFailed when fio reports an error.
        """
        timed = [f"--runtime={round(runtime_s * 1000)}ms", "--time_based", *extra]
        command = self.command(pattern=pattern, block_bytes=block_bytes, depth=depth, extra=timed)
        output = _run_watched(command, runtime_s, under_load)
        side = _direction(json.loads(output[output.index("{") :])["jobs"][0])
        percentile = side["clat_ns"].get("percentile", {})
        return FioResult(
            requests=side["total_ios"],
            iops=side["iops"],
            bandwidth_bytes=side["bw_bytes"],
            p50_us=percentile.get("50.000000", 0) / 1000,
            p99_us=percentile.get("99.000000", 0) / 1000,
        )

    def verify(
        self, *, size_bytes: int, block_bytes: int = 4096, depth: int = 16, seed: int = 1
    ) -> str:
        """Write checksummed blocks in random order, read all of them back and check each.

        Raises: ToolFailed when a block came back wrong.
        """
        words = self.command(
            pattern="randwrite",
            block_bytes=block_bytes,
            depth=depth,
            extra=[
                f"--size={size_bytes}",
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
                "--verify_state_save=0",
                f"--randseed={seed}",
            ],
        )
        words = [word for word in words if word not in ("--randrepeat=0", "--norandommap")]
        with home_with(self._credentials) as (home, user):
            return run_tool(words, home=home, user=user).stdout
