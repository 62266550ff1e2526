# SPDX-License-Identifier: Apache-2.0
"""Listening sockets that a service manager opened: which are taken, for what, and which refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blockemu.activation import FDS_MAX, Activation, adopt, take_activation
from blockemu.addresses import InheritedAddress
from blockemu.errors import DaemonError
from tests.peers.nbd_tools import NbdInfo
from tests.peers.requirement import require_peer

MIB = 1 << 20
COMMAND = [str(Path(sys.executable).with_name("blockemu")), "serve"]

ACTIVATOR = """
import fcntl, os, sys
names, fds, command = sys.argv[1], [int(fd) for fd in sys.argv[2].split(",")], sys.argv[3:]
kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in fds]  # out of the way
for number, fd in enumerate(kept):
    os.dup2(fd, 3 + number, inheritable=True)
os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=names)
os.execv(command[0], command)
"""


def test_names_say_what_sockets_are_for_and_the_variables_are_gone() -> None:
    environment = {
        "LISTEN_PID": "77",
        "LISTEN_FDS": "3",
        "LISTEN_FDNAMES": "nbd:control:",
        "PATH": "/bin",
    }
    found = take_activation(environment, pid=77)
    assert found.nbd == (InheritedAddress(3, "nbd"), InheritedAddress(5, ""))
    assert found.control == (InheritedAddress(4, "control"),)
    assert environment == {"PATH": "/bin"}


def test_sockets_without_names_are_for_clients() -> None:
    found = take_activation({"LISTEN_PID": "1", "LISTEN_FDS": "2"}, pid=1)
    assert [address.fd for address in found.nbd] == [3, 4]


@pytest.mark.parametrize(
    "environment",
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "76", "LISTEN_FDS": "1"}, {"LISTEN_PID": "77"}],
)
def test_what_is_for_another_process_is_left_alone(environment: dict[str, str]) -> None:
    assert take_activation(environment, pid=77) == Activation()


@pytest.mark.parametrize(
    ("fds", "names", "complaint"),
    [
        ("one", "", "'one' is not a number of sockets"),
        ("-1", "", "'-1' is not a number of sockets"),
        (str(FDS_MAX + 1), "", "is not a number of sockets up to 256"),
        ("2", "a", "2 sockets have 1 names"),
        ("1", "a:b", "1 sockets have 2 names"),
    ],
)
def test_variables_that_lie_are_refused(fds: str, names: str, complaint: str) -> None:
    environment = {"LISTEN_PID": "7", "LISTEN_FDS": fds, "LISTEN_FDNAMES": names}
    with pytest.raises(DaemonError, match=complaint):
        take_activation(environment, pid=7)


def test_what_is_no_listening_stream_is_refused_and_left_open() -> None:
    one, other = socket.socketpair()
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    reader, writer = os.pipe()
    cases = [
        (one.fileno(), "does not listen"),
        (datagram.fileno(), "is no stream socket"),
        (reader, "was not handed over"),
    ]
    try:
        for fd, complaint in cases:
            with pytest.raises(DaemonError, match=complaint):
                adopt(InheritedAddress(fd, "x"))
            os.fstat(fd)
    finally:
        os.close(reader)
        os.close(writer)
        for sock in (one, other, datagram):
            sock.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


def finish(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_a_daemon_serves_on_what_it_was_started_with(image: Path, tmp_path: Path) -> None:
    """A unix and a TCP socket for clients, one for QMP, and one of the daemon's own."""
    require_peer("nbdinfo")
    unix, control = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "nbd"))
    control.bind(str(tmp_path / "qmp"))
    tcp = socket.create_server(("127.0.0.1", 0))
    port = tcp.getsockname()[1]
    sockets = (unix, control, tcp)
    for sock in sockets:
        sock.listen()
        sock.set_inheritable(True)
    fds = [sock.fileno() for sock in sockets]
    activator = [sys.executable, "-c", ACTIVATOR, "nbd:control:nbd", ",".join(map(str, fds))]
    process = subprocess.Popen(
        [*activator, *COMMAND, str(image), "--socket", str(tmp_path / "own")],
        pass_fds=fds,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    uris = [process.stdout.readline().split()[0] for _ in range(3)]
    assert uris == [
        f"nbd+unix:///disk?socket={tmp_path}/own",
        f"nbd+unix:///disk?socket={tmp_path}/nbd",
        f"nbd://127.0.0.1:{port}/disk",
    ]
    assert [NbdInfo.size(uri) for uri in uris] == [MIB] * 3
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as lines:
        client.connect(str(tmp_path / "qmp"))
        assert "QMP" in json.loads(lines.readline())
    finish(process)
    assert (tmp_path / "nbd").exists()  # its maker's, who may start us again
    assert not (tmp_path / "own").exists()
    for sock in sockets:
        sock.close()


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate isn't here"
)
def test_systemd_starts_a_daemon_when_the_first_client_comes(image: Path, tmp_path: Path) -> None:
    require_peer("nbdinfo")
    path = tmp_path / "nbd"
    process = subprocess.Popen(
        ["systemd-socket-activate", "-l", str(path), *COMMAND, str(image)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    while "Listening on" not in process.stderr.readline():
        assert process.poll() is None
    assert NbdInfo.size(f"nbd+unix:///disk?socket={path}") == MIB
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
