# SPDX-License-Identifier: Apache-2.0
"""Listeners: the sockets of one address, whatever its kind, with what is told about them and how
they are given up."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockemu.activation import adopt
from blockemu.addresses import Address, InheritedAddress, TcpAddress, UnixAddress, VsockAddress
from blockemu.listen import listen_tcp, listen_unix, listen_vsock, remove_unix_path
from blockemu.uri import tcp_uri, unix_uri, vsock_uri


@dataclass(frozen=True, slots=True)
class Listener:
    """The sockets of one address. `close` gives them up, and removes a path that is ours."""

    sockets: tuple[socket.socket, ...]
    uri: Callable[[str], str]
    """Where clients find the export of this name."""
    close: Callable[[], None]

    @property
    def is_local(self) -> bool:
        """Only processes of this machine get here."""
        return all(sock.family == socket.AF_UNIX for sock in self.sockets)

    @property
    def port(self) -> int:
        """Of TCP; 0 for other kinds."""
        return _port(self.sockets[0])


def open_listener(address: Address, *, tls: bool = False) -> Listener:
    """Listen. `tls`: what its URIs say. Raises: DaemonError."""
    if isinstance(address, UnixAddress):
        unix = listen_unix(
            address.path, mode=address.mode, user_id=address.user_id, group_id=address.group_id
        )
        return Listener(
            (unix.sock,),
            lambda name: unix_uri(address.path, name, tls=tls),
            lambda: remove_unix_path(unix),
        )
    if isinstance(address, TcpAddress):
        sockets = listen_tcp(address.host, address.port)
        port = _port(sockets[0])
        return _listener(sockets, lambda name: tcp_uri(address.host, port, name, tls=tls))
    if isinstance(address, VsockAddress):
        sock = listen_vsock(address)
        return _listener([sock], lambda name: vsock_uri(address.cid, address.port, name, tls=tls))
    assert isinstance(address, InheritedAddress)
    sock = adopt(address)
    return _listener([sock], _uri_of(sock, tls=tls))


def open_listeners(addresses: Sequence[Address], *, tls: bool = False) -> list[Listener]:
    """Listen on all, or on none. Raises: DaemonError."""
    opened: list[Listener] = []
    try:
        for address in addresses:
            opened.append(open_listener(address, tls=tls))
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


def _listener(sockets: Sequence[socket.socket], uri: Callable[[str], str]) -> Listener:
    def close() -> None:
        for sock in sockets:
            sock.close()

    return Listener(tuple(sockets), uri, close)


def _port(sock: socket.socket) -> int:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    port: int = sock.getsockname()[1]
    return port


def _uri_of(sock: socket.socket, *, tls: bool) -> Callable[[str], str]:
    """By what the socket itself says of its address."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        path = name if isinstance(name, str) else "@" + name[1:].decode(errors="surrogateescape")
        return lambda export: unix_uri(path, export, tls=tls)
    if sock.family == socket.AF_VSOCK:
        cid, port = name
        shown = None if cid == socket.VMADDR_CID_ANY else cid
        return lambda export: vsock_uri(shown, port, export, tls=tls)
    host, port = name[:2]
    return lambda export: tcp_uri(host, port, export, tls=tls)
