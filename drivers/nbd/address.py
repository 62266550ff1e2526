# SPDX-License-Identifier: Apache-2.0
"""Where an NBD export is: from the driver's options or a URI, and back into a name to show.

URIs are those of the NBD URI specification (doc/uri.md beside the protocol document), as QEMU takes
them: `nbd://host[:port][/export]`, `nbd+tcp://...`, `nbd+unix:///[export]?socket=PATH`; and
`nbd+vsock://cid[:port][/export]`, which QEMU doesn't.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd.client_tls import URI_KEYS, ClientTls
from blockemu.drivers.nbd.protocol import STRING_LENGTH_MAX
from blockemu.drivers.options import (
    refuse_unknown,
    take_bool,
    take_dict,
    take_number,
    take_str,
)
from blockemu.loop.stream_socket import UNIX_PATH_BYTES_MAX

DEFAULT_PORT = 10809
"""Assigned to NBD by IANA."""

U32_MAX = 2**32 - 1

_NBD_URI = re.compile(r"(nbds?)(\+[a-z]+)?://", re.IGNORECASE)
_SHORTHANDS = ("host", "port", "path")


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdAddress:
    """`path` of a unix socket, or `cid` (vsock) and `port`, or a connected socket `fd`, or `host`
    and `port`; and the export's name there.

    `ipv4`, `ipv6`: the kinds of addresses that may be tried. `keep_alive`: end a TCP connection
    whose peer's host is gone.
    """

    path: str | None = None
    cid: int | None = None
    fd: int | None = None
    host: str = ""
    port: int = DEFAULT_PORT
    ipv4: bool = True
    ipv6: bool = True
    keep_alive: bool = True
    export: str = ""
    tls: ClientTls | None = None

    @property
    def server(self) -> str:
        """The server alone, for messages about reaching it."""
        if self.path is not None:
            return self.path
        if self.cid is not None:
            return f"vsock {self.cid}:{self.port}"
        if self.fd is not None:
            return f"descriptor {self.fd}"
        return f"{_bracketed(self.host)}:{self.port}"

    @property
    def uri(self) -> str:
        """The name that QEMU shows for it; it can be opened again, but for a descriptor's."""
        scheme = "nbd" if self.tls is None else "nbds"
        export = quote(self.export.encode(errors="surrogateescape"), safe="/:@!$&'()*+,;=")
        slash = "/" if export else ""
        if self.path is not None:
            path = quote(self.path.encode(errors="surrogateescape"), safe="/:@!$'()*+,;=")
            query = f"?socket={path}{tls_query(self.tls, '&')}"
            return f"{scheme}+unix://{slash}{export}{query}"
        query = tls_query(self.tls, "?")
        if self.cid is not None:
            return f"{scheme}+vsock://{self.cid}:{self.port}{slash}{export}{query}"
        if self.fd is not None:
            return f"{scheme}+fd://{self.fd}{slash}{export}{query}"
        return f"{scheme}://{self.server}{slash}{export}{query}"


def tls_query(tls: ClientTls | None, before: str) -> str:
    """What a URI says of TLS, behind `before`; nothing, where that is nothing."""
    items = tls.query if tls is not None else ()
    text = "&".join(
        f"{key}={quote(value.encode(errors='surrogateescape'))}" for key, value in items
    )
    return f"{before}{text}" if text else ""


def is_nbd_uri(name: str) -> bool:
    """Whether a file name is an NBD URI, a good one or not."""
    return _NBD_URI.match(name) is not None


def parse_uri(uri: str) -> dict[str, Any]:
    """The options of the driver that mean the same as `uri`. Raises: ImageError."""
    found = _NBD_URI.match(uri)
    if found is None:
        raise ImageError(uri, "is no NBD URI")
    secure, transport = found[1].lower() == "nbds", (found[2] or "").lower()
    if transport not in ("", "+tcp", "+unix", "+vsock"):
        raise ImageError(uri, f"there is no NBD over '{transport[1:]}': it is tcp, unix or vsock")
    try:
        parts = urlsplit(uri)
        port = parts.port
        host = unquote(parts.hostname or "")
        user = unquote(parts.username or "")
        query, tls = _split_query(parts.query)
    except ValueError as error:
        raise ImageError(uri, f"is no URI: {error}") from None
    export = unquote(parts.path, errors="surrogateescape").lstrip("/")
    options: dict[str, Any] = {"driver": "nbd"}
    if secure:
        options |= {"tls": True, **({"tls-username": user} if user else {}), **tls}
    elif tls:
        raise ImageError(uri, f"'{next(iter(tls))}' goes with nbds:// only")
    if transport == "+unix":
        if parts.hostname or len(query) != 1 or query[0][0] != "socket" or not query[0][2]:
            reason = "is no URI of a unix socket: that is nbd+unix:///EXPORT?socket=PATH"
            raise ImageError(uri, reason)
        path = unquote(query[0][2], errors="surrogateescape")
        options["server"] = {"type": "unix", "path": path}
    else:
        if query:
            key = query[0][0]
            raise ImageError(uri, f"'{key}' means nothing in a URI of NBD over TCP")
        if not host:
            raise ImageError(uri, "names no host")
        kind, host_key = ("vsock", "cid") if transport == "+vsock" else ("inet", "host")
        options["server"] = {
            "type": kind,
            host_key: host,
            "port": str(DEFAULT_PORT if port is None else port),
        }
    if export:
        options["export"] = export
    return options


def _split_query(query: str) -> tuple[list[tuple[str, str, str]], dict[str, str]]:
    """A query's items about anything else, and those about TLS."""
    items = [item.partition("=") for item in query.split("&") if item]
    tls = {
        key: unquote(value, errors="surrogateescape") for key, _, value in items if key in URI_KEYS
    }
    return [item for item in items if item[0] not in URI_KEYS], tls


def take_address(name: str, options: dict[str, Any]) -> NbdAddress:
    """Pop `server` and `export` (or the old `host`, `port`, `path`) off the driver's options.

    Raises: ImageError.
    """
    server = take_dict(name, options, "server")
    old = {key: options.pop(key) for key in _SHORTHANDS if key in options}
    if server and old:
        raise ImageError(name, f"option '{next(iter(old))}' says again what 'server' says")
    if old:
        server = {**old, "type": "unix" if "path" in old else "inet"}
    if not server:
        raise ImageError(name, "option 'server' is missing")
    server = {f"server.{key}": value for key, value in server.items()}
    export = take_str(name, options, "export", "")
    _check_bytes(name, "export", export, STRING_LENGTH_MAX)
    kind = take_str(name, server, "server.type")
    if kind not in _TAKERS:
        kinds = ", ".join(_TAKERS)
        raise ImageError(name, f"option 'server.type' is one of {kinds}, not '{kind}'")
    address = _TAKERS[kind](name, server, export)
    refuse_unknown(name, server, "nbd")
    return address


def _take_unix(name: str, server: dict[str, Any], export: str) -> NbdAddress:
    path = take_str(name, server, "server.path")
    _check_bytes(name, "server.path", path, UNIX_PATH_BYTES_MAX)
    return NbdAddress(path=path, export=export)


def _take_inet(name: str, server: dict[str, Any], export: str) -> NbdAddress:
    host = take_str(name, server, "server.host")
    if not host:
        raise ImageError(name, "option 'server.host' is empty")
    said4, said6 = "server.ipv4" in server, "server.ipv6" in server
    ipv4 = take_bool(name, server, "server.ipv4", default=False)
    ipv6 = take_bool(name, server, "server.ipv6", default=False)
    # One that isn't spoken of is what the other leaves.
    ipv4, ipv6 = (
        ipv4 if said4 else not (said6 and ipv6),
        ipv6 if said6 else not (said4 and ipv4),
    )
    if not ipv4 and not ipv6:
        raise ImageError(name, "options 'server.ipv4' and 'server.ipv6' leave no address")
    keep_alive = take_bool(name, server, "server.keep-alive", default=True)
    port = take_number(name, server, "server.port", lowest=1, highest=65535, default=DEFAULT_PORT)
    return NbdAddress(
        host=host, port=port, ipv4=ipv4, ipv6=ipv6, keep_alive=keep_alive, export=export
    )


def _take_vsock(name: str, server: dict[str, Any], export: str) -> NbdAddress:
    cid = take_number(name, server, "server.cid", lowest=0, highest=U32_MAX)
    port = take_number(name, server, "server.port", lowest=1, highest=U32_MAX, default=DEFAULT_PORT)
    return NbdAddress(cid=cid, port=port, export=export)


def _take_fd(name: str, server: dict[str, Any], export: str) -> NbdAddress:
    fd = take_number(name, server, "server.str", lowest=0, highest=U32_MAX >> 1)
    return NbdAddress(fd=fd, export=export)


_TAKERS = {"inet": _take_inet, "unix": _take_unix, "vsock": _take_vsock, "fd": _take_fd}


def _check_bytes(name: str, key: str, value: str, bytes_max: int) -> None:
    length = len(value.encode(errors="surrogateescape"))
    if length > bytes_max:
        raise ImageError(name, f"option '{key}' has {length} bytes, and at most {bytes_max}")
    if "\0" in value:
        raise ImageError(name, f"option '{key}' has a NUL in it")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
