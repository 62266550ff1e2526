# SPDX-License-Identifier: Apache-2.0
"""Where a server may listen, as data: what users write, and what they are told.

A vsock address is a port on a machine's *context id*, by which a hypervisor and its guests talk
without a network: 2 is the host, 1 this machine itself, and no id means whoever asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from blockemu.errors import DaemonError

NBD_PORT = 10809
"""Assigned to NBD by IANA."""

SOCKET_MODE = 0o600
"""Of a unix socket's file: only its owner may connect."""

_UINT32_MAX = 2**32 - 1
_VSOCK = re.compile(r"(?:vsock://)?(?:(?P<cid>[0-9]{1,10}|any)?:)?(?P<port>[0-9]{1,10})/?")


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Port 0 is any free port."""

    host: str = "127.0.0.1"
    port: int = NBD_PORT


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket path; the file's permissions; its user and group, where they are to be others than
    ours."""

    path: str
    mode: int = SOCKET_MODE
    user_id: int | None = None
    group_id: int | None = None


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """`cid` None listens for whoever asks for this machine, by whichever id."""

    port: int = NBD_PORT
    cid: int | None = None


@dataclass(frozen=True, slots=True)
class InheritedAddress:
    """A listening socket that we were started with (activation.py)."""

    fd: int
    name: str = ""


Address = TcpAddress | UnixAddress | VsockAddress | InheritedAddress


def parse_vsock(text: str) -> VsockAddress:
    """`PORT`, `CID:PORT` or `vsock://CID:PORT`; the id may be `any`. Raises: DaemonError."""
    found = _VSOCK.fullmatch(text)
    if found is None:
        raise DaemonError(f"vsock '{text}'", "is not CID:PORT, two numbers, such as 2:10809")
    port = int(found["port"])
    cid = None if found["cid"] in (None, "any") else int(found["cid"])
    # All bits set means "any" to the kernel, in both.
    if port >= _UINT32_MAX or (cid is not None and cid >= _UINT32_MAX):
        raise DaemonError(f"vsock '{text}'", f"numbers are at most {_UINT32_MAX - 1}")
    return VsockAddress(port=port, cid=cid)


def parse_mode(text: str) -> int:
    """A file mode in octal, such as 660. Raises: DaemonError."""
    if not re.fullmatch(r"0?o?[0-7]{3}", text):
        raise DaemonError(f"--socket-mode {text}", "is not three octal digits, such as 660")
    return int(text.replace("o", ""), 8)


def parse_owner(text: str) -> tuple[int | None, int | None]:
    """`(user id, group id)` of `USER`, `USER:GROUP` or `:GROUP`, by name or number.

    Raises: DaemonError.
    """
    import grp
    import pwd

    user, _, group = text.partition(":")
    if not user and not group:
        raise DaemonError(f"--socket-owner '{text}'", "is not USER, USER:GROUP or :GROUP")
    try:
        user_id = None if not user else _id_of(user, lambda name: pwd.getpwnam(name).pw_uid)
    except KeyError:
        raise DaemonError(f"--socket-owner {text}", f"there is no user '{user}'") from None
    try:
        group_id = None if not group else _id_of(group, lambda name: grp.getgrnam(name).gr_gid)
    except KeyError:
        raise DaemonError(f"--socket-owner {text}", f"there is no group '{group}'") from None
    return user_id, group_id


def _id_of(text: str, look_up: Callable[[str], int]) -> int:
    """A number as it is; a name as `look_up` finds it. Raises: KeyError."""
    if not re.fullmatch(r"[0-9]+", text):
        return look_up(text)
    if int(text) >= _UINT32_MAX:
        raise KeyError(text)
    return int(text)
