# SPDX-License-Identifier: Apache-2.0
"""A client that stalls is nobody's problem but its own.

The staller asks for far more than the server may hold for it and reads none of the replies. Its
neighbours, on the other export's IOThread and on its own export, are measured with and without
it. Only ratios of work done side by side are compared, alternating, so that a slow or busy
machine slows both measurements alike.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.raw_nbd import CMD_READ, CMD_WRITE, RawNbd
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.fio import Fio
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer

MIB = 1 << 20
SIZE_BYTES = 32 * MIB
# Requests per measurement, and how often each of the two is measured.
REQUESTS = 600
TURNS = 7
# A scheduler hiccup costs a turn a factor of two at times; a neighbour that waits for the staller
# costs it everything.
SLOWDOWN_MAX = 3.0
PEAK_RSS_KIB_MAX = 200 * 1024

pytestmark = pytest.mark.usefixtures("only_ours")


@pytest.fixture
def two_exports(tmp_path: Path, socket_path: Path) -> Iterator[BlockemuDaemon]:
    """One daemon, the exports "one" (raw) and "two" (raw), each on an IOThread of its own."""
    images = []
    for name in ("one", "two"):
        image = tmp_path / f"{name}.img"
        image.write_bytes(random.Random(name).randbytes(SIZE_BYTES))
        images.append(image)
    with BlockemuDaemon(*images, fmt="raw", socket_path=socket_path, export=None) as daemon:
        yield daemon


@contextlib.contextmanager
def staller(daemon: BlockemuDaemon, export: str) -> Iterator[RawNbd]:
    """A client that has asked for everything it could send, and reads nothing."""
    with RawNbd.connected(daemon.socket_path, export) as client:
        client.sock.setblocking(False)
        try:
            for turn in range(20_000):
                client.send(CMD_READ, turn % 16 * MIB, MIB)
        except BlockingIOError:
            pass  # the server has stopped reading: what it may hold for one client is full
        yield client


def time_reads(client: RawNbd, rng: random.Random) -> float:
    """How long a fixed number of small reads takes, four in flight."""
    started = time.monotonic()
    in_flight = 0
    for _ in range(REQUESTS):
        client.send(CMD_READ, rng.randrange(SIZE_BYTES // 4096) * 4096, 4096)
        in_flight += 1
        if in_flight == 4:
            assert client.reply().error == 0
            in_flight -= 1
    for _ in range(in_flight):
        assert client.reply().error == 0
    return time.monotonic() - started


def slowdown(daemon: BlockemuDaemon, *, victim: str, stalled: str, seed: int) -> float:
    """Median time with a staller over median time without, measured in turns."""
    rng = random.Random(seed)
    alone, beside = [], []
    with RawNbd.connected(daemon.socket_path, victim) as client:
        time_reads(client, rng)
        for _ in range(TURNS):
            alone.append(time_reads(client, rng))
            with staller(daemon, stalled):
                beside.append(time_reads(client, rng))
    return statistics.median(beside) / statistics.median(alone)


def test_staller_on_another_export_is_not_noticed(
    two_exports: BlockemuDaemon, random_seed: int
) -> None:
    assert slowdown(two_exports, victim="two", stalled="one", seed=random_seed) < SLOWDOWN_MAX


def test_staller_on_the_same_export_does_not_block_its_neighbours(
    two_exports: BlockemuDaemon, random_seed: int
) -> None:
    assert slowdown(two_exports, victim="one", stalled="one", seed=random_seed) < SLOWDOWN_MAX


def test_staller_under_load_on_both_exports_is_not_noticed(
    two_exports: BlockemuDaemon, random_seed: int
) -> None:
    require_peer("fio")
    command = Fio(two_exports.export_uri("one")).command(
        pattern="randread", block_bytes=4096, depth=4, extra=["--time_based", "--runtime=600"]
    )
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
        try:
            ratio = slowdown(two_exports, victim="two", stalled="one", seed=random_seed)
            assert load.poll() is None, "the load ended early: it was disturbed"
        finally:
            load.terminate()
    assert ratio < SLOWDOWN_MAX


def test_many_stallers_take_bounded_memory(two_exports: BlockemuDaemon) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(staller(two_exports, "one"))
        with RawNbd.connected(two_exports.socket_path, "one") as client:
            assert len(client.read(0, 4096)) == 4096
        peak = two_exports.peak_rss_kib()
    assert peak is not None
    assert peak < PEAK_RSS_KIB_MAX


def test_staller_gets_all_its_replies_once_it_reads(two_exports: BlockemuDaemon) -> None:
    with RawNbd.connected(two_exports.socket_path, "one") as client:
        wanted = {client.send(CMD_READ, turn % 30 * MIB, MIB) for turn in range(100)}
        with RawNbd.connected(two_exports.socket_path, "one") as other:
            other.read(0, 4096)
        assert {client.reply().cookie for _ in range(100)} == wanted


def test_staller_that_leaves_frees_what_was_held_for_it(two_exports: BlockemuDaemon) -> None:
    for _ in range(20):
        with staller(two_exports, "one"):
            pass
    with RawNbd.connected(two_exports.socket_path, "one") as client:
        assert len(client.read(0, MIB)) == MIB
    peak = two_exports.peak_rss_kib()
    assert peak is not None
    assert peak < PEAK_RSS_KIB_MAX


def test_half_sent_write_does_not_hold_up_the_others(two_exports: BlockemuDaemon) -> None:
    with RawNbd.connected(two_exports.socket_path, "one") as slow:
        slow.send(CMD_WRITE, 0, MIB, payload=b"x" * 1000)
        with RawNbd.connected(two_exports.socket_path, "one") as client:
            before = client.read(0, 4096)
            assert client.write(MIB, b"y" * 4096) == 0
            assert client.flush() == 0
            assert client.read(0, 4096) == before


def test_stop_does_not_wait_for_a_staller(two_exports: BlockemuDaemon) -> None:
    with staller(two_exports, "one"):
        two_exports.stop()


def test_stop_does_not_wait_for_a_half_negotiated_client(two_exports: BlockemuDaemon) -> None:
    with RawNbd(two_exports.socket_path):
        two_exports.stop()


def test_stop_does_not_wait_for_a_half_sent_write(two_exports: BlockemuDaemon) -> None:
    with RawNbd.connected(two_exports.socket_path, "one") as slow:
        slow.send(CMD_WRITE, 0, MIB, payload=b"x" * 1000)
        two_exports.stop()


def test_exports_of_two_formats_are_served_side_by_side(tmp_path: Path, socket_path: Path) -> None:
    require_peer("qemu-img")
    images = [
        QemuImg.create(tmp_path / f"disk{number}.qcow2", SIZE_BYTES, fmt="qcow2")
        for number in range(3)
    ]
    with BlockemuDaemon(*images, fmt="qcow2", socket_path=socket_path) as daemon:
        for number in range(3):
            with RawNbd.connected(daemon.socket_path, f"disk{number}") as client:
                assert client.write(0, bytes([number + 1]) * 512) == 0
        with RawNbd.connected(daemon.socket_path, "") as client:
            assert client.read(0, 512) == b"\1" * 512, "the default export is the first image"
        with RawNbd.connected(daemon.socket_path, "disk2") as client:
            assert client.read(0, 512) == b"\3" * 512
