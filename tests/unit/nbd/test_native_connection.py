# SPDX-License-Identifier: Apache-2.0
"""Native connections on real files, through a real graph: they answer as Python's do, and without
Python where the request is plain."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockemu.drivers._direct_map import lib
from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.drain import DrainedSection
from blockemu.drivers.native_map import NativeMap
from blockemu.drivers.nbd.protocol import Command, CommandFlag, NbdError
from blockemu.drivers.registry import Opener
from blockemu.exports import Export
from blockemu.img.create import CreateRequest, create_image
from blockemu.limits import Limits
from blockemu.loop.aio_context import AioContext
from blockemu.loop.host_file import PosixFiles
from blockemu.nbd.connection import BaseConnection
from blockemu.nbd.reply_style import STYLES
from blockemu.nbd.server import make_connection
from blockemu.nbd.session import Session
from tests.unit.nbd.client import Client, header
from tests.unit.nbd.conftest import STYLE_NAMES

READ = Command.NBD_CMD_READ
WRITE = Command.NBD_CMD_WRITE
DISC = Command.NBD_CMD_DISC
FLUSH = Command.NBD_CMD_FLUSH
TRIM = Command.NBD_CMD_TRIM
WRITE_ZEROES = Command.NBD_CMD_WRITE_ZEROES
CACHE = Command.NBD_CMD_CACHE
FUA = CommandFlag.NBD_CMD_FLAG_FUA
DF = CommandFlag.NBD_CMD_FLAG_DF
FAST_ZERO = CommandFlag.NBD_CMD_FLAG_FAST_ZERO
KIB = 1024
MIB = 1 << 20
SIZE = 4 * MIB
PLACES = ("memory", "page cache", "direct")


class PatientClient(Client):
    """Sleeps in the server's loop for as long as the disk takes; pytest's time-out ends it."""

    heard = b""
    """All that the server has said."""

    def receive(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            try:
                data = self.sock.recv(length - len(received))
            except BlockingIOError:
                self.sleep()
                continue
            assert data, f"hung up after {received!r}"
            received += data
        self.heard += received
        return received

    def sleep(self) -> None:
        """One round. The native poll would serve us for ever, so our end wakes it, too."""
        (ctx,) = self._contexts
        ctx.set_fd_handler(self.sock.fileno(), read=lambda: None)
        try:
            ctx.poll(blocking=True)
        finally:
            ctx.set_fd_handler(self.sock.fileno())


class Disk:
    """An image on some filesystem, a graph that has it open, and connections to it."""

    def __init__(self, path: Path, fmt: str, *, native: bool, direct: bool) -> None:
        self.path = path
        if fmt == "raw":
            path.write_bytes(bytes(SIZE))
        else:
            create_image(CreateRequest.from_user(str(path), str(SIZE), fmt=fmt))
        self.ctx = AioContext("test", native=native)
        self.ctx.adopt()
        file = {"driver": "file", "filename": str(path), "cache": {"direct": direct}}
        opener = Opener(files=PosixFiles(), ctx=self.ctx)
        self.node = self.ctx.run(opener.open({"driver": fmt, "file": file}))
        self.backend = BlockBackend("disk", self.node, writable=True)
        self.export = Export("disk", self.backend)
        self.connections: list[tuple[BaseConnection, list[bool], PatientClient]] = []

    def connect(self, style: str = "simple", *, limits: Limits | None = None) -> PatientClient:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        closed: list[bool] = []
        connection = make_connection(
            ours,
            Session(self.export, STYLES[STYLE_NAMES.index(style)]),
            limits=limits or Limits(),
            on_closed=lambda: closed.append(True),
        )
        connection.start()
        client = PatientClient(theirs, self.ctx, style=style)
        self.connections.append((connection, closed, client))
        return client

    def wait_closed(self) -> None:
        """Until nothing of any connection is left."""
        while not all(closed for _, closed, _ in self.connections):
            self.ctx.poll(blocking=True)
        assert not self.export.connections

    def close(self) -> None:
        for _, _, client in self.connections:
            client.sock.close()
        self.wait_closed()
        self.ctx.run(self.backend.close())
        self.ctx.close()

    def native_map(self) -> NativeMap:
        """What C looks into."""
        direct_map, poller = self.backend.direct_map, self.ctx.native
        assert direct_map is not None
        assert poller is not None
        native_map = direct_map.native_handle(poller)
        assert native_map is not None
        return native_map

    @property
    def faults(self) -> int:
        return self.export.statistics.snapshot().faults


OpenDisk = Callable[..., Disk]


@pytest.fixture
def open_disk(tmp_path: Path) -> Iterator[OpenDisk]:
    """Opens disks; at the end they close without a trace."""
    made: list[Disk] = []

    def start(place: str, fmt: str = "raw", *, native: bool = True) -> Disk:
        folder = Path("/dev/shm") if place == "memory" else tmp_path
        name = f"blockemu-{os.getpid()}-{len(made)}.img"
        made.append(Disk(folder / name, fmt, native=native, direct=place == "direct"))
        return made[-1]

    yield start
    for disk in made:
        disk.close()
        disk.path.unlink()


def some_request(source: random.Random, client: Client, cookie: int) -> tuple[bytes, int]:
    """A request, mostly sensible, and the length of the data that its reply has if it succeeds."""
    command = source.choice([READ] * 4 + [WRITE] * 4 + [FLUSH, TRIM, WRITE_ZEROES, CACHE, 99])
    grain = source.choice([4096, 4096, 512, 1])
    length = source.choice([0, 1, 3, 8, 17, 70]) * grain
    offset = source.randrange(0, SIZE // grain) * grain
    if command == FLUSH:
        offset = length = 0
    flags = source.choice([0] * 6 + [FUA, DF, FAST_ZERO, 1 << 9])
    payload = source.randbytes(length) if command == WRITE else b""
    asked = client.header(command, flags=flags, cookie=cookie, offset=offset, length=length)
    return asked + payload, length if command == READ else 0


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("place", PLACES)
def test_both_kinds_answer_the_same(open_disk: OpenDisk, place: str, fmt: str, style: str) -> None:
    """Errors, data, what the image holds in the end, and every byte on the way."""
    answers = []
    for native in (False, True):
        disk = open_disk(place, fmt, native=native)
        client = disk.connect(style)
        source = random.Random(f"{place} {fmt}")
        said = []
        for cookie in range(300):
            request, length = some_request(source, client, cookie)
            client.send(request)
            said.append(client.reply(length))
        for offset in range(0, SIZE, MIB):
            client.request(READ, offset=offset, length=MIB)
            said.append(client.reply(MIB))
        assert {error for _, error, _ in said} >= {0}
        answers.append((said, client.heard))
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] == answers[1][1]


@pytest.mark.parametrize("place", PLACES)
def test_a_deep_queue_reads_what_it_wrote(open_disk: OpenDisk, place: str, style: str) -> None:
    disk = open_disk(place)
    client = disk.connect(style)
    content = random.Random(place).randbytes(SIZE)
    for chunk in (4096, 128 * KIB):
        count = min(SIZE // chunk, 64)
        for i in range(count):
            data = content[i * chunk : (i + 1) * chunk]
            client.request(WRITE, cookie=i, offset=i * chunk, payload=data)
        assert {client.reply()[:2] for _ in range(count)} == {(i, 0) for i in range(count)}
        places = ((i, i * chunk) for i in range(count))
        client.send(
            b"".join(
                client.header(READ, cookie=i, offset=place, length=chunk) for i, place in places
            )
        )
        for _ in range(count):
            cookie, error, data = client.reply(chunk)
            assert not error
            assert data == content[cookie * chunk : (cookie + 1) * chunk]


@pytest.mark.parametrize("place", ["memory", "direct"])
def test_plain_requests_are_no_faults_and_counted(
    open_disk: OpenDisk, place: str, style: str
) -> None:
    disk = open_disk(place)
    client = disk.connect(style)
    for i in range(10):
        client.request(WRITE, cookie=i, offset=i * 4096, payload=bytes([i]) * 4096)
        assert client.reply() == (i, 0, b"")
        client.request(READ, cookie=i, offset=i * 4096, length=4096)
        assert client.reply(4096) == (i, 0, bytes([i]) * 4096)
    snapshot = disk.export.statistics.snapshot()
    assert snapshot.faults == 0
    for name in ("read", "write"):
        operation = snapshot.operations[name]
        assert (operation.requests, operation.bytes, operation.errors) == (10, 40960, 0)
        assert 0 < operation.latency_p50_ns <= operation.latency_p999_ns


def test_faults_are_counted_once_by_who_answers(open_disk: OpenDisk) -> None:
    disk = open_disk("memory")
    client = disk.connect()
    client.request(READ, flags=FUA, length=4096)
    client.reply(4096)
    client.request(TRIM, length=4096)
    client.reply()
    client.request(READ, offset=SIZE, length=4096)
    assert client.reply()[1]
    client.request(READ, length=4096)
    client.reply(4096)
    snapshot = disk.export.statistics.snapshot()
    assert snapshot.faults == 3
    read = snapshot.operations["read"]
    assert (read.requests, read.bytes, read.errors) == (3, 8192, 1)
    assert snapshot.operations["trim"].requests == 1


def test_a_flush_that_failed_is_not_tried_again(open_disk: OpenDisk) -> None:
    """A second one could succeed although what the first should have saved is lost."""
    disk = open_disk("direct")
    if disk.native_map().cdata.io != lib.MAP_IO_AIO:
        pytest.skip("no Linux AIO here")
    client = disk.connect()
    client.request(FLUSH, cookie=1)
    assert client.reply() == (1, NbdError.NBD_SUCCESS, b"")
    disk.native_map().cdata.fd = 2**30  # EBADF, for C alone
    client.request(FLUSH, cookie=2)
    assert client.reply() == (2, NbdError.NBD_EIO, b"")
    assert disk.export.statistics.snapshot().operations["flush"].errors == 1
    client.request(READ, cookie=3, length=4096)
    assert client.reply(4096) == (3, NbdError.NBD_SUCCESS, bytes(4096))  # by the graph


@pytest.mark.parametrize("place", PLACES)
def test_a_map_that_was_dropped_is_replaced_after_one_fault(
    open_disk: OpenDisk, place: str
) -> None:
    disk = open_disk(place)
    client = disk.connect()

    def read() -> None:
        client.request(READ, length=4096)
        assert client.reply(4096) == (0, 0, bytes(4096))

    read()
    before = disk.faults
    disk.ctx.run(disk.node.driver.drop_direct_map())  # type: ignore[attr-defined]
    for _ in range(3):
        read()
    assert disk.faults == before + 1


def test_a_resize_is_seen(open_disk: OpenDisk) -> None:
    disk = open_disk("memory")
    client = disk.connect()
    client.request(READ, offset=SIZE, length=4096)
    assert client.reply()[1]

    async def grow() -> None:
        async with DrainedSection(disk.node):
            await disk.node.driver.truncate(2 * SIZE)

    disk.ctx.run(grow())
    before = disk.faults
    client.request(READ, offset=SIZE, length=4096)
    assert client.reply(4096) == (0, 0, bytes(4096))
    assert disk.faults == before


@pytest.mark.parametrize("place", PLACES)
def test_a_drained_section_holds_requests_back(open_disk: OpenDisk, place: str) -> None:
    disk = open_disk(place)
    client = disk.connect()
    section = DrainedSection(disk.node)
    disk.ctx.run(section.begin())
    late = disk.connect()  # in the middle of it
    for each in (client, late):
        each.request(READ, cookie=3, length=4096)
        assert each.silent()
    assert disk.faults == 0
    section.leave_context()
    section.end()
    for each in (client, late):
        assert each.reply(4096) == (3, 0, bytes(4096))


@pytest.mark.parametrize("place", PLACES)
def test_a_drained_section_waits_for_native_requests(open_disk: OpenDisk, place: str) -> None:
    disk = open_disk(place)
    client = disk.connect()
    for round_ in range(20):
        client.send(b"".join(header(READ, cookie=i, length=64 * KIB) for i in range(16)))
        disk.ctx.run(disk.backend.drain())
        for _ in range(16):
            assert client.reply(64 * KIB)[1] == 0, round_


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", [READ, WRITE])
def test_a_lost_clients_requests_end_in_the_background(
    open_disk: OpenDisk, place: str, command: int
) -> None:
    disk = open_disk(place)
    client = disk.connect()
    payload = b"x" * (64 * KIB) if command == WRITE else b""
    request = header(command, length=64 * KIB) + payload
    client.send(request * 8)
    client.sock.close()
    disk.wait_closed()
    other = disk.connect()
    other.request(READ, length=4096)
    assert other.reply(4096)[1] == 0


@pytest.mark.parametrize("place", PLACES)
def test_disc_behind_a_batch_answers_the_batch(open_disk: OpenDisk, place: str) -> None:
    disk = open_disk(place)
    client = disk.connect()
    count = 30
    client.send(b"".join(header(READ, cookie=i, length=4096) for i in range(count)) + header(DISC))
    assert {client.reply(4096)[0] for _ in range(count)} == set(range(count))
    disk.wait_closed()
    assert client.sock.recv(1) == b""


@pytest.mark.parametrize("place", PLACES)
def test_close_with_requests_in_flight_answers_them(open_disk: OpenDisk, place: str) -> None:
    disk = open_disk(place)
    client = disk.connect()
    count = 8
    client.send(b"".join(header(READ, cookie=i, length=64 * KIB) for i in range(count)))
    client.rounds(2)
    connection, _, _ = disk.connections[0]
    connection.close()
    assert {client.reply(64 * KIB)[0] for _ in range(count)} == set(range(count))
    client.sock.close()
    disk.wait_closed()


def test_a_read_only_export_is_not_written_by_c(open_disk: OpenDisk) -> None:
    disk = open_disk("memory")
    disk.export.read_only = True
    client = disk.connect()
    client.request(WRITE, payload=b"x" * 4096)
    assert client.reply()[1] == 1  # EPERM
    client.request(READ, length=4096)
    assert client.reply(4096) == (0, 0, bytes(4096))


def test_a_socket_that_cant_be_polled_is_dropped(open_disk: OpenDisk) -> None:
    disk = open_disk("memory")
    ours, theirs = socket.socketpair()
    closed: list[bool] = []
    connection = make_connection(
        ours, Session(disk.export), limits=Limits(), on_closed=lambda: closed.append(True)
    )
    ours.close()
    theirs.close()
    connection.start()
    assert closed == [True]
    assert not disk.export.connections
