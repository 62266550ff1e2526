# SPDX-License-Identifier: Apache-2.0
"""Listening sockets: TCP by address and port, unix by path, vsock by context id and port.

All are non-blocking, close-on-exec, and listening when they are handed out, so a caller that holds
one may announce it. A unix path is a file that outlives its server: a path that a dead server left
behind is replaced, after asking it (connect) whether anybody still answers; a path that a live
server owns, or a file that is no socket, is refused. Between asking and binding, another server
may do the same; a lock file beside the path would close that gap and is the usual litter, so we
bind to a name of our own in the same folder and rename it over the stale one only: the worst that
two servers started at once can do is that the later one wins, and the earlier one, as it stops,
sees that the path isn't its own any more and leaves it (`remove_unix_path`).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass

from blockemu.addresses import SOCKET_MODE, VsockAddress
from blockemu.errors import DaemonError
from blockemu.loop.stream_socket import UNIX_PATH_BYTES_MAX

BACKLOG_DEFAULT = 2048
"""Connections that the kernel completes while we are busy. It drops what comes beyond, and a TCP
client then tries again only after a second. As many as we serve at once may come at once."""


@dataclass(slots=True, frozen=True)
class UnixListener:
    """A listening unix socket and the identity of the file that stands for it."""

    sock: socket.socket
    path: str
    device: int
    inode: int


def listen_tcp(host: str, port: int, *, backlog: int = BACKLOG_DEFAULT) -> list[socket.socket]:
    """Listen on every address that `host` names (`localhost` may be both ::1 and 127.0.0.1).

    Port 0 is any free port, the same on all of them. At least one socket is returned; an address
    family that this machine lacks is skipped as long as another works.
    Raises: DaemonError.
    """
    name = format_host_port(host, port)
    if not 0 <= port <= 65535:
        raise DaemonError(name, "a port is a number from 0 to 65535")
    if not host:
        raise DaemonError(name, "the address is empty; 0.0.0.0 or :: are all of this machine's")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a host name"
        raise DaemonError(name, f"bad address: {reason}") from error

    # `::` alone takes IPv4 clients, too; beside an IPv4 socket of the same port it would clash.
    ipv6_only = any(family == socket.AF_INET for family, *_ in found)
    sockets: list[socket.socket] = []
    first_error: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        if sockets and port == 0:
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sock = _listen(family, kind, protocol, address, backlog, ipv6_only=ipv6_only)
            sockets.append(sock)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                for opened in sockets:
                    opened.close()
                raise DaemonError(name, error.strerror or str(error)) from error
            first_error = first_error or error
    if not sockets:
        reason = (first_error.strerror if first_error else None) or "no such address"
        raise DaemonError(name, reason) from first_error
    return sockets


def _listen(
    family: int,
    kind: int,
    protocol: int,
    address: tuple[object, ...],
    backlog: int,
    *,
    ipv6_only: bool,
) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, ipv6_only)
        sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_vsock(address: VsockAddress, *, backlog: int = BACKLOG_DEFAULT) -> socket.socket:
    """Listen for virtual machines and their host. Raises: DaemonError."""
    cid = socket.VMADDR_CID_ANY if address.cid is None else address.cid
    name = f"vsock://{'any' if address.cid is None else cid}:{address.port}"
    sock = None
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.bind((cid, address.port))
        sock.listen(backlog)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise DaemonError(name, error.strerror or str(error)) from error
    return sock


def listen_unix(
    path: str,
    *,
    mode: int = SOCKET_MODE,
    user_id: int | None = None,
    group_id: int | None = None,
    backlog: int = BACKLOG_DEFAULT,
) -> UnixListener:
    """Listen on `path`, for those whom the file's `mode` lets write to it (the owner only), after
    giving the file to the user and the group.

    Raises: DaemonError.
    """
    owner = (-1 if user_id is None else user_id, -1 if group_id is None else group_id)
    if not path:
        raise DaemonError("socket", "its path is empty")
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        raise DaemonError(path, f"a socket path has at most {UNIX_PATH_BYTES_MAX} bytes")
    try:
        stale = _is_stale(path)
        return _bind_unix(path, mode, owner, backlog, replace=stale)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DaemonError(path, "in use by a running server") from error
        raise DaemonError(path, error.strerror or str(error)) from error


def _is_stale(path: str) -> bool:
    """Whether `path` is a socket that nobody answers on; False where there is nothing.

    Raises: DaemonError, when the path is taken.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(status.st_mode):
        raise DaemonError(path, "exists and isn't a socket; not replaced")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except FileNotFoundError:
            return False
        except BlockingIOError:
            pass  # its backlog is full: alive, and busy
        except PermissionError as error:
            raise DaemonError(path, "in use, and not ours to ask (permission denied)") from error
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                raise DaemonError(path, "in use by a datagram socket") from error
            raise
    raise DaemonError(path, "in use by a running server")


def _bind_unix(
    path: str, mode: int, owner: tuple[int, int], backlog: int, *, replace: bool
) -> UnixListener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    name = f"{path}.{os.getpid()}" if replace else path
    if len(os.fsencode(name)) > UNIX_PATH_BYTES_MAX:
        os.unlink(path)
        name = path
    bound = False
    try:
        # Mode and owner are set before listen(): until then nobody can connect, so there is no
        # moment at which the umask's looser mode lets a stranger in.
        sock.bind(name)
        bound = True
        if owner != (-1, -1):
            os.chown(name, *owner)
        os.chmod(name, mode)
        sock.listen(backlog)
        if name != path:
            os.rename(name, path)
        status = os.lstat(path)
    except BaseException:
        sock.close()
        if bound:
            remove_file(name)
        raise
    return UnixListener(sock, path, status.st_dev, status.st_ino)


def remove_unix_path(listener: UnixListener) -> None:
    """Close the socket and remove its file, unless another server has put its own there since."""
    listener.sock.close()
    try:
        status = os.lstat(listener.path)
    except OSError:
        return
    if (status.st_dev, status.st_ino) == (listener.device, listener.inode):
        remove_file(listener.path)


def remove_file(path: str) -> None:
    """Remove `path` if it can be removed."""
    try:
        os.unlink(path)
    except OSError:
        pass


def format_host_port(host: str, port: int) -> str:
    """`host:port` as URIs want it: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
