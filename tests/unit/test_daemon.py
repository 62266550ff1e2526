# SPDX-License-Identifier: Apache-2.0
"""The daemon as one object: it starts whole or not at all, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockemu.config import UnixAddress, serve_config
from blockemu.drivers.errors import ImageError
from blockemu.errors import DaemonError
from blockemu.img.create import CreateRequest, create_image
from blockemu.listen import listen_unix, remove_unix_path
from blockemu.loop.poller import PollParams
from tests.unit.daemon_thread import DaemonThread

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "disk2.qcow2"
    create_image(CreateRequest.from_user(str(path), "1M", fmt="qcow2"))
    return path


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """No descriptor, and no thread, outlives a daemon."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    left = {fd: _target(fd) for fd in set(os.listdir("/proc/self/fd")) - before}
    assert {fd: target for fd, target in left.items() if target is not None} == {}
    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]


def _target(fd: str) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None


def greeting(address: Any) -> bytes:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        client.connect(address)
        return client.recv(8)


class Control:
    """A client of the control socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(path)
        self.file = self.sock.makefile("rb")
        assert "QMP" in self.receive()
        self.execute("qmp_capabilities")

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.file.readline())
        return message

    def execute(self, name: str, **arguments: Any) -> Any:
        self.sock.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        return self.receive()["return"]

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def test_daemon_announces_exports_and_answers_on_tcp(raw: Path, qcow2: Path) -> None:
    from blockemu.config import TcpAddress

    config = serve_config([str(raw), str(qcow2)], address=TcpAddress(port=0))
    with DaemonThread(config) as running:
        port = running.daemon.port
        assert running.lines == [
            f"nbd://127.0.0.1:{port}/disk (raw, 1 MiB, read-write): {raw}",
            f"nbd://127.0.0.1:{port}/disk2 (qcow2, 1 MiB, read-write): {qcow2}",
        ]
        assert greeting(("127.0.0.1", port)) == b"NBDMAGIC"


def test_unix_socket_is_announced_by_absolute_path_and_removed_at_the_end(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = serve_config([str(raw)], address=UnixAddress("s"), read_only=True)
    with DaemonThread(config) as running:
        assert running.uris == [f"nbd+unix:///disk?socket={tmp_path}/s"]
        assert "read-only" in running.lines[0]
        assert greeting(str(tmp_path / "s")) == b"NBDMAGIC"
    assert not (tmp_path / "s").exists()


def test_two_daemons_fit_in_one_process(raw: Path, qcow2: Path, tmp_path: Path) -> None:
    one = serve_config([str(raw)], address=UnixAddress(str(tmp_path / "1")))
    two = serve_config([str(qcow2)], address=UnixAddress(str(tmp_path / "2")))
    with DaemonThread(one), DaemonThread(two):
        assert greeting(str(tmp_path / "1")) == greeting(str(tmp_path / "2")) == b"NBDMAGIC"


def test_each_image_has_a_thread_of_its_own(raw: Path, qcow2: Path, tmp_path: Path) -> None:
    config = serve_config([str(raw), str(qcow2)], address=UnixAddress(str(tmp_path / "s")))
    with DaemonThread(config) as running:
        contexts = {export.backend.ctx for export in running.daemon.exports}
        assert {ctx.name for ctx in contexts} == {"iothread0", "iothread1"}


@pytest.mark.parametrize(
    ("iothreads", "names"),
    [(["io"], ["io", "io"]), (["a", "b"], ["a", "b"]), (["a", "a"], ["a", "a"])],
)
def test_named_iothreads_are_used(
    raw: Path, qcow2: Path, tmp_path: Path, iothreads: list[str], names: list[str]
) -> None:
    config = serve_config(
        [str(raw), str(qcow2)], iothreads=iothreads, address=UnixAddress(str(tmp_path / "s"))
    )
    with DaemonThread(config) as running:
        assert [export.backend.ctx.name for export in running.daemon.exports] == names
        assert set(running.daemon.iothreads) == set(names)


def test_service_manager_is_told(raw: Path, tmp_path: Path) -> None:
    told: list[str] = []
    config = serve_config([str(raw)], address=UnixAddress(str(tmp_path / "s")))
    with DaemonThread(config, notify=told.append) as running:
        pass
    running.join()
    assert told == ["READY=1", "STOPPING=1"]


def test_second_image_that_fails_undoes_the_first(raw: Path, tmp_path: Path) -> None:
    config = serve_config(
        [str(raw), str(tmp_path / "none")], address=UnixAddress(str(tmp_path / "s"))
    )
    with pytest.raises(ImageError, match="none: No such file"), DaemonThread(config):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk.raw"]


def test_same_image_twice_is_refused(raw: Path, tmp_path: Path) -> None:
    config = serve_config(
        [str(raw), str(raw)], names=["a", "b"], address=UnixAddress(str(tmp_path / "s"))
    )
    with pytest.raises(ImageError, match=r"disk\.raw: is in use"), DaemonThread(config):
        pass


def test_same_image_twice_read_only_is_served(raw: Path, tmp_path: Path) -> None:
    config = serve_config(
        [str(raw), str(raw)],
        names=["a", "b"],
        read_only=True,
        address=UnixAddress(str(tmp_path / "s")),
    )
    with DaemonThread(config) as running:
        assert len(running.lines) == 2


def test_socket_in_use_is_refused_and_left_alone(raw: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    other = listen_unix(path)
    try:
        config = serve_config([str(raw)], address=UnixAddress(path))
        with (
            pytest.raises(DaemonError, match="in use by a running server"),
            DaemonThread(config),
        ):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    finally:
        remove_unix_path(other)


def test_control_socket_that_fails_undoes_the_exports(raw: Path, tmp_path: Path) -> None:
    config = serve_config(
        [str(raw)],
        address=UnixAddress(str(tmp_path / "s")),
        control_path=str(tmp_path / "none" / "c"),
    )
    with pytest.raises(DaemonError, match="none/c: No such file"), DaemonThread(config):
        pass
    assert not (tmp_path / "s").exists()


def test_stop_twice_is_once_and_stop_before_ready_is_heard(raw: Path, tmp_path: Path) -> None:
    from blockemu.daemon import Daemon

    daemon = Daemon(serve_config([str(raw)], address=UnixAddress(str(tmp_path / "s"))))
    daemon.stop()
    daemon.stop()
    ready: list[list[str]] = []
    thread = threading.Thread(target=lambda: daemon.run(on_ready=ready.append))
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert len(ready) == 1


def test_client_in_negotiation_does_not_hold_up_the_end(raw: Path, tmp_path: Path) -> None:
    config = serve_config([str(raw)], address=UnixAddress(str(tmp_path / "s")))
    with socket.socket(socket.AF_UNIX) as client:
        with DaemonThread(config):
            client.connect(str(tmp_path / "s"))
            assert client.recv(8) == b"NBDMAGIC"
        assert not (tmp_path / "s").exists()


def test_control_socket_shows_the_daemon_and_quits_it(
    raw: Path, qcow2: Path, tmp_path: Path
) -> None:
    config = serve_config(
        [str(raw), str(qcow2)],
        address=UnixAddress(str(tmp_path / "s")),
        control_path=str(tmp_path / "c"),
        poll_params=PollParams(max_ns=7000, grow=3, shrink=5),
    )
    with DaemonThread(config) as running:
        client, other = Control(str(tmp_path / "c")), Control(str(tmp_path / "c"))
        exports = client.execute("query-block-exports")
        assert [export["id"] for export in exports] == ["disk", "disk2"]
        nodes = {node["node-name"]: node for node in client.execute("query-named-block-nodes")}
        assert len(nodes) == 4
        top = nodes[exports[1]["node-name"]]
        assert (top["drv"], top["ro"], top["file"]) == ("qcow2", False, str(qcow2))
        assert top["image"]["cluster-size"] == 65536
        threads = other.execute("query-iothreads")
        assert [thread["id"] for thread in threads] == ["iothread0", "iothread1"]
        names = ("poll-max-ns", "poll-grow", "poll-shrink")
        assert [threads[1][name] for name in names] == [7000, 3, 5]
        assert {str(thread["thread-id"]) for thread in threads} <= set(
            os.listdir("/proc/self/task")
        )
        assert client.execute("quit") == {}
        running.join()
        assert other.file.readline() == b""
        client.close()
        other.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk.raw", "disk2.qcow2"]


def test_backing_chain_is_shown(qcow2: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "top.qcow2"
    create_image(
        CreateRequest.from_user(
            str(overlay), None, fmt="qcow2", backing_file=qcow2.name, backing_fmt="qcow2"
        )
    )
    config = serve_config(
        [str(overlay)],
        fmt="qcow2",
        address=UnixAddress(str(tmp_path / "s")),
        control_path=str(tmp_path / "c"),
    )
    with DaemonThread(config):
        client = Control(str(tmp_path / "c"))
        (export,) = client.execute("query-block-exports")
        for flat in (False, True):
            nodes = client.execute("query-named-block-nodes", flat=flat)
            (top,) = (node for node in nodes if node["node-name"] == export["node-name"])
            assert top["backing_file_depth"] == 1
            assert top["backing_file"] == str(qcow2)
            assert ("backing-image" in top["image"]) is not flat
        client.close()


def test_what_a_node_does_with_zeroes_is_reported(qcow2: Path, tmp_path: Path) -> None:
    config = serve_config(
        [str(qcow2)],
        detect_zeroes="unmap",
        address=UnixAddress(str(tmp_path / "s")),
        control_path=str(tmp_path / "c"),
    )
    with DaemonThread(config):
        client = Control(str(tmp_path / "c"))
        nodes = client.execute("query-named-block-nodes")
        found = {node["drv"]: node["detect_zeroes"] for node in nodes}
        client.close()
    assert found == {"qcow2": "unmap", "file": "off"}
