# SPDX-License-Identifier: Apache-2.0
"""Commands about exports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockemu.qmp.command import Command, Session
from blockemu.qmp.schema import NoArguments

if TYPE_CHECKING:
    from blockemu.nbd.statistics import ExportSnapshot


async def query_block_exports(session: Session, arguments: NoArguments) -> list[dict[str, Any]]:
    """All exports, and those that are being removed. One of `serve` has its name as its id."""
    return [
        {
            "node-name": export.backend.node.node_name,
            "shutting-down": export.shutting_down,
            "type": "nbd",
            "id": export.id,
        }
        for export in session.daemon.exports.with_leaving()
    ]


async def query_export_stats(session: Session, arguments: NoArguments) -> list[dict[str, Any]]:
    """What clients have asked of each export so far, and how long it took. Not a command of QEMU's:
    members may change."""
    return [
        {"id": export.id, **describe_statistics(export.statistics.snapshot())}
        for export in session.daemon.exports
    ]


def describe_statistics(snapshot: ExportSnapshot) -> dict[str, Any]:
    """Figures of one export. Latencies are in nanoseconds."""
    return {
        "operations": [
            {
                "operation": name,
                "requests": operation.requests,
                "bytes": operation.bytes,
                "errors": operation.errors,
                "latency-mean-ns": operation.latency_mean_ns,
                "latency-p50-ns": operation.latency_p50_ns,
                "latency-p99-ns": operation.latency_p99_ns,
                "latency-p999-ns": operation.latency_p999_ns,
            }
            for name, operation in snapshot.operations.items()
        ],
        "faults": snapshot.faults,
    }


COMMANDS = (
    Command("query-block-exports", query_block_exports),
    Command("x-query-export-stats", query_export_stats),
)
