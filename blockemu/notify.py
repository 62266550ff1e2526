# SPDX-License-Identifier: Apache-2.0
"""Telling the service manager how we are: systemd's notification protocol.

A manager that wants to know sets NOTIFY_SOCKET to the path of a unix datagram socket, or to `@name`
for one in the abstract namespace. Each message is a few lines of KEY=VALUE. We send READY=1 when
every export can be reached, and STOPPING=1 when an orderly shutdown begins. See sd_notify(3).

Nothing here may keep the daemon from working: a manager that is gone costs a line in the log.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

log = logging.getLogger(__name__)

Notify = Callable[[str], None]
"""Sends one message, such as "READY=1"."""


def no_notify(message: str) -> None:
    """For a daemon that nobody supervises."""


def make_notify(address: str | None) -> Notify:
    """A sender for NOTIFY_SOCKET's value `address`; does nothing where that is unset or unusable.

    The socket is opened for each message: there are two in a daemon's life.
    """
    if not address:
        return no_notify
    if address[0] not in "/@":
        log.warning("NOTIFY_SOCKET=%s: neither an absolute path nor @name; ignored", address)
        return no_notify
    peer = "\0" + address[1:] if address[0] == "@" else address

    def notify(message: str) -> None:
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sender:
                sender.sendto(message.encode(), peer)
        except OSError as error:
            log.warning("NOTIFY_SOCKET=%s: %s", address, error.strerror or error)

    return notify
