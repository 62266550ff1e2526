# SPDX-License-Identifier: Apache-2.0
"""One load on one export, or several at once: a child, and what it says of itself.

The child is fio, as users have it, or our lean client where fio would be the bottleneck: fio with
libnbd needs a core for what a fast server does with half of one.

fio's clock starts once it is connected, so a child that has run for nearly its time is under load:
that is when `under_load` is called.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from benchmarks.native_programs import compiled
from benchmarks.workloads import Workload
from tests.peers.fio import Fio
from tests.peers.qemu import ToolFailed, ToolResult

FINISH_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What one client did.

    Latencies are from the request's submission to its reply. fio's usual percentiles begin when
    the submission has returned, and a fast server has answered by then.
    """

    requests: int
    iops: float
    bandwidth_bytes: float
    mean_us: float
    p50_us: float
    p99_us: float
    client_cpu_us: float
    """CPU time of the client's thread, in all."""


def parse_result(output: str) -> LoadResult:
    """The only job in fio's JSON, which may follow other words; the lean client's is alike."""
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    side: dict[str, Any] = max(job["read"], job["write"], key=lambda half: half["total_ios"])
    latency = side["lat_ns"]
    percentile = latency.get("percentile", {})
    busy_percent = job.get("usr_cpu", 0.0) + job.get("sys_cpu", 0.0)
    return LoadResult(
        requests=side["total_ios"],
        iops=side["iops"],
        bandwidth_bytes=side["bw_bytes"],
        mean_us=latency["mean"] / 1000,
        p50_us=percentile.get("50.000000", 0) / 1000,
        p99_us=percentile.get("99.000000", 0) / 1000,
        client_cpu_us=busy_percent / 100 * job.get("job_runtime", 0) * 1000,
    )


def fio_command(uri: str, workload: Workload, runtime_s: float) -> list[str]:
    """fio's nbd engine."""
    return Fio(uri).command(
        pattern=workload.pattern,
        block_bytes=workload.block_bytes,
        depth=workload.depth,
        extra=[
            f"--runtime={round(runtime_s * 1000)}ms",
            "--time_based",
            "--clat_percentiles=0",
            "--lat_percentiles=1",
        ],
    )


def lean_command(uri: str, workload: Workload, runtime_s: float) -> list[str]:
    """Our client, which knows unix sockets and random loads only."""
    parts = urlsplit(uri)
    assert parts.scheme == "nbd+unix", uri
    assert workload.pattern in ("randread", "randwrite"), workload
    return [
        str(compiled("lean_client")),
        parse_qs(parts.query)["socket"][0],
        unquote(parts.path.removeprefix("/")),
        workload.pattern.removeprefix("rand"),
        str(workload.block_bytes),
        str(workload.depth),
        str(round(runtime_s * 1000)),
        workload.style,
    ]


def run_loads(
    uris: Sequence[str],
    workload: Workload,
    *,
    runtime_s: float,
    under_load: Callable[[], None] = lambda: None,
) -> list[LoadResult]:
    """The same load on each of `uris` at once; results in their order.

    Raises: ToolFailed when a client reports an error.
    """
    command_of = lean_command if workload.lean else fio_command
    commands = [command_of(uri, workload, runtime_s) for uri in uris]
    with contextlib.ExitStack() as stack:
        children = []
        for command in commands:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(child)
            stack.callback(child.kill)  # nothing, once it has ended
            children.append(child)
        try:
            children[0].wait(runtime_s * 0.9)
        except subprocess.TimeoutExpired:
            under_load()
        results = []
        for command, child in zip(commands, children, strict=True):
            stdout, stderr = child.communicate(timeout=FINISH_TIMEOUT_S + runtime_s)
            if child.returncode != 0 or "{" not in stdout:
                raise ToolFailed(command, ToolResult(child.returncode, "", stderr))
            results.append(parse_result(stdout))
        return results


def run_load(
    uri: str,
    workload: Workload,
    *,
    runtime_s: float,
    under_load: Callable[[], None] = lambda: None,
) -> LoadResult:
    """One load on one export. Raises: ToolFailed."""
    [result] = run_loads([uri], workload, runtime_s=runtime_s, under_load=under_load)
    return result
