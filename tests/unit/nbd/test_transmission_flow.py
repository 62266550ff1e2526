# SPDX-License-Identifier: Apache-2.0
"""Many requests at once: order, batches, bounds, partial sends, slow readers, fair shares."""

from __future__ import annotations

import fcntl
import random
import socket
import sys
import termios

import pytest

from blockemu.drivers.nbd.protocol import Command
from blockemu.limits import Limits
from blockemu.loop.aio_context import AioContext
from blockemu.loop.socket_options import tune
from tests.unit.nbd.client import DATA_HEAD_BYTES, Client
from tests.unit.nbd.conftest import DISK_BYTES, Serve, Served

READ = Command.NBD_CMD_READ
WRITE = Command.NBD_CMD_WRITE
FLUSH = Command.NBD_CMD_FLUSH
KIB = 1024
MIB = 1 << 20

both_paths = pytest.mark.parametrize("mapped", [False, True], ids=["graph", "map"])


def reads(client: Client, count: int, length: int = 4096) -> bytes:
    """The headers of so many reads, one after the other on the disk."""
    return b"".join(
        client.header(READ, cookie=i, offset=i * length % DISK_BYTES, length=length)
        for i in range(count)
    )


def shrink(served: Served) -> None:
    """Let the kernel hold little for either side."""
    for sock in (served.client.sock, served.connection._sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def bytes_waiting(client: Client) -> int:
    """What has arrived there and wasn't read."""
    answer = fcntl.ioctl(client.sock.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def test_replies_leave_in_the_order_in_which_requests_end(serve: Serve) -> None:
    served = serve()
    served.backend.held = True
    served.client.send(reads(served.client, 3, 8))
    served.client.until(lambda: len(served.backend.waiting) == 3)
    for index, cookie in ((2, 2), (0, 0), (0, 1)):
        served.backend.end(index)
        assert served.client.reply(8)[0] == cookie


def test_host_io_of_the_fast_path_ends_in_any_order(serve: Serve) -> None:
    served = serve(mapped=True)
    served.backend.file.behaviour = "pending"
    served.backend.disk[8:16] = b"12345678"
    served.client.send(reads(served.client, 3, 8))
    served.client.until(lambda: len(served.backend.file.pending) == 3)
    for index, cookie, data in ((1, 1, b"12345678"), (1, 2, bytes(8)), (0, 0, bytes(8))):
        served.backend.file.complete(index)
        assert served.client.reply(8) == (cookie, 0, data)


@both_paths
def test_requests_come_through_byte_by_byte(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped)
    for byte in (
        served.client.header(WRITE, cookie=5, length=6)
        + b"abcdef"
        + served.client.header(READ, length=6)
    ):
        served.client.send(bytes([byte]))
    assert served.client.reply() == (5, 0, b"")
    assert served.client.reply(6) == (0, 0, b"abcdef")


@both_paths
@pytest.mark.parametrize("length", [4096, 65536, 65537, 200_000])
def test_writes_survive_any_cut(serve: Serve, mapped: bool, length: int) -> None:
    served = serve(mapped=mapped)
    source = random.Random(length)
    content = source.randbytes(8 * length)
    stream = b"".join(
        served.client.header(WRITE, cookie=i, offset=i * length, length=length)
        + content[i * length : (i + 1) * length]
        for i in range(8)
    )
    while stream:
        cut = source.choice([1, 27, 28, 29, 5000, 70_000, 300_000])
        served.client.send(stream[:cut])
        stream = stream[cut:]
    assert {served.client.reply()[0] for _ in range(8)} == set(range(8))
    assert served.backend.disk[: 8 * length] == content


@pytest.mark.kind_only("python", "a fault's reply leaves in the round after")
def test_a_batch_is_begun_in_one_round_and_answered_in_one(serve: Serve) -> None:
    served = serve(mapped=True)
    served.client.send_some(reads(served.client, 20, 512))
    served.client.rounds(1)
    assert len(served.client.sock.recv(MIB)) == 20 * (DATA_HEAD_BYTES[served.client.style] + 512)


@pytest.mark.kind_only("python", "looks into its queue of replies")
def test_big_replies_leave_before_the_end_of_the_round(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(mapped=True)
    sends: list[int] = []
    file = served.backend.file
    start_read = file.start_read

    def spy(offset: int, view: memoryview, done: object, address: int) -> int | None:
        assert served.inside is not None
        sends.append(len(served.inside.replies.parts))
        return start_read(offset, view, done)  # type: ignore[arg-type]

    monkeypatch.setattr(file, "start_read", spy)
    tune(served.connection._sock)
    served.client.send(reads(served.client, 3, 128 * KIB))
    for _ in range(3):
        served.client.reply(128 * KIB)
    assert sends == [0, 0, 0]


# --- bounds ---


@both_paths
def test_requests_in_flight_are_bounded(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped, limits=Limits(in_flight_requests_max=4))
    backend, file = served.backend, served.backend.file
    backend.held, file.behaviour = True, "pending"
    served.client.send(reads(served.client, 10, 512))
    served.client.rounds()
    assert len(backend.waiting) + len(file.pending) == 4
    for done in range(10):
        if mapped:
            file.complete()
        else:
            backend.end()
        assert served.client.reply(512)[1] == 0
        served.client.rounds()
        assert len(backend.waiting) + len(file.pending) == min(4, 9 - done)


@both_paths
def test_bytes_in_flight_are_bounded(serve: Serve, mapped: bool) -> None:
    limits = Limits(
        request_length_max=256 * KIB,
        in_flight_bytes_max=256 * KIB,
        status_reply_bytes_max=256 * KIB,
    )
    served = serve(mapped=mapped, limits=limits)
    backend, file = served.backend, served.backend.file
    backend.held, file.behaviour = True, "pending"
    served.client.send(reads(served.client, 8, 100 * KIB))
    served.client.rounds()
    for _ in range(8):
        assert len(backend.waiting) + len(file.pending) <= 2
        if mapped:
            file.complete()
        else:
            backend.end()
        assert served.client.reply(100 * KIB)[1] == 0
        served.client.rounds()


def test_a_request_of_the_largest_size_is_served_alone(serve: Serve) -> None:
    limits = Limits(request_length_max=MIB, in_flight_bytes_max=MIB)
    served = serve(limits=limits)
    served.client.send(reads(served.client, 2, MIB))
    assert served.client.reply(MIB)[:2] == (0, 0)
    assert served.client.reply(MIB)[:2] == (1, 0)


@both_paths
def test_a_client_that_floods_is_not_read(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped, limits=Limits(in_flight_requests_max=4))
    backend, file = served.backend, served.backend.file
    backend.held, file.behaviour, file.writes_inline = True, "pending", False
    write = served.client.header(WRITE, length=4096) + bytes(4096)
    for _ in range(20):
        served.client.send_some(write * 200)
        served.client.rounds()
    assert len(backend.waiting) + len(file.pending) == 4
    if served.inside is not None:
        assert served.inside.intake._received.end <= 512 * KIB


@pytest.mark.kind_only("python", "looks into its queue of replies")
@both_paths
def test_a_client_that_leaves_its_replies_unread_is_not_read(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped)
    shrink(served)
    held = []
    for i in range(50):
        served.client.send_some(reads(served.client, 200, 64 * KIB))
        served.client.rounds(2)
        assert served.inside is not None
        held.append(served.inside.replies.bytes_held)
        if i > 10 and not mapped:
            assert not served.backend.waiting
    # What was in flight when the socket filled up may still be answered; no more.
    assert max(held) <= Limits().unsent_bytes_max + Limits().round_bytes_max
    assert held[-1] == held[20]
    calls = len(served.backend.calls) + len(served.backend.file.calls)
    served.client.rounds(50)
    assert len(served.backend.calls) + len(served.backend.file.calls) == calls


def test_small_replies_that_are_left_unread_are_bounded_by_their_number(serve: Serve) -> None:
    bounds = {"in_flight_requests_max": 8, "round_requests_max": 8}
    served = serve(limits=Limits(unsent_parts_max=16, **bounds))
    shrink(served)
    for _ in range(50):
        served.client.send_some(reads(served.client, 200, 512))
        served.client.rounds(2)
    begun = len(served.backend.calls)
    served.client.rounds(50)
    assert len(served.backend.calls) == begun
    answer_bytes_min = 16 + 512
    left = bytes_waiting(served.client) // answer_bytes_min
    assert left <= begun <= left + 16 + 8 + 8, "far less than the 256 replies of the default"


@both_paths
def test_partial_sends_keep_everything_in_order(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped)
    shrink(served)
    served.backend.disk[:] = random.Random(1).randbytes(DISK_BYTES)
    served.client.send(reads(served.client, 40, 33_000))
    for i in range(40):
        at = i * 33_000 % DISK_BYTES
        cookie, error, data = served.client.reply(33_000 if at + 33_000 <= DISK_BYTES else 0)
        assert cookie == i
        if at + 33_000 <= DISK_BYTES:
            assert (error, data) == (0, bytes(served.backend.disk[at : at + 33_000]))
        else:
            assert error


def test_more_replies_than_one_call_may_gather_all_leave(serve: Serve) -> None:
    served = serve(limits=Limits(in_flight_requests_max=3000))
    served.backend.held = True
    served.client.send(reads(served.client, 1500, 1))
    served.client.until(lambda: len(served.backend.waiting) == 1500)
    served.backend.held = False
    while served.backend.waiting:
        served.backend.end()
    assert sorted(served.client.reply(1)[0] for _ in range(1500)) == list(range(1500))


@pytest.mark.kind_only("python", "looks into its queue of replies and its pool")
def test_buffers_come_back(serve: Serve, ctx: AioContext) -> None:
    served = serve(mapped=True)
    shrink(served)
    served.client.send(reads(served.client, 16, 64 * KIB))
    for _ in range(16):
        served.client.reply(64 * KIB)
    served.client.rounds()
    assert served.inside is not None
    assert not served.inside.replies.buffers
    assert ctx.buffers.retained_bytes > 0
    assert served.inside.room() == Limits().in_flight_bytes_max


# --- neighbours ---


def test_work_in_a_round_is_bounded(serve: Serve) -> None:
    limits = Limits(round_requests_max=8)
    served = serve(mapped=True, limits=limits)
    served.client.send_some(reads(served.client, 100, 512))
    calls = served.backend.file.calls
    counts = []
    while len(calls) < 100:
        before = len(calls)
        served.client.rounds(1)
        counts.append(len(calls) - before)
    # C's pass calls those who want to go on after those who have input: its first may do both.
    assert max(counts) <= (9 if served.inside is not None else 16)
    for _ in range(100):
        served.client.reply(512)


def test_two_connections_share_a_context(serve: Serve) -> None:
    limits = Limits(round_requests_max=8)
    busy = serve(mapped=True, limits=limits)
    other = serve(mapped=True, limits=limits)
    busy.client.send_some(reads(busy.client, 400, 512))
    other.client.send_some(reads(other.client, 1, 512))
    busy.client.rounds(2)
    assert len(other.client.sock.recv(MIB)) == DATA_HEAD_BYTES[other.client.style] + 512
    assert len(busy.backend.file.calls) < 30


def test_a_stalled_client_doesnt_hold_up_another(serve: Serve) -> None:
    stalled = serve(mapped=True)
    other = serve(mapped=True, export=stalled.export, backend=stalled.backend)
    shrink(stalled)
    stalled.client.send_some(reads(stalled.client, 100, 64 * KIB))
    stalled.client.rounds()
    if stalled.inside is not None:
        assert stalled.inside.stopped
    for i in range(50):
        other.client.request(READ, cookie=i, length=4096)
        assert other.client.reply(4096)[:2] == (i, 0)


# --- drained sections ---


def test_a_drained_section_silences_the_socket(serve: Serve, ctx: AioContext) -> None:
    served = serve(mapped=True)
    ctx.disable_external()
    served.client.send_some(reads(served.client, 1, 8))
    assert served.client.silent()
    assert not served.backend.file.calls
    ctx.enable_external()
    assert served.client.reply(8)[1] == 0


def test_a_drained_section_holds_back_parsed_requests(serve: Serve) -> None:
    served = serve(limits=Limits(in_flight_requests_max=1))
    served.backend.held = True
    served.client.send(reads(served.client, 3, 8))
    served.client.rounds()
    served.backend.drained_begin()
    served.backend.end()
    served.client.reply(8)
    served.client.rounds()
    assert not served.backend.waiting
    served.backend.held = False
    served.backend.drained_end()
    assert served.client.reply(8)[0] == 1
    assert served.client.reply(8)[0] == 2
