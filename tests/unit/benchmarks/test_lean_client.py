# SPDX-License-Identifier: Apache-2.0
"""The lean client makes the load that it says, and believes no reply that isn't right."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.load import lean_command, parse_result, run_load
from benchmarks.native_programs import compiler
from benchmarks.roofline import Roofline
from benchmarks.workloads import Workload
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import ToolFailed
from tests.peers.requirement import give_up

MIB = 1 << 20
DEPTH = 8
READS = Workload("reads", "randread", 4096, DEPTH, lean=True)
WRITES = Workload("writes", "randwrite", 4096, DEPTH, lean=True)
RUNTIME_S = 0.2
REPLY_MAGIC = 0x67446698
TIMEOUT_S = 20


@pytest.fixture(autouse=True)
def needs_compiler() -> None:
    if compiler() is None:
        give_up("there is no C compiler: apt-get install gcc")


@pytest.fixture
def roofline(tmp_path: Path) -> Iterator[Roofline]:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    server = Roofline(image, socket_path=tmp_path / "nbd.sock")
    try:
        yield server.start()
    finally:
        server.discard()


def test_reads_are_counted_and_timed(roofline: Roofline) -> None:
    found = run_load(roofline.uri, READS, runtime_s=RUNTIME_S)
    assert found.requests >= DEPTH
    assert found.iops == pytest.approx(found.requests / RUNTIME_S, rel=0.5)
    assert found.bandwidth_bytes == pytest.approx(found.iops * 4096, rel=0.01)
    assert 0 < found.p50_us <= found.p99_us
    assert found.mean_us > 0


def test_writes_arrive_everywhere(roofline: Roofline, tmp_path: Path) -> None:
    run_load(roofline.uri, WRITES, runtime_s=RUNTIME_S)
    content = (tmp_path / "disk.img").read_bytes()
    written = [content[at : at + 4096] for at in range(0, MIB, 4096)]
    assert sum(any(block) for block in written) > len(written) / 2
    assert len({block for block in written if any(block)}) == 1, "torn, or not what was sent"


@pytest.mark.parametrize("style", ["structured", "extended"])
@pytest.mark.parametrize("pattern", ["randread", "randwrite"])
def test_each_style_of_replies_is_understood(tmp_path: Path, pattern: str, style: str) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    load = Workload("load", pattern, 4096, DEPTH, lean=True, style=style)
    with BlockemuDaemon(image, fmt="raw", socket_path=tmp_path / "nbd.sock") as server:
        found = run_load(server.uri, load, runtime_s=RUNTIME_S)
    assert found.requests >= DEPTH
    assert any(image.read_bytes()) == (pattern == "randwrite")


def test_a_style_that_the_server_doesnt_know_is_a_failed_load(roofline: Roofline) -> None:
    load = Workload("load", "randread", 4096, DEPTH, lean=True, style="structured")
    with pytest.raises(ToolFailed, match="doesn't know this style"):
        run_load(roofline.uri, load, runtime_s=RUNTIME_S)


@contextmanager
def scripted_server(path: Path, answer: Callable[[bytes], bytes]) -> Iterator[None]:
    """Negotiates, then sends what `answer` makes of the first request's cookie, and hangs up."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        for turn in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
                head = connection.recv(4 + 16, socket.MSG_WAITALL)
                connection.recv(struct.unpack(">I", head[-4:])[0], socket.MSG_WAITALL)
                reply = struct.pack(">QII", 0x3E889045565A9, 7, 3)
                connection.sendall(reply + struct.pack(">IHQH", 12, 0, MIB, 1))
                connection.sendall(struct.pack(">QIII", 0x3E889045565A9, 7, 1, 0))
                if turn == 1:
                    request = connection.recv(28, socket.MSG_WAITALL)
                    connection.sendall(answer(request[8:16]))
                    connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        yield
        thread.join(TIMEOUT_S)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda cookie: struct.pack(">II", 0x12345678, 0) + cookie, "bad reply magic"),
        (lambda cookie: struct.pack(">II", REPLY_MAGIC, 5) + cookie, "a request failed"),
        (lambda cookie: struct.pack(">IIQ", REPLY_MAGIC, 0, 77 << 16), "isn't in flight"),
        (lambda cookie: struct.pack(">IIQ", REPLY_MAGIC, 0, 0), "isn't in flight"),
        (lambda cookie: 2 * (struct.pack(">II", REPLY_MAGIC, 0) + cookie), "isn't in flight"),
        (lambda cookie: b"", "hung up"),
    ],
)
def test_a_wrong_reply_ends_it_with_a_line(
    tmp_path: Path, answer: Callable[[bytes], bytes], reason: str
) -> None:
    path = tmp_path / "nbd.sock"
    with scripted_server(path, answer):
        command = lean_command(f"nbd+unix:///disk?socket={path}", WRITES, RUNTIME_S)
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode != 0
    assert result.stderr.startswith("lean_client: ")
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_client_that_finds_nobody_is_a_failed_load(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="can't connect"):
        run_load(f"nbd+unix:///disk?socket={tmp_path}/nobody", READS, runtime_s=RUNTIME_S)


def test_its_words_are_understood_as_fios() -> None:
    side = '{"total_ios": 5, "iops": 50, "bw_bytes": 9, "lat_ns": {"mean": 4000, "percentile": {}}}'
    text = f'{{"jobs": [{{"write": {{"total_ios": 0}}, "read": {side}, "usr_cpu": 1}}]}}'
    assert parse_result(text).mean_us == 4
