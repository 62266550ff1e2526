# SPDX-License-Identifier: Apache-2.0
"""The commands, one module a topic. Each module's COMMANDS tuple ends up in this one table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from blockemu.qmp.command import Command
from blockemu.qmp.commands import (
    bitmap,
    block,
    block_export,
    export,
    iothread,
    monitor,
    nbd_server,
    objects,
)

_MODULES = (monitor, block, bitmap, block_export, export, nbd_server, iothread, objects)

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {command.name: command for module in _MODULES for command in module.COMMANDS}
)
"""Name -> command. Never changes."""
