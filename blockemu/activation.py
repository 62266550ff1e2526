# SPDX-License-Identifier: Apache-2.0
"""Socket activation: listening sockets that a service manager opened for us.

The protocol is systemd's (sd_listen_fds(3)), which others speak as well. `LISTEN_FDS` says how many
there are, from descriptor 3 on; `LISTEN_PID` for whom they are, so that a child that inherits the
variables by mistake doesn't take them; `LISTEN_FDNAMES` how each is called
(`FileDescriptorName=`). One named `control` or `qmp` is for the control socket; all others are
for NBD clients.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from blockemu.addresses import InheritedAddress
from blockemu.errors import DaemonError

FIRST_FD = 3
"""After stdin, stdout and stderr."""

FDS_MAX = 256
"""More sockets than anybody listens on: the variable lies."""

CONTROL_NAMES = frozenset({"control", "qmp"})

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_SHOWN = "LISTEN_FDS"


@dataclass(frozen=True, slots=True)
class Activation:
    """The sockets that are ours, by what they are for."""

    nbd: tuple[InheritedAddress, ...] = ()
    control: tuple[InheritedAddress, ...] = ()


def take_activation(environment: MutableMapping[str, str], *, pid: int) -> Activation:
    """What the service manager handed over, if it did; the variables are gone afterwards, so that
    children don't read them. Raises: DaemonError, when they contradict themselves."""
    values = {name: environment.pop(name, "") for name in _VARIABLES}
    if not values["LISTEN_FDS"] or values["LISTEN_PID"] != str(pid):
        return Activation()
    count_text = values["LISTEN_FDS"]
    if not count_text.isascii() or not count_text.isdigit() or int(count_text) > FDS_MAX:
        raise DaemonError(_SHOWN, f"'{count_text}' is not a number of sockets up to {FDS_MAX}")
    count = int(count_text)
    names = values["LISTEN_FDNAMES"].split(":") if values["LISTEN_FDNAMES"] else [""] * count
    if len(names) != count:
        raise DaemonError(_SHOWN, f"{count} sockets have {len(names)} names (LISTEN_FDNAMES)")
    found = [InheritedAddress(FIRST_FD + index, name) for index, name in enumerate(names)]
    return Activation(
        nbd=tuple(address for address in found if address.name not in CONTROL_NAMES),
        control=tuple(address for address in found if address.name in CONTROL_NAMES),
    )


def adopt(address: InheritedAddress) -> socket.socket:
    """The socket itself: listening, and non-blocking from now on. Raises: DaemonError."""
    name = f"socket {address.fd}" + (f" ('{address.name}')" if address.name else "")
    try:
        sock = socket.socket(fileno=address.fd)
    except OSError as error:
        raise DaemonError(name, f"was not handed over: {error.strerror}") from error
    try:
        if sock.type != socket.SOCK_STREAM:
            raise DaemonError(name, "is no stream socket (ListenStream=)")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise DaemonError(name, "does not listen (Accept=yes is not for us)")
        os.set_inheritable(address.fd, False)
        sock.setblocking(False)
    except BaseException:
        sock.detach()
        raise
    return sock
