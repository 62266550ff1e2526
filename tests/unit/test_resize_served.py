# SPDX-License-Identifier: Apache-2.0
"""A disk's size changes while clients use it: who sees what, and when."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockemu.addresses import UnixAddress
from blockemu.config import serve_config
from blockemu.drivers.nbd.protocol import Command, NbdError
from blockemu.img.create import CreateRequest, create_image
from tests.peers.libnbd import require_libnbd
from tests.unit.daemon_thread import DaemonThread
from tests.unit.nbd.client import header
from tests.unit.qmp.test_nbd_server import Qmp

MIB = 1 << 20
READ, WRITE, RESIZE = Command.NBD_CMD_READ, Command.NBD_CMD_WRITE, Command.NBD_CMD_RESIZE


@pytest.fixture(params=["native", "python"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setenv("BLOCKEMU_NATIVE", "0")
    return str(request.param)


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    create_image(CreateRequest.from_user(str(path), "1M", fmt=request.param))
    return path


@pytest.fixture
def running(image: Path, tmp_path: Path, kind: str) -> Iterator[DaemonThread]:
    fmt = "qcow2" if image.read_bytes()[:3] == b"QFI" else "raw"
    config = serve_config(
        [str(image)],
        fmt=fmt,
        resizable=True,
        aliases=["name=look,of=disk,writable=off"],
        address=UnixAddress(str(tmp_path / "s")),
        control_path=str(tmp_path / "c"),
    )
    with DaemonThread(config) as running:
        yield running


@pytest.fixture
def qmp(running: DaemonThread, tmp_path: Path) -> Iterator[Qmp]:
    client = Qmp(tmp_path / "c")
    yield client
    client.close()


def node_of(qmp: Qmp) -> str:
    return str(qmp("query-block-exports")[0]["node-name"])


class Raw:
    """A client without libnbd's own checks; EXPORT_NAME, so replies are simple ones."""

    def __init__(self, path: Path, name: bytes = b"disk") -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(path))
        self.sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
        self.size, self.flags = struct.unpack(">18xQH", self.receive(28))

    def receive(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            part = self.sock.recv(length - len(received))
            assert part, f"hung up after {received!r}"
            received += part
        return received

    def ask(self, command: int, offset: int, *, length: int = 0, flags: int = 0) -> int:
        """The error of the reply."""
        payload = bytes(length) if command == WRITE else b""
        self.sock.sendall(
            header(command, flags=flags, cookie=1, offset=offset, length=length) + payload
        )
        magic, error, _ = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        if command == READ and not error:
            self.receive(length)
        return int(error)

    def close(self) -> None:
        self.sock.close()


def test_a_disk_grows_and_shrinks_under_its_clients(
    running: DaemonThread, qmp: Qmp, tmp_path: Path
) -> None:
    nbd = require_libnbd()
    node = node_of(qmp)
    old = nbd.NBD()
    old.set_strict_mode(0)
    old.connect_uri(running.uris[0])
    old.pwrite(b"x" * 4096, MIB - 4096)
    with pytest.raises(nbd.Error):
        old.pread(512, MIB)
    assert qmp("block_resize", size=2 * MIB, **{"node-name": node}) == {}
    assert old.get_size() == MIB  # what it was told; it can't know
    assert old.pread(512, 2 * MIB - 512) == bytes(512)
    old.pwrite(b"y" * 512, 2 * MIB - 512)
    new = nbd.NBD()
    new.set_opt_mode(True)
    new.connect_uri(running.uris[0])
    new.opt_info()
    assert new.get_size() == 2 * MIB
    assert qmp("block_resize", size=MIB // 2, **{"node-name": node}) == {}
    new.opt_info()
    assert new.get_size() == MIB // 2  # who asks again sees it
    new.opt_go()
    assert new.get_size() == MIB // 2
    for client in (old, new):
        client.set_strict_mode(0)
        for attempt in (
            lambda client=client: client.pread(512, MIB // 2),
            lambda client=client: client.pwrite(b"z" * 512, MIB // 2),
            lambda client=client: client.pread(1024, MIB // 2 - 512),
        ):
            with pytest.raises(nbd.Error):
                attempt()
        assert client.pread(512, 0) == bytes(512)
        client.shutdown()
    assert qmp("block_resize", size=MIB, **{"node-name": node}) == {}
    again = nbd.NBD()
    again.connect_uri(running.uris[0])
    assert again.pread(4096, MIB - 4096) == bytes(4096)  # cut off is gone
    again.shutdown()


@pytest.mark.parametrize("image", ["raw"], indirect=True)
def test_a_file_that_grew_by_itself_is_taken_in(
    running: DaemonThread, qmp: Qmp, image: Path, tmp_path: Path
) -> None:
    """A qcow2 disk's size stands in its header; a raw one's is the file's."""
    os.truncate(image, 3 * MIB)
    client = Raw(tmp_path / "s")
    assert client.size == MIB
    assert qmp("block_resize", size=3 * MIB, **{"node-name": node_of(qmp)}) == {}
    assert client.ask(READ, 3 * MIB - 512, length=512) == 0
    client.close()
    late = Raw(tmp_path / "s")
    assert late.size == 3 * MIB
    late.close()


def test_a_client_resizes_where_it_may(running: DaemonThread, tmp_path: Path) -> None:
    first = Raw(tmp_path / "s")
    assert first.flags & 1 << 9
    assert first.ask(WRITE, MIB, length=512) == NbdError.NBD_ENOSPC
    assert first.ask(READ, MIB, length=512) == NbdError.NBD_ENOSPC
    assert first.ask(RESIZE, 2 * MIB) == 0
    assert first.ask(WRITE, MIB, length=512) == 0
    assert first.ask(RESIZE, MIB, length=512) == NbdError.NBD_EINVAL
    assert first.ask(RESIZE, MIB, flags=1) == NbdError.NBD_EINVAL
    assert first.ask(RESIZE, 2**63) != 0
    look = Raw(tmp_path / "s", b"look")
    assert not look.flags & 1 << 9
    assert look.ask(RESIZE, 4 * MIB) == NbdError.NBD_EINVAL
    # Somebody else's bytes aren't cut off; the export of another name is somebody else, too.
    assert first.ask(RESIZE, MIB) == NbdError.NBD_EPERM
    assert first.ask(RESIZE, 3 * MIB) == 0
    assert look.ask(READ, 3 * MIB - 512, length=512) == 0
    first.close()
    look.close()


def test_a_client_alone_may_shrink(running: DaemonThread, qmp: Qmp, tmp_path: Path) -> None:
    assert qmp("block-export-del", id="look", mode="hard") == {}
    qmp.wait_deleted("look")
    client = Raw(tmp_path / "s")
    assert client.ask(RESIZE, MIB // 2) == 0
    assert client.ask(READ, MIB // 2, length=512) == NbdError.NBD_ENOSPC
    client.close()


def test_load_goes_on_while_the_size_changes_and_exports_come_and_go(
    running: DaemonThread, qmp: Qmp, tmp_path: Path
) -> None:
    """A bystander's requests never fail, and never bring bytes that weren't written."""
    nbd = require_libnbd()
    node = node_of(qmp)
    stop, failures, rounds = threading.Event(), [], [0]

    def load() -> None:
        try:
            client = nbd.NBD()
            client.connect_uri(running.uris[0])
            while not stop.is_set():
                number = rounds[0] % 64
                data = bytes([number + 1]) * 4096
                client.pwrite(data, number * 4096)
                assert client.pread(4096, number * 4096) == data
                rounds[0] += 1
            client.shutdown()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for turn in range(12):
            size = (turn % 3 + 1) * MIB
            assert qmp("block_resize", size=size, **{"node-name": node}) == {}
            add: dict[str, Any] = {"type": "nbd", "id": "guest", "node-name": node}
            assert qmp("block-export-add", **add, name="guest", writable=True) == {}
            guest = nbd.NBD()
            guest.connect_uri(f"nbd+unix:///guest?socket={tmp_path}/s")
            assert guest.get_size() == size
            guest.pwrite(b"g" * 4096, MIB // 2)
            seen = rounds[0]
            assert qmp("block-export-del", id="guest", mode="hard") == {}
            qmp.events.clear()
            qmp.wait_deleted("guest")
            while rounds[0] < seen + 3 and not failures:
                pass
    finally:
        stop.set()
        thread.join(30)
    assert failures == []
