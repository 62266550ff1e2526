# SPDX-License-Identifier: Apache-2.0
"""What clients cost and get besides I/O: coming, being there, and being there beside hostile ones.

*idle*: the server's resident memory with 1000 connections in transmission, above that with none.
*first read*: from connect() to the first 4 KiB of data, negotiation and all, by a client in Python
that is the same for all servers. *p99*: of 4 KiB reads, alone (beside a process of low priority
that keeps the processor busy) and beside 500 hostile clients in such a process.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.contestants import OURS
from benchmarks.measure import rotated
from benchmarks.nbd_sample import Sample
from benchmarks.workloads import MIB
from tests.e2e.daemon_watch import resident_kib
from tests.e2e.latency import quantile, read_latencies_s
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.process import ServerFailed, ServerProcess
from tests.peers.qemu import QemuNbd
from tests.protocol.client import Client

QEMU_NBD = "qemu-nbd"
CONNECTIONS = 1000
FIRST_READS = 200
HOSTILE = 500
P99_REQUESTS = 5000
WARM_UP = 10_000
"""Reads until the first onslaught is over."""
DEPTHS = (1, 8)
ALONE, BESIDE = "alone", f"beside {HOSTILE}"
BURNER = "import os; os.nice(19); print('ready', flush=True)\nwhile True: pass"

Servers = Sequence[tuple[str, Callable[[], ServerProcess]]]


def make_servers(folder: Path) -> Servers:
    """blockemu and qemu-nbd, each of an image of its own."""
    images = {name: folder / f"{name}.raw" for name in (OURS, QEMU_NBD)}
    for image in images.values():
        image.write_bytes(bytes(4 * MIB))

    def ours() -> ServerProcess:
        return BlockemuDaemon(
            images[OURS], fmt="raw", socket_path=folder / "clients.sock", export="disk"
        )

    def theirs() -> ServerProcess:
        return QemuNbd(images[QEMU_NBD], fmt="raw", socket_path=folder / "qemu.sock", export="disk")

    return ((OURS, ours), (QEMU_NBD, theirs))


def idle_kib(server: ServerProcess) -> float:
    """What 1000 clients in transmission add to its memory."""
    with Client.entered(server.socket_path, "disk") as client:
        client.read(0, 4096)
    before = resident_kib(server.pid)
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(Client.entered(server.socket_path, "disk"))
        return resident_kib(server.pid) - before


def first_read_us(server: ServerProcess) -> float:
    """The median over many clients, one after the other."""
    took = []
    for _ in range(FIRST_READS):
        began = time.perf_counter()
        with Client.entered(server.socket_path, "disk") as client:
            client.read(0, 4096)
            took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def measure_clients(
    folder: Path, *, rounds: int, complain: Callable[[str], None]
) -> Iterator[Sample]:
    """Idle connections and first reads, beside qemu-nbd."""
    alive = list(make_servers(folder))
    for turn in range(rounds):
        for one in rotated(alive, turn):
            name, make = one
            try:
                with make() as server:
                    yield Sample("first read", name, "us", turn, first_read_us(server))
                    yield Sample(f"{CONNECTIONS} idle", name, "KiB", turn, idle_kib(server))
            except (ServerFailed, OSError) as error:
                complain(f"nbd: {name} is out: {str(error).splitlines()[0]}")
                alive.remove(one)


@contextlib.contextmanager
def beside(*words: str) -> Iterator[None]:
    """Beside another Python, which says when it is ready."""
    with subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"ready\n":
                raise ServerFailed(f"{words} didn't get ready", "")
            yield
        finally:
            process.kill()


def measure_hostile(folder: Path, *, rounds: int) -> Iterator[Sample]:
    """The p99 of a good client, alone and beside hostile ones. Raises: ServerFailed."""
    images = [folder / f"{name}.raw" for name in ("good", "victim")]
    for image in images:
        image.write_bytes(bytes(4 * MIB))
    extra = ["--iothread", "both"]
    path = folder / "hostile.sock"
    crowd = ("-m", "tests.e2e.hostile_crowd", str(path), "victim", str(HOSTILE))
    with BlockemuDaemon(*images, fmt="raw", socket_path=path, extra=extra):
        for turn in range(rounds):
            for how, words in ((ALONE, ("-c", BURNER)), (BESIDE, crowd)):
                with beside(*words):
                    read_latencies_s(path, "good", depth=8, requests=WARM_UP)
                    for depth in DEPTHS:
                        found = read_latencies_s(path, "good", depth=depth, requests=P99_REQUESTS)
                        p99_us = quantile(found, 0.99) * 1e6
                        yield Sample(f"p99 d{depth}", how, "us", turn, p99_us)
