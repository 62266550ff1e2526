# SPDX-License-Identifier: Apache-2.0
"""Where a server listens, and who may ask what there is: the options of commands that serve."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from blockemu.cli.option_group import option_group

if TYPE_CHECKING:
    from blockemu.addresses import Address, InheritedAddress, TcpAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerOptions:
    """`addresses` for clients of NBD, at least one; `control_sockets` for those of QMP."""

    addresses: tuple[Address, ...]
    control_sockets: tuple[InheritedAddress, ...]
    listing: str


def _listeners(
    socket_paths: tuple[str, ...],
    socket_mode: str | None,
    socket_owner: str | None,
    hosts: tuple[str, ...],
    ports: tuple[int, ...],
    vsocks: tuple[str, ...],
    listing: str,
) -> ListenerOptions:
    from blockemu.activation import take_activation
    from blockemu.addresses import (
        SOCKET_MODE,
        TcpAddress,
        UnixAddress,
        parse_mode,
        parse_owner,
        parse_vsock,
    )

    if not socket_paths and (socket_mode is not None or socket_owner is not None):
        raise click.UsageError("--socket-mode and --socket-owner go with --socket only.")
    mode = SOCKET_MODE if socket_mode is None else parse_mode(socket_mode)
    user_id, group_id = (None, None) if socket_owner is None else parse_owner(socket_owner)
    activation = take_activation(os.environ, pid=os.getpid())
    addresses: list[Address] = [UnixAddress(path, mode, user_id, group_id) for path in socket_paths]
    addresses += tcp_addresses(hosts, ports)
    addresses += [parse_vsock(text) for text in vsocks]
    addresses += activation.nbd
    return ListenerOptions(
        addresses=tuple(addresses or [TcpAddress()]),
        control_sockets=activation.control,
        listing=listing,
    )


def tcp_addresses(hosts: Sequence[str], ports: Sequence[int]) -> list[TcpAddress]:
    """Ports belong to the hosts in their order; one port is for all hosts. Raises: UsageError."""
    from blockemu.addresses import NBD_PORT, TcpAddress

    if not hosts:
        return [TcpAddress(port=port) for port in ports]
    if len(ports) <= 1:
        return [TcpAddress(host, *ports) if ports else TcpAddress(host, NBD_PORT) for host in hosts]
    if len(ports) != len(hosts):
        raise click.UsageError(
            f"--port is given {len(ports)} times for {len(hosts)} --bind: once for all, or once "
            "for each."
        )
    return [TcpAddress(host, port) for host, port in zip(hosts, ports, strict=True)]


listener_options = option_group(
    "listeners",
    _listeners,
    click.option(
        "--socket",
        "socket_paths",
        multiple=True,
        metavar="PATH",
        help="Listen on this unix socket; may be repeated, and goes with --bind.",
    ),
    click.option(
        "--socket-mode",
        metavar="MODE",
        default=None,
        help="Permissions of the unix sockets, in octal.  [default: 600]",
    ),
    click.option(
        "--socket-owner",
        metavar="USER:GROUP",
        default=None,
        help="Whose the unix sockets are: USER, USER:GROUP or :GROUP.",
    ),
    click.option(
        "--bind",
        "hosts",
        multiple=True,
        metavar="ADDR",
        help="Listen on this address or host name; may be repeated.  [default: 127.0.0.1, "
        "where no other address is given]",
    ),
    click.option(
        "--port",
        "ports",
        multiple=True,
        type=click.IntRange(0, 65535),
        help="Listen on this TCP port; 0 is any free one. Once for all --bind, or once for each.  "
        "[default: 10809]",
    ),
    click.option(
        "--vsock",
        "vsocks",
        multiple=True,
        metavar="CID:PORT",
        help="Listen for virtual machines; may be repeated. The CID may be any.",
    ),
    click.option(
        "--list",
        "listing",
        type=click.Choice(["all", "local", "none"]),
        default="all",
        show_default=True,
        help="Who may ask what exports there are: all, clients on unix sockets, or none.",
    ),
)
"""--socket, --socket-mode, --socket-owner, --bind, --port, --vsock, --list, and the sockets that a
service manager hands over, handed in as `listeners`."""
