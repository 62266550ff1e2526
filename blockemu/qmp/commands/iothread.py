# SPDX-License-Identifier: Apache-2.0
"""Commands about IOThreads."""

from __future__ import annotations

from typing import Any

from blockemu.qmp.command import Command, Session
from blockemu.qmp.schema import NoArguments


async def query_iothreads(session: Session, arguments: NoArguments) -> list[dict[str, Any]]:
    """All IOThreads. `thread-id` is the kernel's, as `top -H` shows it. Polling is off (0)."""
    return [
        {
            "id": thread.name,
            "thread-id": thread.thread_id,
            "poll-max-ns": 0,
            "poll-grow": 0,
            "poll-shrink": 0,
            "aio-max-batch": 0,
        }
        for thread in session.daemon.iothreads.values()
    ]


COMMANDS = (Command("query-iothreads", query_iothreads),)
