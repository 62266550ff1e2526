# SPDX-License-Identifier: Apache-2.0
"""Commands about the NBD server, by QEMU's names: start, stop, and its old pair of commands for
exports, which are named as they are offered."""

from __future__ import annotations

import dataclasses
import enum
import re
from dataclasses import dataclass, field
from typing import Any

from blockemu.addresses import Address, InheritedAddress, TcpAddress, UnixAddress, parse_vsock
from blockemu.exports import ExportSpec
from blockemu.nbd.tls import tls_policy
from blockemu.qmp.command import Command, Session
from blockemu.qmp.commands.block_export import (
    MODE_DEFAULT,
    Mode,
    add_export,
    remove_export,
)
from blockemu.qmp.commands.nodes import find_node
from blockemu.qmp.errors import QmpError
from blockemu.qmp.schema import NoArguments, parse_arguments

CONNECTIONS_DEFAULT = 100
"""QEMU's, when a client starts the server; 0 is as many as our own limit lets in."""


class AddressType(enum.Enum):
    """Kinds of SocketAddressLegacy."""

    INET = "inet"
    UNIX = "unix"
    VSOCK = "vsock"
    FD = "fd"


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """SocketAddressLegacy: `data` is as `type` says."""

    type: AddressType
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class InetData:
    """Of `inet`: both are strings."""

    host: str
    port: str


@dataclass(frozen=True, slots=True)
class UnixData:
    """Of `unix`."""

    path: str


@dataclass(frozen=True, slots=True)
class VsockData:
    """Of `vsock`: numbers as strings."""

    cid: str
    port: str


@dataclass(frozen=True, slots=True)
class FdData:
    """Of `fd`: the number of a descriptor that we were started with."""

    number: str = field(metadata={"key": "str"})


@dataclass(frozen=True, slots=True)
class NbdServerStartArguments:
    """Of `nbd-server-start`."""

    addr: SocketAddress
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: int = CONNECTIONS_DEFAULT


@dataclass(frozen=True, slots=True)
class NbdServerAddArguments:
    """Of `nbd-server-add`. `name`: None is as the node."""

    device: str
    name: str | None = None
    description: str = ""
    writable: bool = False
    bitmap: str | None = None


@dataclass(frozen=True, slots=True)
class NbdServerRemoveArguments:
    """Of `nbd-server-remove`."""

    name: str
    mode: Mode = MODE_DEFAULT


async def nbd_server_start(session: Session, arguments: NbdServerStartArguments) -> dict[str, Any]:
    """Listen for clients of NBD."""
    daemon = session.daemon
    if daemon.nbd.is_running:
        raise QmpError("NBD server already running")
    limits = daemon.config.limits
    if arguments.max_connections < 0:
        raise QmpError("Parameter 'max-connections' expects uint32_t")
    if arguments.max_connections:
        connections_max = min(arguments.max_connections, limits.connections_max)
        limits = dataclasses.replace(limits, connections_max=connections_max)
    tls = tls_policy(
        daemon.opener.objects,
        credentials_id=arguments.tls_creds,
        authz_id=arguments.tls_authz,
        says=("tls-creds", "tls-authz", "tls"),
    )
    addresses = [parse_address(arguments.addr)]
    daemon.nbd.start(addresses, limits, listing=daemon.config.listing, tls=tls)
    return {}


def parse_address(addr: SocketAddress) -> Address:
    """Raises: QmpError, DaemonError."""
    if addr.type is AddressType.UNIX:
        return UnixAddress(parse_arguments(UnixData, addr.data, path="addr.data.").path)
    if addr.type is AddressType.VSOCK:
        vsock = parse_arguments(VsockData, addr.data, path="addr.data.")
        return parse_vsock(f"{vsock.cid}:{vsock.port}")
    if addr.type is AddressType.FD:
        fd = parse_arguments(FdData, addr.data, path="addr.data.").number
        if not re.fullmatch(r"[0-9]{1,6}", fd):
            raise QmpError(f"Parameter 'addr.data.str' is a descriptor's number, not '{fd}'")
        return InheritedAddress(int(fd))
    inet = parse_arguments(InetData, addr.data, path="addr.data.")
    if not re.fullmatch(r"[0-9]{1,5}", inet.port):
        raise QmpError(f"Parameter 'addr.data.port' is a port's number, not '{inet.port}'")
    return TcpAddress(inet.host, int(inet.port))


async def nbd_server_add(session: Session, arguments: NbdServerAddArguments) -> dict[str, Any]:
    """Export a node under its name or another; the export's id is that name."""
    if not session.daemon.nbd.is_running:
        raise QmpError("NBD server not running")
    node = find_node(session, device=arguments.device, node_name=arguments.device)
    name = arguments.device if arguments.name is None else arguments.name
    spec = ExportSpec(
        name=name,
        id=name,
        # As QEMU has it: a read-only node is exported so, whatever was asked.
        writable=arguments.writable and not node.read_only,
        description=arguments.description,
        bitmaps=() if arguments.bitmap is None else (arguments.bitmap,),
    )
    await add_export(session, node, spec)
    return {}


async def nbd_server_remove(
    session: Session, arguments: NbdServerRemoveArguments
) -> dict[str, Any]:
    """Remove an export by its id, which `nbd-server-add` makes the same as its name."""
    export = session.daemon.exports.by_id(arguments.name)
    if export is None:
        raise QmpError(f"Export '{arguments.name}' is not found")
    remove_export(session, export, arguments.mode)
    return {}


async def nbd_server_stop(session: Session, arguments: NoArguments) -> dict[str, Any]:
    """Remove all exports, the hard way, and listen no more. Suspends: until nothing is left."""
    daemon = session.daemon
    if not daemon.nbd.is_running:
        raise QmpError("NBD server not running")
    await daemon.export_control.close_all()
    await daemon.nbd.stop()
    return {}


COMMANDS = (
    Command("nbd-server-start", nbd_server_start, NbdServerStartArguments),
    Command("nbd-server-add", nbd_server_add, NbdServerAddArguments),
    Command("nbd-server-remove", nbd_server_remove, NbdServerRemoveArguments),
    Command("nbd-server-stop", nbd_server_stop),
)
