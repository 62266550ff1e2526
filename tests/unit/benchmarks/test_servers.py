# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own servers answer rightly: a fast wrong answer would be no roofline."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.controlled import PIPELINED, BusyDaemon, QmpLoad
from benchmarks.load import parse_result
from benchmarks.native_programs import compiler
from benchmarks.roofline import Roofline
from tests.e2e.raw_nbd import CMD_READ, RawNbd
from tests.peers.process import ServerFailed
from tests.peers.requirement import give_up

MIB = 1 << 20
CONTENT = bytes(range(256)) * (4 * MIB // 256)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def roofline(image: Path, tmp_path: Path) -> Iterator[Roofline]:
    if compiler() is None:
        give_up("there is no C compiler: apt-get install gcc")
    server = Roofline(image, socket_path=tmp_path / "nbd.sock")
    try:
        yield server.start()
    finally:
        server.discard()  # it knows no orderly end


def test_roofline_reads_what_was_written(roofline: Roofline, image: Path) -> None:
    with RawNbd.connected(roofline.socket_path, "disk") as client:
        assert client.read(5, MIB) == CONTENT[5 : 5 + MIB]
        assert client.write(MIB, b"y" * MIB) == 0
        assert client.flush() == 0
        assert client.read(MIB - 1, 3) == CONTENT[MIB - 1 : MIB] + b"yy"
    assert image.read_bytes()[MIB : 2 * MIB] == b"y" * MIB


def test_roofline_answers_a_batch_larger_than_its_buffer(roofline: Roofline) -> None:
    with RawNbd.connected(roofline.socket_path, "disk") as client:
        wanted = {client.send(CMD_READ, turn % 3 * MIB, MIB) for turn in range(8)}
        replies = [client.reply() for _ in wanted]
        assert {reply.cookie for reply in replies} == wanted
        assert {reply.error for reply in replies} == {0}


def test_roofline_outlives_its_clients(roofline: Roofline) -> None:
    for _ in range(3):
        with RawNbd.connected(roofline.socket_path, "disk") as client:
            assert client.read(0, 16) == CONTENT[:16]


def test_roofline_says_that_a_read_past_the_end_failed(roofline: Roofline) -> None:
    with RawNbd.connected(roofline.socket_path, "disk") as client:
        client.send(CMD_READ, len(CONTENT), 4096)
        assert client.reply().error == errno.EIO


def test_roofline_that_does_not_compile_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.native_programs.compiler", lambda: "false")
    from benchmarks.native_programs import compiled

    with pytest.raises(ServerFailed, match="doesn't compile"):
        compiled.__wrapped__("roofline")


def test_busy_daemon_serves_and_obeys(image: Path, tmp_path: Path) -> None:
    control = tmp_path / "control.sock"
    with BusyDaemon(image, socket_path=tmp_path / "nbd.sock", control_path=control) as daemon:
        with RawNbd.connected(daemon.socket_path, "disk") as client:
            daemon.set_busy(busy=True)
            assert client.read(0, 4096) == CONTENT[:4096]
            daemon.set_busy(busy=False)
        with QmpLoad(control) as load:
            with RawNbd.connected(daemon.socket_path, "disk") as client:
                assert client.read(0, 4096) == CONTENT[:4096]
            load.check()
        assert load.per_s >= PIPELINED


def test_command_load_without_a_daemon_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="doesn't answer"), QmpLoad(tmp_path / "nobody.sock"):
        pass


def test_load_result_is_the_half_that_worked() -> None:
    idle = {"total_ios": 0, "iops": 0, "bw_bytes": 0, "lat_ns": {"mean": 0}}
    latency = {"mean": 5000, "percentile": {"50.000000": 4000, "99.000000": 9000}}
    work = {"total_ios": 7, "iops": 70, "bw_bytes": 280, "lat_ns": latency}
    job = {"read": idle, "write": work, "usr_cpu": 10.0, "sys_cpu": 40.0, "job_runtime": 100}
    found = parse_result("a warning" + os.linesep + json.dumps({"jobs": [job]}))
    assert (found.requests, found.mean_us, found.p50_us, found.p99_us) == (7, 5.0, 4.0, 9.0)
    assert found.client_cpu_us == 50_000
