# SPDX-License-Identifier: Apache-2.0
"""Commands about IOThreads."""

from __future__ import annotations

from typing import Any

from blockemu.qmp.command import Command, Session
from blockemu.qmp.schema import NoArguments


async def query_iothreads(session: Session, arguments: NoArguments) -> list[dict[str, Any]]:
    """All IOThreads. `thread-id` is the kernel's, as `top -H` shows it."""
    return [
        {
            "id": thread.name,
            "thread-id": thread.thread_id,
            "poll-max-ns": thread.poll_params.max_ns,
            "poll-grow": thread.poll_params.grow,
            "poll-shrink": thread.poll_params.shrink,
            "aio-max-batch": 0,
        }
        for thread in session.daemon.iothreads.values()
    ]


COMMANDS = (Command("query-iothreads", query_iothreads),)
