# SPDX-License-Identifier: Apache-2.0
"""The NBD server and its exports by QMP: the same answers as QEMU's daemon gives."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockemu.addresses import UnixAddress
from blockemu.config import serve_config
from tests.peers.libnbd import require_libnbd
from tests.peers.requirement import require_peer
from tests.unit.daemon_thread import DaemonThread

MIB = 1 << 20


class Qmp:
    """A client that keeps the events it is sent."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self.file = self.sock.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, /, **arguments: Any) -> Any:
        """What it returns, or the sentence of its error."""
        named = {key.replace("__", "-"): value for key, value in arguments.items()}
        self.sock.sendall(json.dumps({"execute": command, "arguments": named}).encode())
        while "event" in (message := json.loads(self.file.readline())):
            self.events.append(message)
        if "error" in message:
            assert message["error"]["class"] == "GenericError"
            return message["error"]["desc"]
        return message["return"]

    def wait_deleted(self, id: str) -> None:
        """Until the event has come that says so."""
        while not any(event["data"] == {"id": id} for event in self.events):
            self.events.append(json.loads(self.file.readline()))
        (event,) = (event for event in self.events if event["data"] == {"id": id})
        assert event["event"] == "BLOCK_EXPORT_DELETED"
        assert abs(event["timestamp"]["seconds"] - time.time()) < 60

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def running(image: Path, tmp_path: Path) -> Iterator[DaemonThread]:
    config = serve_config(
        [str(image)], address=UnixAddress(str(tmp_path / "s")), control_path=str(tmp_path / "c")
    )
    with DaemonThread(config) as running:
        yield running


@pytest.fixture
def qmp(running: DaemonThread, tmp_path: Path) -> Iterator[Qmp]:
    client = Qmp(tmp_path / "c")
    yield client
    client.close()


@pytest.fixture
def node_name(qmp: Qmp) -> str:
    (export,) = qmp("query-block-exports")
    return str(export["node-name"])


def script(socket_path: str) -> list[tuple[str, dict[str, Any]]]:
    """Commands that both daemons get, on a node called NODE: mistakes above all."""
    unix = {"type": "unix", "data": {"path": socket_path}}
    add = {"type": "nbd", "node__name": "NODE"}
    return [
        ("nbd-server-add", {"device": "NODE"}),
        ("nbd-server-remove", {"name": "x"}),
        ("nbd-server-stop", {}),
        ("block-export-add", {**add, "id": "e"}),
        ("nbd-server-start", {}),
        ("nbd-server-start", {"addr": {"type": "bogus", "data": {}}}),
        ("nbd-server-start", {"addr": {"type": "unix", "data": {}}}),
        ("nbd-server-start", {"addr": {"type": "unix", "path": "x"}}),
        ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "::1"}}}),
        ("nbd-server-start", {"addr": unix, "max__connections": 5}),
        ("nbd-server-start", {"addr": unix}),
        ("nbd-server-add", {"device": "none"}),
        ("nbd-server-add", {"device": "NODE", "name": "a"}),
        ("nbd-server-add", {"device": "NODE", "name": "a"}),
        ("block-export-add", {**add, "id": "e", "name": "a"}),
        ("block-export-add", {**add, "id": "a", "name": "b"}),
        ("block-export-add", {**add, "id": "9bad"}),
        ("block-export-add", {**add, "id": "e", "node__name": "nope"}),
        ("block-export-add", {**add, "id": "e", "iothread": "nope"}),
        ("block-export-add", {**add, "id": "e", "type": "bogus"}),
        ("block-export-add", {"type": "nbd", "id": "e"}),
        ("block-export-add", {**add, "id": "e", "writable": "yes"}),
        ("block-export-add", {**add, "id": "e", "colour": "red"}),
        ("block-export-add", {**add, "id": "e", "name": "b", "writable": True}),
        ("block-export-del", {"id": "nope"}),
        ("block-export-del", {"id": "e", "mode": "bogus"}),
        ("nbd-server-remove", {"name": "nope"}),
        ("nbd-server-remove", {"name": "b"}),
        ("nbd-server-remove", {"name": "e"}),
        ("block-export-del", {"id": "a", "mode": "hard"}),
        ("block_resize", {"node-name": "NODE", "size": -1}),
        ("block_resize", {"node-name": "none", "size": 1}),
        ("block_resize", {"device": "none", "size": 1}),
        ("block_resize", {"size": 1}),
        ("block_resize", {"node-name": "NODE", "size": 2 * MIB}),
        ("nbd-server-stop", {}),
        ("query-block-exports", {}),
    ]


def answers(qmp: Qmp, node_name: str, socket_path: Path) -> list[tuple[str, Any]]:
    found = []
    for command, arguments in script(str(socket_path)):
        given = {key: node_name if value == "NODE" else value for key, value in arguments.items()}
        answer = qmp(command, **given)
        if isinstance(answer, str):
            # QEMU names a union's branch by itself, and other members by where they are.
            answer = answer.replace(node_name, "NODE").replace("'addr.type'", "'type'")
        found.append((f"{command} {sorted(arguments)}", answer))
        if command == "nbd-server-remove" and arguments["name"] == "e":
            qmp.wait_deleted("e")
        if "hard" in arguments.values():
            qmp.wait_deleted("a")
    return found


def test_every_answer_is_the_one_that_qemus_daemon_gives(
    qmp: Qmp, node_name: str, image: Path, tmp_path: Path
) -> None:
    program = require_peer("qemu-storage-daemon")
    theirs_path = tmp_path / "theirs.raw"
    theirs_path.write_bytes(bytes(MIB))
    process = subprocess.Popen(
        [
            program,
            *("--chardev", f"socket,id=c,path={tmp_path}/q,server=on,wait=off"),
            *("--monitor", "c"),
            *("--blockdev", f"file,node-name=f,filename={theirs_path}"),
            *("--blockdev", "raw,node-name=disk,file=f"),
        ]
    )
    try:
        while True:
            try:
                reference = Qmp(tmp_path / "q")
                break
            except (FileNotFoundError, ConnectionRefusedError):
                assert process.poll() is None
        theirs = answers(reference, "disk", tmp_path / "their-nbd")
        reference.close()
    finally:
        process.terminate()
        process.wait(30)
    assert qmp("nbd-server-stop") == {}
    ours = answers(qmp, node_name, tmp_path / "our-nbd")
    assert [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]] == []
    assert image.stat().st_size == theirs_path.stat().st_size == 2 * MIB


def test_an_export_is_added_while_another_has_clients_and_removed_in_every_mode(
    running: DaemonThread, qmp: Qmp, node_name: str, tmp_path: Path
) -> None:
    nbd = require_libnbd()
    bystander = nbd.NBD()
    bystander.connect_uri(running.uris[0])
    for mode in ("safe", "soft", "hard"):
        add = {"type": "nbd", "id": mode, "node__name": node_name, "name": f"by {mode}"}
        assert qmp("block-export-add", **add, writable=True, description="new") == {}
        client = nbd.NBD()
        client.connect_uri(f"nbd+unix:///by%20{mode}?socket={tmp_path}/s")
        client.pwrite(mode.encode(), 0)
        assert bystander.pread(4, 0) == mode.encode()
        answer = qmp("block-export-del", id=mode, mode=mode)
        late = nbd.NBD()
        if mode == "safe":
            assert answer == "export 'safe' still in use"
            client.shutdown()
            while qmp("block-export-del", id=mode, mode=mode) != {}:
                pass  # its last breath is on the way
        else:
            assert answer == {}
            with pytest.raises(nbd.Error, match="no export named"):
                late.connect_uri(f"nbd+unix:///by%20{mode}?socket={tmp_path}/s")
        if mode == "soft":
            leaving = {
                export["id"]: export["shutting-down"] for export in qmp("query-block-exports")
            }
            assert leaving == {"disk": False, "soft": True}
            assert client.pread(4, 0) == b"soft"
            client.shutdown()
        qmp.wait_deleted(mode)
        if mode == "hard":
            with pytest.raises(nbd.Error):
                client.pread(4, 0)
        assert [export["id"] for export in qmp("query-block-exports")] == ["disk"]
        assert bystander.pread(4, 0) == mode.encode()
    bystander.shutdown()


def test_a_soft_removal_can_be_hurried(
    running: DaemonThread, qmp: Qmp, node_name: str, tmp_path: Path
) -> None:
    nbd = require_libnbd()
    client = nbd.NBD()
    client.connect_uri(running.uris[0])
    assert qmp("block-export-del", id="disk", mode="soft") == {}
    assert qmp("block-export-del", id="disk", mode="safe") == "export 'disk' still in use"
    assert qmp("block-export-del", id="disk", mode="hard") == {}
    qmp.wait_deleted("disk")
    with pytest.raises(nbd.Error):
        client.pread(1, 0)
    assert qmp("query-block-exports") == []
    # The node is still there, to be exported again.
    assert qmp("nbd-server-add", device=node_name, name="again", writable=True) == {}
    again = nbd.NBD()
    again.connect_uri(f"nbd+unix:///again?socket={tmp_path}/s")
    again.pwrite(b"x", 0)
    again.shutdown()


def test_a_server_is_stopped_with_clients_and_started_elsewhere(
    running: DaemonThread, qmp: Qmp, node_name: str, tmp_path: Path
) -> None:
    nbd = require_libnbd()
    client = nbd.NBD()
    client.connect_uri(running.uris[0])
    assert qmp("nbd-server-stop") == {}
    with pytest.raises(nbd.Error):
        client.pread(1, 0)
    assert not (tmp_path / "s").exists()
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    assert qmp("nbd-server-start", addr=address, max__connections=1) == {}
    assert qmp("nbd-server-add", device=node_name, writable=True) == {}
    port = running.daemon.nbd.listeners[0].port
    client = nbd.NBD()
    client.connect_uri(f"nbd://127.0.0.1:{port}/")
    client.pwrite(b"there", 7)
    assert client.pread(5, 7) == b"there"
    client.shutdown()


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ({"type": "inet", "data": {"host": "::1", "port": "x"}}, "is a port's number, not 'x'"),
        ({"type": "inet", "data": {"host": "::1", "port": "99999"}}, "number from 0 to 65535"),
        ({"type": "vsock", "data": {"cid": "a", "port": "b"}}, "vsock 'a:b': is not CID:PORT"),
        ({"type": "fd", "data": {"str": "name"}}, "is a descriptor's number, not 'name'"),
        ({"type": "fd", "data": {"str": "999999"}}, "socket 999999: was not handed over"),
    ],
)
def test_an_address_that_is_none_is_refused(
    qmp: Qmp, address: dict[str, Any], complaint: str
) -> None:
    assert qmp("nbd-server-stop") == {}
    assert complaint in qmp("nbd-server-start", addr=address)
    assert qmp("nbd-server-stop") == "NBD server not running"


def test_what_is_ours_alone_is_told_and_bounded(
    running: DaemonThread, qmp: Qmp, node_name: str, tmp_path: Path
) -> None:
    nbd = require_libnbd()
    add = {"type": "nbd", "node__name": node_name}
    assert "at least 1" in qmp("block-export-add", **add, id="x", max__connections=0)
    assert "FUA" in qmp("block-export-add", **add, id="x", writethrough=True)
    assert "too long" in qmp("block-export-add", **add, id="x", name="x" * 4097)
    assert "too long" in qmp("block-export-add", **add, id="x", description="x" * 4097)
    assert "isn't UTF-8" in qmp("block-export-add", **add, id="x", name="\udc80")
    assert qmp("block-export-add", **add, id="x", name="one", max__connections=1, hidden=True) == {}
    first, second = nbd.NBD(), nbd.NBD()
    uri = f"nbd+unix:///one?socket={tmp_path}/s"
    first.connect_uri(uri)
    with pytest.raises(nbd.Error, match="server policy prevents NBD_OPT_GO"):
        second.connect_uri(uri)
    first.shutdown()


def test_a_bitmap_is_offered_while_its_export_lives(
    running: DaemonThread, qmp: Qmp, node_name: str, tmp_path: Path
) -> None:
    nbd = require_libnbd()
    node: dict[str, Any] = {"node": node_name}
    add: dict[str, Any] = {"type": "nbd", "id": "b", "node-name": node_name, "writable": True}
    assert "is not found" in qmp("block-export-add", **add, bitmaps=["dirty"])
    assert qmp("block-dirty-bitmap-add", **node, name="dirty") == {}
    assert qmp("block-export-add", **add, name="b", bitmaps=["dirty"], allocation__depth=True) == {}
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.set_export_name("b")
    client.connect_unix(str(tmp_path / "s"))
    client.add_meta_context("qemu:")
    offered: list[str] = []
    client.opt_list_meta_context(offered.append)
    assert sorted(offered) == ["qemu:allocation-depth", "qemu:dirty-bitmap:dirty"]
    client.opt_abort()
    assert "is currently in use" in qmp("block-dirty-bitmap-remove", **node, name="dirty")
    assert qmp("block-export-del", id="b", mode="hard") == {}
    qmp.wait_deleted("b")
    assert qmp("block-dirty-bitmap-remove", **node, name="dirty") == {}
