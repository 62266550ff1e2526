# SPDX-License-Identifier: Apache-2.0
"""Commands that make and remove exports, by QEMU's names and with its sentences."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blockemu.drivers.errors import ImageError
from blockemu.export_control import ExportInUse, RemoveMode
from blockemu.exports import ExportSpec
from blockemu.qmp.command import Command, Session
from blockemu.qmp.commands.nodes import find_node
from blockemu.qmp.errors import QmpError

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState
    from blockemu.exports import Export

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class ExportType(enum.Enum):
    """Kinds of exports that we have."""

    NBD = "nbd"


class Mode(enum.Enum):
    """How an export goes. `soft` isn't QEMU's: its clients stay until they leave."""

    SAFE = "safe"
    SOFT = "soft"
    HARD = "hard"


MODE_DEFAULT = Mode.SAFE


@dataclass(frozen=True, slots=True)
class ExportAddArguments:
    """Of `block-export-add`. `max-connections`, `hidden`, `rotational` and `resizable` aren't
    QEMU's."""

    type: ExportType
    id: str
    node_name: str
    name: str | None = None
    description: str = ""
    writable: bool = False
    writethrough: bool = False
    iothread: str | None = None
    fixed_iothread: bool = False
    bitmaps: list[str] = field(default_factory=list)
    allocation_depth: bool = False
    max_connections: int | None = None
    hidden: bool = False
    rotational: bool | None = None
    resizable: bool = False


@dataclass(frozen=True, slots=True)
class ExportDelArguments:
    """Of `block-export-del`."""

    id: str
    mode: Mode = MODE_DEFAULT


async def block_export_add(session: Session, arguments: ExportAddArguments) -> dict[str, Any]:
    """Export a node."""
    if not _ID.fullmatch(arguments.id):
        raise QmpError("Invalid block export id")
    if session.daemon.exports.by_id(arguments.id) is not None:
        raise QmpError(f"Block export id '{arguments.id}' is already in use")
    node = find_node(session, node_name=arguments.node_name)
    _check_iothread(session, node, arguments)
    if not session.daemon.nbd.is_running:
        raise QmpError("NBD server not running")
    if arguments.writethrough:
        raise QmpError("Parameter 'writethrough' can't be on: use FUA, or flush")
    if arguments.max_connections is not None and arguments.max_connections < 1:
        raise QmpError("Parameter 'max-connections' expects at least 1")
    spec = ExportSpec(
        name=arguments.node_name if arguments.name is None else arguments.name,
        id=arguments.id,
        writable=arguments.writable,
        description=arguments.description,
        hidden=arguments.hidden,
        connections_max=arguments.max_connections,
        rotational=arguments.rotational,
        resizable=arguments.resizable,
        bitmaps=tuple(arguments.bitmaps),
        allocation_depth=arguments.allocation_depth,
    )
    await add_export(session, node, spec)
    return {}


def _check_iothread(
    session: Session, node: BlockDriverState, arguments: ExportAddArguments
) -> None:
    """A node's thread was chosen when it was opened; wishes for another one are heard only if they
    are fixed, and then refused, as QEMU does with a node that is in use."""
    if arguments.iothread is None:
        return
    thread = session.daemon.iothreads.get(arguments.iothread)
    if thread is None:
        raise QmpError(f'iothread "{arguments.iothread}" not found')
    if arguments.fixed_iothread and thread.ctx is not node.ctx:
        raise QmpError(f"Node '{arguments.node_name}' runs in {node.ctx.name}, and stays there")


async def add_export(session: Session, node: BlockDriverState, spec: ExportSpec) -> None:
    """What both ways to add one have in common. Raises: QmpError, ImageError."""
    daemon = session.daemon
    length_max = daemon.config.limits.name_length_max
    for what, text in (("export name", spec.name), ("description", spec.description)):
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise QmpError(f"{what} isn't UTF-8") from None
        if length > length_max:
            raise QmpError(f"{what} '{text[:64]}...' too long")
    if spec.id is not None and daemon.exports.by_id(spec.id) is not None:
        raise QmpError(f"Block export id '{spec.id}' is already in use")
    if daemon.exports.has(spec.name):
        raise QmpError(f"NBD server already has export named '{spec.name}'")
    try:
        await daemon.add_export(node, spec)
    except ImageError as error:
        raise QmpError(str(error)) from error


async def block_export_del(session: Session, arguments: ExportDelArguments) -> dict[str, Any]:
    """Begin to remove an export; BLOCK_EXPORT_DELETED tells when nothing is left of it."""
    export = session.daemon.exports.by_id(arguments.id)
    if export is None:
        raise QmpError(f"Export '{arguments.id}' is not found")
    remove_export(session, export, arguments.mode)
    return {}


def remove_export(session: Session, export: Export, mode: Mode) -> None:
    """Raises: QmpError."""
    try:
        session.daemon.export_control.remove(export, RemoveMode(mode.value))
    except ExportInUse:
        raise QmpError(f"export '{export.id}' still in use") from None


COMMANDS = (
    Command("block-export-add", block_export_add, ExportAddArguments),
    Command("block-export-del", block_export_del, ExportDelArguments),
)
