# SPDX-License-Identifier: Apache-2.0
"""NBD URIs of our exports, by the NBD URI specification: what a user pastes into a client."""

from __future__ import annotations

import os
from urllib.parse import quote

from blockemu.listen import format_host_port

_WILDCARDS = ("0.0.0.0", "::")


def tcp_uri(host: str, port: int, export_name: str, *, tls: bool = False) -> str:
    """`nbd://host:port/name`, `nbds` with TLS. Every address is announced as localhost, where it
    can be tried."""
    shown = "localhost" if host in _WILDCARDS else host
    return f"{_scheme(tls)}://{format_host_port(shown, port)}/{_quoted(export_name)}"


def unix_uri(path: str, export_name: str, *, tls: bool = False) -> str:
    """`nbd+unix:///name?socket=path`, the path absolute, so that it works from any folder."""
    socket_path = quote(os.fsencode(os.path.abspath(path)), safe="/")
    return f"{_scheme(tls)}+unix:///{_quoted(export_name)}?socket={socket_path}"


def _scheme(tls: bool) -> str:
    return "nbds" if tls else "nbd"


def vsock_uri(cid: int | None, port: int, export_name: str, *, tls: bool = False) -> str:
    """`nbd+vsock://cid:port/name`. Guests find a host that listens on any id at 2."""
    return f"{_scheme(tls)}+vsock://{2 if cid is None else cid}:{port}/{_quoted(export_name)}"


def _quoted(export_name: str) -> str:
    return quote(export_name.encode(errors="surrogateescape"), safe="")
