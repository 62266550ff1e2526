# SPDX-License-Identifier: Apache-2.0
"""kill -9 of an NBD server, and its restart, under a verified load through our client.

The client is a daemon on top of the server's export, which waits for it (`reconnect-delay`). Those
who use that daemon see no error; and what they had flushed is there at the end. What the server had
acknowledged, and nobody flushed before the kill, it may have lost (ARCHITECTURE.md). A round is two
kills; `make crash` goes on for as many as you like.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.e2e.block_writer import BLOCK_BYTES, BlockWriter
from tests.e2e.raw_nbd import RawNbd
from tests.e2e.test_nbd_chain import json_name
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.certificates import Pki, tls_object
from tests.peers.nbdkit import NbdKit
from tests.peers.process import ServerProcess
from tests.peers.qemu import QemuImg, QemuNbd
from tests.peers.requirement import require_peer
from tests.peers.scripted_nbd import Client, ScriptedNbd

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
KILLS = 2
BLOCKS = 2048
WRITES_MIN, WRITES_MAX = 20, 300

Start = Callable[[Path, Path, Sequence[str]], ServerProcess]
"""Of an image, a socket's path, and arguments for TLS."""


def ours(fmt: str, cache: str) -> Start:
    return lambda image, socket, tls: BlockemuDaemon(
        image, fmt=fmt, socket_path=socket, export="disk", cache=cache, extra=tls
    )


def qemu(fmt: str) -> Start:
    def start(image: Path, socket: Path, tls: Sequence[str]) -> ServerProcess:
        server = QemuNbd(image, fmt=fmt, socket_path=socket, export="disk", shared=8)
        server.command[1:1] = tls
        return server

    return start


CASES: dict[str, tuple[str, int, Start]] = {
    "qcow2-multi-conn": ("qcow2", 4, ours("qcow2", cache="writeback")),
    "tls-qcow2-multi-conn": ("qcow2", 4, ours("qcow2", cache="writeback")),
    "tls-qemu-nbd-multi-conn": ("qcow2", 4, qemu("qcow2")),
    "raw-direct": ("raw", 1, ours("raw", cache="direct")),
    "qemu-nbd-qcow2-multi-conn": ("qcow2", 4, qemu("qcow2")),
    "nbdkit-multi-conn": ("raw", 3, lambda image, socket, _: NbdKit(image, socket_path=socket)),
}


class DoubtingWriter(BlockWriter):
    """Knows that its server's server may have been killed."""

    def doubt(self) -> None:
        """Only what was flushed is sure; of what is in flight, some may be answers from before."""
        self.acknowledged = list(self.flushed)
        self._in_flight = {
            cookie: write._replace(is_trim=True) for cookie, write in self._in_flight.items()
        }

    def take_all(self, client: RawNbd) -> None:
        """Every request is answered, and well."""
        while self._in_flight:
            reply = client.reply()
            assert not reply.error, reply
            self._account(reply)


@pytest.mark.usefixtures("only_ours")
@pytest.mark.parametrize("case", CASES)
def test_no_flushed_write_is_lost_when_the_server_is_killed(
    direct_dir: Path, run_dir: Path, random_seed: int, pki: Pki, case: str
) -> None:
    for peer in ("qemu-img", "qemu-nbd", "nbdkit"):
        require_peer(peer)
    fmt, connections, start = CASES[case]
    rng = random.Random(f"{random_seed}-{case}")
    image = QemuImg.create(direct_dir / f"disk.{fmt}", BLOCKS * BLOCK_BYTES, fmt=fmt)
    writer = DoubtingWriter(BLOCKS, rng, trims_share=0.05)
    below, above = run_dir / "below", run_dir / "above"
    options: dict[str, str | int] = {"multi-conn": connections, "reconnect-delay": 60}
    server_tls: list[str] = []
    client_tls: list[str] = []
    if case.startswith("tls"):
        options |= {"tls-creds": "tls0", "tls-hostname": "localhost"}
        server_tls = ["--object", tls_object(pki.folder, "server"), "--tls-creds", "tls0"]
        client_tls = ["--object", tls_object(pki.folder, "client")]
    name = json_name(below, "disk", **options)
    server = start(image, below, server_tls).start()

    def kill_and_restart() -> None:
        nonlocal server
        server.discard()
        writer.doubt()
        server = start(image, below, server_tls).start()
        writer.take_all(client)

    try:
        with (
            BlockemuDaemon(
                name, fmt=None, socket_path=above, export="disk", extra=client_tls
            ) as upper,
            RawNbd.connected(upper.socket_path, "disk") as client,
        ):
            for _ in range(KILLS * ROUNDS):
                writes = rng.randint(WRITES_MIN, WRITES_MAX)
                writer.run(client, writes=writes, at_end=kill_and_restart)
            writer.find_generations(client, at_least=writer.flushed)
    finally:
        server.discard()
    if fmt == "qcow2":
        found = QemuImg.check(image)
        assert (found.corruptions, found.errors) == (0, 0), found.text
    with (
        BlockemuDaemon(image, fmt=fmt, socket_path=below, export="disk") as last,
        RawNbd.connected(last.socket_path, "disk") as client,
    ):
        writer.find_generations(client, at_least=writer.flushed)


@pytest.mark.usefixtures("only_ours")
def test_sigterm_ends_a_daemon_that_still_waits_for_its_server(run_dir: Path) -> None:
    """The server accepts and says nothing; `open-timeout` would go on for an hour."""
    connected = threading.Event()

    def serve(client: Client) -> None:
        connected.set()
        client.receive(1)

    name = json_name(run_dir / "below", "disk", **{"open-timeout": 3600})
    daemon = BlockemuDaemon(name, fmt=None, socket_path=run_dir / "above", export="disk")
    try:
        with ScriptedNbd(run_dir / "below", serve):
            daemon._spawn(daemon.command)
            assert connected.wait(30)
            begun = time.monotonic()
            daemon.stop()
            assert time.monotonic() - begun < 10
        assert daemon.stderr == ""
    finally:
        daemon.discard()
