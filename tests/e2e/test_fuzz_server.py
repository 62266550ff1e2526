# SPDX-License-Identifier: Apache-2.0
"""Whatever a client says to the daemon, the next one is served, and nothing is left of the first.

`BLOCKEMU_SECONDS` goes on for so long, with new examples (`make fuzz`); `BLOCKEMU_SEED` begins
where another run did. `BLOCKEMU_SANITIZED` is a folder for the sanitized build, which is then the
one that is fuzzed (`make fuzz-asan`): whatever the sanitizers find ends the daemon, and the test.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.e2e.conversations import (
    EXPORT,
    EXPORT_BYTES,
    Conversation,
    check_words,
    conversations,
    converse,
)
from tests.e2e.daemon_watch import open_descriptors, resident_kib, wait_for_descriptors
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer
from tests.protocol.client import Client

SECONDS = float(os.environ.get("BLOCKEMU_SECONDS", "0"))
SANITIZED = os.environ.get("BLOCKEMU_SANITIZED")
EXAMPLES = 60
GOOD = random.Random(11).randbytes(1 << 20)
# The largest payload (32 MiB) is kept in the buffer pool; a sanitizer keeps what was freed.
GROWTH_KIB_MAX = 48 << 10

pytestmark = [pytest.mark.usefixtures("only_ours"), pytest.mark.slow]


def sanitized_environment(folder: str) -> dict[str, str]:
    """In which the daemon is the sanitized build."""
    build = Path(__file__).parents[2] / "tools" / "sanitized-build"
    lines = subprocess.run([build, folder], check=True, capture_output=True, text=True).stdout
    return dict(line.split("=", 1) for line in lines.splitlines())


@pytest.fixture(params=["1", "0"], ids=["native", "python"])
def daemon(
    request: pytest.FixtureRequest, tmp_path: Path, run_dir: Path
) -> Iterator[BlockemuDaemon]:
    """Serves "good", raw, and "victim", qcow2, from one thread."""
    require_peer("qemu-img")
    images = [tmp_path / "good.raw", tmp_path / "victim.qcow2"]
    images[0].write_bytes(GOOD)
    QemuImg.create(images[1], EXPORT_BYTES)
    extra = ["--name", "good", "--name", EXPORT, "--iothread", "both"]
    daemon = BlockemuDaemon(*images, fmt=None, socket_path=run_dir / "nbd.sock", extra=extra)
    daemon.environment["BLOCKEMU_NATIVE"] = request.param
    if SANITIZED:
        daemon.environment.update(sanitized_environment(SANITIZED))
    with daemon:
        yield daemon
    assert "Traceback" not in daemon.stderr, daemon.stderr
    assert "runtime error" not in daemon.stderr, daemon.stderr
    found = QemuImg.check(images[1])
    assert (found.corruptions, found.errors) == (0, 0), found.text


class Witness:
    """A well-behaved client that stays, and what the daemon cost when it came."""

    def __init__(self, daemon: BlockemuDaemon) -> None:
        self._daemon = daemon
        self._client = Client.entered(daemon.socket_path, "good")
        self.descriptors = open_descriptors(daemon.pid)

    def is_served(self) -> None:
        """This connection, and a fresh one."""
        assert self._client.read(4096, 4096) == GOOD[4096:8192]
        with Client.entered(self._daemon.socket_path, "good") as fresh:
            assert fresh.read(0, 512) == GOOD[:512]

    def is_alone(self) -> None:
        """No descriptor of anybody else is left."""
        wait_for_descriptors(self._daemon.pid, self.descriptors, lambda: self._client.read(0, 1))

    def close(self) -> None:
        """Leave."""
        self._client.close()


def fuzz(daemon: BlockemuDaemon, witness: Witness, seed: int) -> None:
    """So many examples from this seed."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        suppress_health_check=[*hypothesis.HealthCheck],
        deadline=None,
    )
    @hypothesis.given(conversations())
    def case(conversation: Conversation) -> None:
        said = converse(daemon.socket_path, conversation)
        check_words(conversation, said)
        assert daemon.running, daemon.stderr
        witness.is_served()
        witness.is_alone()

    case()


@pytest.mark.timeout(120 + 2 * SECONDS)
def test_daemon_survives_whatever_is_said_and_keeps_nothing_of_it(
    daemon: BlockemuDaemon, random_seed: int
) -> None:
    witness = Witness(daemon)
    deadline = time.monotonic() + SECONDS
    fuzz(daemon, witness, random_seed)
    before = resident_kib(daemon.pid)
    seed = random_seed + 1
    while True:
        print(f"seed {seed}", flush=True)
        fuzz(daemon, witness, seed)
        seed += 1
        if time.monotonic() >= deadline:
            break
    grown = resident_kib(daemon.pid) - before
    assert SANITIZED or grown < GROWTH_KIB_MAX, f"{grown} KiB more than after the first round"
    witness.close()
