# SPDX-License-Identifier: Apache-2.0
"""Commands about the protocol itself, and the daemon's end."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from blockemu.qmp.command import Command, Session
from blockemu.qmp.errors import QmpError
from blockemu.qmp.schema import NoArguments
from blockemu.qmp.version import version_info


class Capability(enum.Enum):
    """Capabilities that the protocol knows."""

    OOB = "oob"


@dataclass(frozen=True, slots=True)
class CapabilitiesArguments:
    """`enable`: which of the capabilities that the greeting offered."""

    enable: list[Capability] = field(default_factory=list)


async def qmp_capabilities(session: Session, arguments: CapabilitiesArguments) -> dict[str, Any]:
    """End the negotiation. The greeting offers none, so none can be enabled."""
    if arguments.enable:
        name = arguments.enable[0].value
        raise QmpError(f"Capability '{name}' is not offered by this server")
    session.negotiated = True
    return {}


async def query_version(session: Session, arguments: NoArguments) -> dict[str, Any]:
    """Which QEMU's protocol this is, and what we are."""
    return version_info()


async def query_commands(session: Session, arguments: NoArguments) -> list[dict[str, Any]]:
    """The names of all commands."""
    return [{"name": name} for name in session.commands]


async def quit_(session: Session, arguments: NoArguments) -> dict[str, Any]:
    """End the daemon in good order, as SIGTERM does. The answer is sent before it begins."""
    session.daemon.stop()
    return {}


COMMANDS = (
    Command("qmp_capabilities", qmp_capabilities, CapabilitiesArguments, in_negotiation=True),
    Command("query-version", query_version),
    Command("query-commands", query_commands),
    Command("quit", quit_),
)
