# SPDX-License-Identifier: Apache-2.0
"""A thousand clients at once, and a good one beside five hundred that mean harm.

The hostile ones are in a process of their own, of low priority, since real ones have machines of
their own. What the good one's p99 is compared with is its p99 beside a process that burns as much
of the processor and doesn't know the server: the rest is what they do to the server.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cpu_clock import process_cpu_ns
from tests.e2e.daemon_watch import open_descriptors, resident_kib, wait_for_descriptors
from tests.e2e.latency import quantile, read_latencies_s
from tests.peers.blockemu import BlockemuDaemon
from tests.protocol.client import Client
from tests.protocol.wire import Cmd

MIB = 1 << 20
GOOD, VICTIM = "good", "victim"
CLIENTS = 1000
HOSTILE = 500
REQUESTS = {"1": 1000, "0": 300}
WARM_UP = {"1": 5000, "0": 500}
P99_RATIO_MAX = {"1": 300, "0": 1000}
"""With the C data path, and without. Found on two cores: 1 to 90, and up to 85 (250 while the
onslaught lasts), since somebody is always awake then. A server that waits for one of them is off by
ten thousands."""
ONSLAUGHT_SHARE_MAX = 0.15
"""Of the server's work for all, what one good request may have to wait for. Found: 0.01 to 0.03;
0.36 before there were short turns."""
GROWTH_KIB_MAX = 48 << 10
IDLE_KIB_PER_CLIENT_MAX = 64

BURNER = "import os; os.nice(19); print('ready', flush=True)\nwhile True: pass"

pytestmark = [pytest.mark.usefixtures("only_ours"), pytest.mark.slow]


@pytest.fixture(params=["1", "0"], ids=["native", "python"])
def daemon(
    request: pytest.FixtureRequest, tmp_path: Path, run_dir: Path
) -> Iterator[BlockemuDaemon]:
    """Serves "good" and "victim" from one thread."""
    images = [tmp_path / "good.raw", tmp_path / "victim.raw"]
    for image in images:
        image.write_bytes(bytes(4 * MIB))
    extra = ["--name", GOOD, "--name", VICTIM, "--iothread", "both"]
    daemon = BlockemuDaemon(*images, fmt="raw", socket_path=run_dir / "nbd.sock", extra=extra)
    daemon.environment["BLOCKEMU_NATIVE"] = request.param
    with daemon:
        yield daemon
    assert "Traceback" not in daemon.stderr, daemon.stderr


@contextlib.contextmanager
def beside(*words: str) -> Iterator[None]:
    """Beside another process: it says when it is ready, and is gone in the end."""
    with subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()


def all_gone(daemon: BlockemuDaemon, descriptors: int) -> None:
    """Nobody's descriptor is left."""

    def ask() -> None:
        with Client.entered(daemon.socket_path, GOOD) as client:
            client.read(0, 1)

    ask()
    wait_for_descriptors(daemon.pid, descriptors, ask)


def p99s(daemon: BlockemuDaemon) -> list[float]:
    """A good client's, one request at a time and eight."""
    # Until the crowd's first onslaught is over; another test is about that.
    native = daemon.environment["BLOCKEMU_NATIVE"]
    read_latencies_s(daemon.socket_path, GOOD, depth=8, requests=WARM_UP[native])
    found = []
    for depth in (1, 8):
        requests = REQUESTS[native]
        latencies = read_latencies_s(daemon.socket_path, GOOD, depth=depth, requests=requests)
        found.append(quantile(latencies, 0.99))
    return found


def test_a_good_clients_p99_beside_500_hostile_ones_stays_in_proportion(
    daemon: BlockemuDaemon,
) -> None:
    before = open_descriptors(daemon.pid)
    with beside("-c", BURNER):
        alone = p99s(daemon)
    crowd = ("-m", "tests.e2e.hostile_crowd", str(daemon.socket_path), VICTIM, str(HOSTILE))
    memory = []
    for turn in range(2):
        with beside(*crowd):
            assert open_descriptors(daemon.pid) > before + HOSTILE // 2
            if turn == 0:
                hindered = p99s(daemon)
        all_gone(daemon, before)
        memory.append(resident_kib(daemon.pid))
    ratios = [with_them / without for with_them, without in zip(hindered, alone, strict=True)]
    print(f"p99 alone {alone}, beside {HOSTILE} hostile clients {hindered}; memory {memory} KiB")
    assert max(ratios) < P99_RATIO_MAX[daemon.environment["BLOCKEMU_NATIVE"]], ratios
    assert memory[1] - memory[0] < GROWTH_KIB_MAX, memory


@pytest.mark.parametrize("daemon", ["1"], ids=["native"], indirect=True)
def test_an_onslaught_of_large_requests_is_served_in_turns(daemon: BlockemuDaemon) -> None:
    """84 clients asked for 4 MiB each at once. Whoever came then waited until the server had done
    it all: 2 seconds, in which it worked for half of one. Its work is counted, not the time."""
    crowd = ("-m", "tests.e2e.hostile_crowd", str(daemon.socket_path), VICTIM, "84", "NeverReads")
    with Client.entered(daemon.socket_path, GOOD) as client:
        start_ns = process_cpu_ns(daemon.pid)
        costs_ms = [0.0]
        with beside(*crowd):
            # Until it has been quiet for a while.
            while len(costs_ms) < 300 or max(costs_ms[-200:]) > 1:
                before_ns = process_cpu_ns(daemon.pid)
                client.read(0, 4096)
                costs_ms.append((process_cpu_ns(daemon.pid) - before_ns) / 1e6)
        total_ms = (process_cpu_ns(daemon.pid) - start_ns) / 1e6
    assert max(costs_ms) < ONSLAUGHT_SHARE_MAX * total_ms, (max(costs_ms), total_ms)


def test_a_thousand_clients_are_all_served_and_leave_nothing_behind(
    daemon: BlockemuDaemon,
) -> None:
    all_gone(daemon, open_descriptors(daemon.pid))
    descriptors, memory = open_descriptors(daemon.pid), resident_kib(daemon.pid)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(Client.entered(daemon.socket_path, GOOD)) for _ in range(CLIENTS)
        ]
        assert open_descriptors(daemon.pid) >= descriptors + CLIENTS
        idle = resident_kib(daemon.pid) - memory
        assert idle < CLIENTS * IDLE_KIB_PER_CLIENT_MAX, f"{idle} KiB for {CLIENTS} idle clients"
        cookies = [client.request(Cmd.READ, 4096, 4096) for client in clients]
        for client, cookie in zip(clients, cookies, strict=True):
            assert client.answers(1)[cookie].data == bytes(4096)
    all_gone(daemon, descriptors)
    assert resident_kib(daemon.pid) - memory < GROWTH_KIB_MAX
