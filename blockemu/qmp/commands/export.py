# SPDX-License-Identifier: Apache-2.0
"""Commands about exports."""

from __future__ import annotations

from typing import Any

from blockemu.qmp.command import Command, Session
from blockemu.qmp.schema import NoArguments


async def query_block_exports(session: Session, arguments: NoArguments) -> list[dict[str, Any]]:
    """All exports. An export of `serve` has its name as its id."""
    return [
        {
            "node-name": export.backend.node.node_name,
            "shutting-down": False,
            "type": "nbd",
            "id": export.name,
        }
        for export in session.daemon.exports
    ]


COMMANDS = (Command("query-block-exports", query_block_exports),)
