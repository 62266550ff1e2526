# SPDX-License-Identifier: Apache-2.0
"""Listening sockets: what is taken, what is replaced, what is left alone."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from blockemu.errors import DaemonError
from blockemu.limits import Limits
from blockemu.listen import (
    BACKLOG_DEFAULT,
    UNIX_PATH_BYTES_MAX,
    listen_tcp,
    listen_unix,
    remove_unix_path,
)


def make_stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_tcp_port_zero_is_a_free_port_and_accepts() -> None:
    (sock,) = listen_tcp("127.0.0.1", 0)
    with sock:
        assert not sock.getblocking()
        with socket.create_connection(sock.getsockname()):
            sock.setblocking(True)
            sock.accept()[0].close()


def test_tcp_localhost_port_zero_is_one_port_for_all_families() -> None:
    sockets = listen_tcp("localhost", 0)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()


def test_tcp_port_in_use_is_refused_with_address_and_reason() -> None:
    (sock,) = listen_tcp("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with sock, pytest.raises(DaemonError, match=f"127.0.0.1:{port}: Address already in use"):
        listen_tcp("127.0.0.1", port)


@pytest.mark.parametrize("host", ["a..b", "a" * 300, "::zz", "\u00fc" * 70])
def test_tcp_bad_address_is_refused_with_its_name(host: str) -> None:
    with pytest.raises(DaemonError, match="address") as caught:
        listen_tcp(host, 0)
    assert host in str(caught.value)


def test_an_empty_address_is_refused_and_not_taken_for_all() -> None:
    """`--bind "$ADDRESS"` with a variable that isn't set offered the disk to the whole network."""
    with pytest.raises(DaemonError, match="address is empty"):
        listen_tcp("", 0)


def test_tcp_ipv6_loopback_listens_where_the_machine_has_it() -> None:
    try:
        sockets = listen_tcp("::1", 0)
    except DaemonError as error:
        pytest.skip(f"no IPv6 here: {error}")
    for sock in sockets:
        sock.close()


def test_tcp_ipv6_wildcard_takes_ipv4_clients_too() -> None:
    try:
        (sock,) = listen_tcp("::", 0)
    except DaemonError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with sock, socket.create_connection(("127.0.0.1", sock.getsockname()[1])):
        pass


def test_unix_new_path_is_for_the_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = listen_unix(str(path))
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    finally:
        remove_unix_path(listener)
    assert not path.exists()


def test_unix_path_of_live_server_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = listen_unix(str(path))
    try:
        with pytest.raises(DaemonError, match=r"s: in use by a running server$"):
            listen_unix(str(path))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    finally:
        remove_unix_path(listener)


def test_unix_path_of_busy_server_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        server.listen(0)
        client.connect(str(path))  # the backlog is full now
        with pytest.raises(DaemonError, match="in use by a running server"):
            listen_unix(str(path))


def test_unix_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    make_stale_socket(path)
    listener = listen_unix(str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    remove_unix_path(listener)
    assert list(tmp_path.iterdir()) == []


def test_unix_stale_socket_with_long_name_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    room = UNIX_PATH_BYTES_MAX - len(os.fsencode(str(folder))) - 1
    path = folder / ("s" * room)
    make_stale_socket(path)
    remove_unix_path(listen_unix(str(path)))
    assert list(folder.iterdir()) == []


def test_unix_path_of_ordinary_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(DaemonError, match="exists and isn't a socket"):
        listen_unix(str(path))
    assert path.read_text() == "data"


def test_unix_path_of_datagram_socket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(DaemonError, match="in use by a datagram socket"):
            listen_unix(str(path))


@pytest.mark.parametrize("path", ["", "x" * (UNIX_PATH_BYTES_MAX + 1), "/nonexistent/folder/s"])
def test_unix_bad_path_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(DaemonError) as caught:
        listen_unix(path)
    assert "\n" not in str(caught.value)


def test_unix_path_taken_over_by_another_server_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    mine = listen_unix(str(path))
    path.unlink()
    theirs = listen_unix(str(path))
    remove_unix_path(mine)
    assert path.exists()
    remove_unix_path(theirs)


def test_as_many_clients_may_come_at_once_as_are_served() -> None:
    """With a backlog of 128, the kernel made some of 900 clients wait for seconds."""
    assert Limits().connections_max <= BACKLOG_DEFAULT
