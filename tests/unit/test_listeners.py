# SPDX-License-Identifier: Apache-2.0
"""Several listeners of one daemon: all kinds, all at once, and what they leave behind."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from blockemu.addresses import TcpAddress, UnixAddress, VsockAddress
from blockemu.config import serve_config
from blockemu.errors import DaemonError
from blockemu.limits import Limits
from blockemu.listeners import open_listener, open_listeners
from blockemu.loop.socket_options import tune
from tests.peers.nbd_tools import NbdInfo
from tests.peers.qemu import ToolFailed
from tests.peers.requirement import require_peer
from tests.unit.daemon_thread import DaemonThread

MIB = 1 << 20


def test_one_daemon_listens_everywhere_at_once(tmp_path: Path) -> None:
    require_peer("nbdinfo")
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    addresses = [
        UnixAddress(str(tmp_path / "a")),
        TcpAddress(port=0),
        UnixAddress(str(tmp_path / "b"), mode=0o666),
        TcpAddress("::1", 0),
    ]
    with DaemonThread(serve_config([str(image)], address=addresses, listing="local")) as running:
        assert [NbdInfo.size(uri) for uri in running.uris] == [MIB] * 4
        assert NbdInfo.export_names(f"nbd+unix:///?socket={tmp_path}/a") == ["disk"]
        with pytest.raises(ToolFailed, match="server replied with error to list request"):
            NbdInfo.export_names(f"nbd://127.0.0.1:{running.daemon.port}/")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk.raw"]


def test_a_second_address_that_fails_closes_the_first(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(DaemonError, match="none/s: No such file"):
        open_listeners([UnixAddress(str(path)), UnixAddress(str(tmp_path / "none" / "s"))])
    assert not path.exists()


def test_a_unix_socket_has_the_mode_and_the_owner_that_were_asked_for(tmp_path: Path) -> None:
    group_id = 12345 if os.getuid() == 0 else os.getgid()
    path = tmp_path / "s"
    address = UnixAddress(str(path), mode=0o660, group_id=group_id)
    listener = open_listener(address)
    try:
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group_id)
        assert status.st_uid == os.getuid()
    finally:
        listener.close()


def test_an_owner_that_we_may_not_give_it_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chown(path: str, user_id: int, group_id: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chown", chown)
    with pytest.raises(DaemonError, match="s: Operation not permitted"):
        open_listener(UnixAddress(str(tmp_path / "s"), user_id=0))
    assert list(tmp_path.iterdir()) == []


def test_a_vsock_listener_stands_where_the_kernel_has_them() -> None:
    try:
        listener = open_listener(VsockAddress(port=54321))
    except DaemonError as error:
        pytest.skip(f"no vsock here: {error}")
    try:
        assert listener.uri("disk") == "nbd+vsock://2:54321/disk"
        assert not listener.is_local
        with pytest.raises(DaemonError, match="vsock://any:54321: Address already in use"):
            open_listener(VsockAddress(port=54321))
    finally:
        listener.close()


def test_a_vsock_client_is_served_over_the_loopback(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            probe.settimeout(5)
            probe.bind((socket.VMADDR_CID_ANY, 54322))
            probe.listen()
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
                client.settimeout(0.1)
                client.connect((1, 54322))
    except OSError as error:
        pytest.skip(f"this kernel has no vsock loopback: {error}")
    config = serve_config([str(image)], address=VsockAddress(port=54323))
    with (
        DaemonThread(config),
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client,
    ):
        client.settimeout(30)
        client.connect((1, 54323))
        assert client.recv(8) == b"NBDMAGIC"


def test_a_tcp_client_that_falls_silent_is_probed_for_as_long_as_the_limits_say() -> None:
    limits = Limits(
        keepalive_idle_ns=7 * 10**9, keepalive_interval_ns=3 * 10**9, keepalive_probes_max=5
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        tune(client, limits.keepalive)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 3
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 5
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"keepalive_idle_ns": 32768 * 10**9},
        {"keepalive_interval_ns": 32768 * 10**9},
        {"keepalive_probes_max": 128},
    ],
)
def test_what_the_kernel_would_not_take_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="keepalive"):
        Limits(**values)
