# SPDX-License-Identifier: Apache-2.0
"""Clients that send anything, take nothing and leave at any time, beside clients that are verified.

Both exports of the daemon are on one IOThread. What the hostile ones do to "victim" is anything; to
"good" it is anything but a whole write. Good clients must not see one error or wrong byte, and when
the hostile ones have gone, their descriptors and their memory have come back.

`BLOCKEMU_SEED` replays the random choices, `BLOCKEMU_ROUNDS` asks for more of them (`make stress`).
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon_watch import (
    GONE_S,
    open_descriptors,
    resident_kib,
    wait_for_descriptors,
)
from tests.e2e.disk_model import DiskModel, divide
from tests.e2e.raw_nbd import (
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    OPTION_MAGIC,
    REQUEST_MAGIC,
    RawNbd,
)
from tests.e2e.verified_load import VerifiedClient, VerifiedLoad
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
KIB, MIB = 1 << 10, 1 << 20
SIZE_BYTES = 4 * MIB + 512
DEEDS_A_ROUND = 250
VISITS = 1500 * ROUNDS
# A deed may leave the allocator's and the interpreter's caches larger, not grow without end. The
# largest payloads (32 MiB) are kept in the buffer pool.
GROWTH_KIB_MAX = 48 * KIB
EXPORTS = ("good", "victim")

pytestmark = [pytest.mark.usefixtures("only_ours"), pytest.mark.slow]


def request(kind: int, offset: int, length: int, *, flags: int = 0, cookie: int = 1) -> bytes:
    """A header."""
    return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, kind, cookie, offset, length)


def noise(rng: random.Random) -> bytes:
    """Bytes that mean nothing."""
    return rng.randbytes(rng.choice([1, 17, 28, 300, 70_000]))


def mutate(stream: bytes, rng: random.Random) -> bytes:
    """Some bits flipped, some pieces lost, doubled or made up."""
    mutated = bytearray(stream)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(mutated))
        choice = rng.random()
        if choice < 0.6:
            mutated[at] ^= 1 << rng.randrange(8)
        elif choice < 0.75:
            del mutated[at : at + rng.randint(1, 40)]
        elif choice < 0.9:
            mutated[at:at] = mutated[at : at + 28]
        else:
            mutated[at:at] = rng.randbytes(rng.randint(1, 40))
        if not mutated:
            break
    return bytes(mutated)


def any_requests(rng: random.Random) -> bytes:
    """A stream of plausible requests."""
    stream = b""
    for cookie in range(rng.randint(1, 60)):
        kind = rng.choice([CMD_READ, CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES, 5, 7, 99])
        offset = rng.choice([rng.randrange(SIZE_BYTES), SIZE_BYTES - 512, 1 << 63, (1 << 64) - 1])
        length = rng.choice([0, 1, 512, 4096, rng.randrange(100_000), 33 * MIB, (1 << 32) - 1])
        flags = rng.choice([0, 0, 0, 1, 2, 3, 1 << 15])
        stream += request(kind, offset, length, flags=flags, cookie=cookie)
        if kind == CMD_WRITE and length < 200_000:
            stream += rng.randbytes(length)
    return stream


def send(client: RawNbd, data: bytes, rng: random.Random) -> None:
    """As much as the server takes, in pieces."""
    client.sock.setblocking(False)
    try:
        while data:
            sent = client.sock.send(data[: rng.choice([1, 28, 1000, 1 << 20])])
            data = data[sent:]
            if rng.random() < 0.2:
                client.sock.recv(1 << 16)
    except OSError:
        pass  # full, or hung up on: both are the server's right


# --- deeds ---


def garbage_instead_of_negotiation(path: Path, rng: random.Random) -> RawNbd:
    """Noise, or options with something wrong."""
    client = RawNbd(path)
    option = OPTION_MAGIC + struct.pack(">II", rng.choice([1, 3, 6, 7, 99]), rng.randrange(64))
    send(client, rng.choice([noise(rng), mutate(option + rng.randbytes(64), rng), option]), rng)
    return client


def garbage_instead_of_a_request(path: Path, rng: random.Random) -> RawNbd:
    """Noise where a header is due."""
    client = RawNbd.connected(path, rng.choice(EXPORTS))
    send(client, bytes([rng.randrange(0x25)]) + noise(rng), rng)
    return client


def mutated_requests(path: Path, rng: random.Random) -> RawNbd:
    """Anything, and something wrong with it."""
    client = RawNbd.connected(path, "victim")
    send(client, mutate(any_requests(rng), rng), rng)
    return client


def replies_never_read(path: Path, rng: random.Random) -> RawNbd:
    """Far more is asked for than the server may hold."""
    client = RawNbd.connected(path, rng.choice(EXPORTS))
    length = rng.choice([1, 4096, MIB, 4 * MIB])
    requests = [request(CMD_READ, 0, length, cookie=cookie) for cookie in range(600)]
    send(client, b"".join(requests), rng)
    return client


def half_a_write(path: Path, rng: random.Random) -> RawNbd:
    """Its payload ends early: small, large, or too large to take."""
    client = RawNbd.connected(path, rng.choice(EXPORTS))
    length = rng.choice([512, 60_000, MIB, 3 * MIB, 40 * MIB, (1 << 32) - 1])
    head = b"".join(request(CMD_READ, 0, 4096) for _ in range(rng.randrange(20)))
    data = rng.randbytes(rng.randrange(min(length, 2 * MIB)))
    send(client, head + request(CMD_WRITE, 0, length) + data, rng)
    return client


def half_closed(path: Path, rng: random.Random) -> RawNbd:
    """It says that it sends no more, in the middle of a header, and perhaps never reads."""
    client = RawNbd.connected(path, rng.choice(EXPORTS))
    reads = b"".join(request(CMD_READ, 0, 100_000) for _ in range(rng.randrange(100)))
    send(client, reads + request(CMD_WRITE, 0, 100)[: rng.randrange(28)], rng)
    client.sock.shutdown(socket.SHUT_WR)
    return client


def more_after_the_end(path: Path, rng: random.Random) -> RawNbd:
    """A disconnect request, and then it goes on."""
    client = RawNbd.connected(path, "victim")
    send(client, any_requests(rng) + request(CMD_DISC, 0, 0) + any_requests(rng), rng)
    return client


DEEDS: tuple[Callable[[Path, random.Random], RawNbd], ...] = (
    garbage_instead_of_negotiation,
    garbage_instead_of_a_request,
    mutated_requests,
    replies_never_read,
    half_a_write,
    half_closed,
    more_after_the_end,
)


class Crowd:
    """Does deeds, and keeps some of those who did them around for a while."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self._path = path
        self._rng = rng
        self._around: list[RawNbd] = []

    def misbehave(self, deeds: int) -> None:
        """So many deeds; at the end, all have gone."""
        for _ in range(deeds):
            client = self._rng.choice(DEEDS)(self._path, self._rng)
            self._around.append(client)
            if len(self._around) > self._rng.randrange(12):
                self._around.pop(self._rng.randrange(len(self._around))).close()
        while self._around:
            self._around.pop().close()


# --- the daemon, seen from outside ---


def ask(control: Path, command: str) -> list[dict[str, Any]]:
    """The answer to a QMP query."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(GONE_S)
        sock.connect(str(control))
        lines = sock.makefile("rw")
        lines.readline()
        for name in ("qmp_capabilities", command):
            lines.write(json.dumps({"execute": name}) + "\n")
            lines.flush()
            answer = json.loads(lines.readline())
        found: list[dict[str, Any]] = answer["return"]
        return found


def wait_until_alone(server: BlockemuDaemon, control: Path, descriptors: int) -> None:
    """Until no more are open than these."""
    wait_for_descriptors(server.pid, descriptors, lambda: ask(control, "query-block-exports"))


@pytest.fixture(params=["1", "0"], ids=["native", "python"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, run_dir: Path
) -> Iterator[BlockemuDaemon]:
    """Serves "good", raw, and "victim", qcow2, from one thread."""
    require_peer("qemu-img")
    images = [tmp_path / "good.raw", tmp_path / "victim.qcow2"]
    images[0].write_bytes(random.Random(1).randbytes(SIZE_BYTES))
    QemuImg.create(images[1], SIZE_BYTES)
    extra = ["--name", "good", "--name", "victim", "--iothread", "both"]
    extra += ["--control", str(run_dir / "qmp.sock")]
    daemon = BlockemuDaemon(*images, fmt=None, socket_path=run_dir / "nbd.sock", extra=extra)
    daemon.environment["BLOCKEMU_NATIVE"] = request.param
    with daemon:
        yield daemon
    assert "Traceback" not in daemon.stderr, daemon.stderr
    found = QemuImg.check(images[1])
    assert (found.corruptions, found.errors) == (0, 0), found.text


def good_clients(server: BlockemuDaemon, rng: random.Random) -> list[VerifiedClient]:
    """Two of them."""
    model = DiskModel(random.Random(1).randbytes(SIZE_BYTES), rng)
    return [
        VerifiedClient(
            f"good{number}",
            server.socket_path,
            "good",
            model=model,
            lots=lots,
            depth=16,
            rng=random.Random(rng.random()),
        )
        for number, lots in enumerate(divide(SIZE_BYTES, 2, rng))
    ]


def serve_beside(
    clients: list[VerifiedClient], rng: random.Random, work: Callable[[], None]
) -> None:
    """The good clients' load, until `work` is done in a thread. Raises: what that raises, too."""
    failed: list[BaseException] = []
    near, far = socket.socketpair()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        finally:
            far.send(b".")

    thread = threading.Thread(target=run, daemon=True)
    with near, far:
        load = VerifiedLoad(clients, rng=rng, enough=lambda: not thread.is_alive())
        thread.start()
        load.run(near)
        thread.join(GONE_S)
    if failed:
        raise failed[0]


@pytest.mark.timeout(90 * (1 + ROUNDS))
def test_good_clients_notice_nothing_of_hostile_ones_which_leave_nothing_behind(
    server: BlockemuDaemon, run_dir: Path, random_seed: int
) -> None:
    rng = random.Random(random_seed)
    clients = good_clients(server, rng)
    crowd = Crowd(server.socket_path, random.Random(rng.random()))
    before = open_descriptors(server.pid)
    memory: list[int] = []
    for _ in range(1 + ROUNDS):
        serve_beside(clients, rng, lambda: crowd.misbehave(DEEDS_A_ROUND))
        wait_until_alone(server, run_dir / "qmp.sock", before)
        memory.append(resident_kib(server.pid))
    assert max(memory[1:]) - memory[0] < GROWTH_KIB_MAX, memory
    good, victim = ask(run_dir / "qmp.sock", "x-query-export-stats")
    assert (good["id"], victim["id"]) == EXPORTS
    reads = sum(client.counts["read"] for client in clients)
    (counted,) = (one["requests"] for one in good["operations"] if one["operation"] == "read")
    assert counted >= reads > 0


@pytest.mark.timeout(60 * (1 + ROUNDS))
def test_descriptors_and_memory_of_thousands_of_short_visits_come_back(
    server: BlockemuDaemon, run_dir: Path, random_seed: int
) -> None:
    rng = random.Random(random_seed)
    clients = good_clients(server, rng)
    visitors = random.Random(rng.random())
    before = open_descriptors(server.pid)

    def visit() -> None:
        for _ in range(VISITS):
            sort = visitors.random()
            if sort < 0.3:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.connect(str(server.socket_path))
            elif sort < 0.5:
                RawNbd(server.socket_path).close()
            else:
                with RawNbd.connected(server.socket_path, visitors.choice(EXPORTS)) as client:
                    client.send(CMD_READ, 0, visitors.choice([512, 200_000]))

    memory = []
    for _ in range(2):
        serve_beside(clients, rng, visit)
        wait_until_alone(server, run_dir / "qmp.sock", before)
        memory.append(resident_kib(server.pid))
    assert memory[1] - memory[0] < GROWTH_KIB_MAX, memory
    assert len(ask(run_dir / "qmp.sock", "query-block-exports")) == len(EXPORTS)
