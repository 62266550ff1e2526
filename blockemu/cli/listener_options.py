# SPDX-License-Identifier: Apache-2.0
"""Where a server listens: the options of commands that serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blockemu.cli.option_group import option_group

if TYPE_CHECKING:
    from blockemu.config import TcpAddress, UnixAddress


def _address(
    socket_path: str | None, host: str | None, port: int | None
) -> TcpAddress | UnixAddress:
    from blockemu.config import NBD_PORT, TcpAddress, UnixAddress

    if socket_path is None:
        return TcpAddress("127.0.0.1" if host is None else host, NBD_PORT if port is None else port)
    if host is not None or port is not None:
        raise click.UsageError("--socket goes without --bind and --port.")
    return UnixAddress(socket_path)


listener_options = option_group(
    "address",
    _address,
    click.option(
        "--socket",
        "socket_path",
        metavar="PATH",
        help="Listen on this unix socket, and not on TCP.",
    ),
    click.option(
        "--bind",
        "host",
        metavar="ADDR",
        default=None,
        help="Listen on this address or host name.  [default: 127.0.0.1]",
    ),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=None,
        help="Listen on this TCP port; 0 is any free one.  [default: 10809]",
    ),
)
"""--socket, --bind, --port, handed in as `address`."""
