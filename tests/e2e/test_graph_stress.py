# SPDX-License-Identifier: Apache-2.0
"""The graph changes all the time, by every verb that there is (graph_verbs.py), while clients judge
every reply (verified_load.py): no lost or stale read, no double completion, no hang.

The daemon runs in the test's process, so that the graph is at hand. Between two stretches of load
all clients are gone, and the graph moves to another AioContext. `BLOCKEMU_SEED` replays the random
choices of a run, `BLOCKEMU_ROUNDS` asks for more of them (`make stress`). Threads run as they like,
so a replay is no exact repetition; but it does the same to the same image.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from blockemu.config import UnixAddress, serve_config
from blockemu.daemon import Daemon
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Task
from blockemu.loop.iothread import IOThread
from tests.e2e.disk_model import DiskModel, divide
from tests.e2e.graph_verbs import Graph, change, check_everything
from tests.e2e.verified_load import STALL_S, Stalled, VerifiedClient, VerifiedLoad
from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.peers.requirement import require_peer
from tests.unit.daemon_thread import DaemonThread

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
KIB, MIB = 1 << 10, 1 << 20
CLIENTS = 4
STRETCHES = 3
VERBS_A_STRETCH = 40

# Format, cache, where the image is. Each is another way of host I/O (ARCHITECTURE.md, "The data
# path"): on the spot in a memory filesystem, by the page cache of a disk, by Linux AIO.
SERVED = [
    ("raw", "writeback", "memory"),
    ("raw", "writeback", "disk"),
    ("raw", "direct", "disk"),
    ("qcow2", "writeback", "memory"),
    ("qcow2", "direct", "disk"),
]


def make_image(folder: Path, fmt: str, rng: random.Random) -> tuple[Path, bytes]:
    """An image, and what it holds. Its end isn't aligned to anything.

    A qcow2 has clusters of its own, and perhaps some that a snapshot shares or a base holds.
    """
    length = 2 * MIB + rng.choice([0, 512, 4096 + 512, rng.randrange(100_000)])
    image = folder / f"image.{fmt}"
    if fmt == "raw":
        content = rng.randbytes(length)
        image.write_bytes(content)
        return image, content
    length = length // 512 * 512
    options = {"cluster_size": rng.choice([512, 4 * KIB, 16 * KIB, 64 * KIB])}
    if rng.random() < 0.6:
        below = rng.randbytes(length // 2)
        base = folder / "base.raw"
        base.write_bytes(below)
        QemuImg.create(image, length, options=options, backing=base, backing_fmt="raw")
        content = bytearray(below.ljust(length, b"\0"))
    else:
        QemuImg.create(image, length, options=options)
        content = bytearray(length)
    _scribble(image, content, rng)
    if rng.random() < 0.5:
        run_tool(["qemu-img", "snapshot", "-c", "before", image])
        _scribble(image, content, rng)
    return image, bytes(content)


def _scribble(image: Path, content: bytearray, rng: random.Random) -> None:
    commands = []
    for value in range(1, 9):
        offset = rng.randrange(len(content) - 70_000)
        count = rng.randrange(1, 70_000)
        commands.append(f"write -P {value} {offset} {count}")
        content[offset : offset + count] = bytes([value]) * count
    QemuIo(image, fmt="qcow2").run(*commands)


class Stress:
    """A daemon whose graph changes under load. Context: the test's thread."""

    def __init__(
        self, daemon: Daemon, graph: Graph, clients: list[VerifiedClient], rng: random.Random
    ) -> None:
        self._daemon = daemon
        self._graph = graph
        self._clients = clients
        self._rng = rng

    def stretch(self, verbs: int) -> None:
        """Clients and verbs at once, until the verbs have been done and the clients have left."""
        graph = self._graph
        graph.since = time.monotonic()
        near, far = socket.socketpair()
        with near, far:
            changes = graph.backend.ctx.spawn_threadsafe(lambda: change(graph, verbs))
            changes.add_done_callback(lambda _: far.send(b"."))

            def enough() -> bool:
                if not changes.done() and time.monotonic() - graph.since > STALL_S:
                    raise Stalled(f"the verb '{graph.doing}' doesn't end")
                return changes.done()

            load = VerifiedLoad(
                self._clients,
                rng=self._rng,
                enough=enough,
                on_replies=self._count,
                describe=lambda: f"graph: '{graph.doing}' is under way; {dict(graph.counts)}",
            )
            try:
                load.run(near)
            except BaseException:
                changes.cancel()
                raise
            finally:
                wait_for(changes)
        changes.result()

    def _count(self, replies: int) -> None:
        self._graph.replies += replies

    def settle(self, move_to: AioContext) -> None:
        """When the clients have gone: check the whole disk, and move it."""
        daemon, graph = self._daemon, self._graph
        (export,) = daemon.exports
        run_in(daemon.iohandler_ctx, lambda: daemon.nbd.disconnect(export))
        run_in(graph.backend.ctx, lambda: check_everything(graph))
        run_in(daemon.main_ctx, lambda: graph.backend.move_to(move_to))


def run_in(ctx: AioContext, factory: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine in a context of the daemon, from the test's thread."""
    task = ctx.spawn_threadsafe(factory)
    wait_for(task)
    task.result()


def wait_for(task: Task[None]) -> None:
    """Until it has ended. Raises: Stalled."""
    ended = threading.Event()
    task.add_done_callback(lambda _: ended.set())
    if not ended.wait(STALL_S):
        raise Stalled(f"{task} doesn't end")


@pytest.mark.slow
@pytest.mark.timeout(60 + 60 * ROUNDS)
@pytest.mark.parametrize("native", ["native", "python"])
@pytest.mark.parametrize(
    ("fmt", "cache", "folder"),
    [pytest.param(f, c, (w, c), id=f"{f}-{c}-{w}") for f, c, w in SERVED],
    indirect=["folder"],
)
def test_no_read_is_stale_and_no_reply_lost_while_the_graph_changes(
    fmt: str,
    cache: str,
    folder: Path,
    native: str,
    run_dir: Path,
    random_seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fmt == "qcow2":
        require_peer("qemu-img")
        require_peer("qemu-io")
    monkeypatch.setenv("BLOCKEMU_NATIVE", "1" if native == "native" else "0")
    for turn in range(ROUNDS):
        rng = random.Random(f"{random_seed}-{fmt}-{cache}-{native}-{turn}")
        image, content = make_image(folder, fmt, rng)
        stress_one_image(image, fmt, cache, content, run_dir / "nbd.sock", rng)
        if fmt == "qcow2":
            found = QemuImg.check(image)
            assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text


def stress_one_image(
    image: Path, fmt: str, cache: str, content: bytes, path: Path, rng: random.Random
) -> None:
    """Serve it, in one context after the other, and say what came of it."""
    config = serve_config(
        [str(image)],
        names=["disk"],
        fmt=fmt,
        direct=cache == "direct",
        address=UnixAddress(str(path)),
    )
    model = DiskModel(content, rng)
    *theirs, ours = divide(len(content), CLIENTS + 1, rng)
    clients = [
        VerifiedClient(
            f"client{number}",
            path,
            "disk",
            model=model,
            lots=lots,
            depth=rng.choice([1, 4, 32, 100]),
            rng=random.Random(rng.random()),
        )
        for number, lots in enumerate(theirs)
    ]
    other = IOThread("other")
    other.start()
    try:
        with DaemonThread(config) as server:
            daemon = server.daemon
            (export,) = daemon.exports
            graph = Graph(export.backend, model, ours, random.Random(rng.random()), fmt)
            stress = Stress(daemon, graph, clients, rng)
            homes = [*(thread.ctx for thread in daemon.iothreads.values()), other.ctx]
            homes.append(daemon.main_ctx)
            for _ in range(STRETCHES):
                stress.stretch(VERBS_A_STRETCH)
                stress.settle(rng.choice(homes))
    finally:
        other.stop()
    replies = sum(sum(client.counts.values()) for client in clients)
    connections = sum(client.connections for client in clients)
    print(f"{replies} replies on {connections} connections; {dict(graph.counts)}")
