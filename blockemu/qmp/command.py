# SPDX-License-Identifier: Apache-2.0
"""What a command is: a name, the dataclass of its arguments, a coroutine that carries it out.

A new one is a function under `commands/`, named in its module's tuple; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockemu.qmp.schema import NoArguments

if TYPE_CHECKING:
    from blockemu.daemon import Daemon


@dataclass(slots=True)
class Session:
    """What a command may see of where it came from."""

    daemon: Daemon
    commands: Mapping[str, Command]
    negotiated: bool = False
    """Capabilities negotiation is over: commands are heard."""


@dataclass(frozen=True, slots=True)
class Command:
    """One entry of the table."""

    name: str
    handler: Callable[[Session, Any], Awaitable[Any]]
    arguments: type = NoArguments
    in_negotiation: bool = False
    """Heard before capabilities are negotiated, and only then."""
