# SPDX-License-Identifier: Apache-2.0
"""How connections end: by wish, by loss, by the server; with requests in flight, and without."""

from __future__ import annotations

import socket

import pytest

from blockemu.drivers.nbd.protocol import Command
from blockemu.limits import Limits
from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import VirtualClock
from tests.unit.nbd.conftest import Serve

READ = Command.NBD_CMD_READ
WRITE = Command.NBD_CMD_WRITE
DISC = Command.NBD_CMD_DISC
MIB = 1 << 20

both_paths = pytest.mark.parametrize("mapped", [False, True], ids=["graph", "map"])


def test_disc_closes(serve: Serve) -> None:
    served = serve()
    served.client.request(DISC)
    assert served.client.hung_up()
    served.until_closed()


@both_paths
def test_disc_waits_for_what_is_in_flight(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped)
    served.backend.held, served.backend.file.behaviour = True, "pending"
    served.client.request(READ, cookie=1, length=8)
    served.client.request(DISC)
    assert served.client.silent()
    assert not served.closed
    if mapped:
        served.backend.file.complete()
    else:
        served.backend.end()
    assert served.client.reply(8) == (1, 0, bytes(8))
    assert served.client.hung_up()
    served.until_closed()


def test_disc_behind_a_batch_answers_the_batch(serve: Serve) -> None:
    served = serve(mapped=True)
    served.client.send(
        b"".join(served.client.header(READ, cookie=i, length=8) for i in range(10))
        + served.client.header(DISC)
    )
    assert [served.client.reply(8)[0] for _ in range(10)] == list(range(10))
    assert served.client.hung_up()


def test_nothing_after_disc_is_heard(serve: Serve) -> None:
    served = serve()
    served.client.send(served.client.header(DISC) + served.client.header(WRITE, length=4) + b"abcd")
    assert served.client.hung_up()
    assert not any(served.backend.disk[:4])


def test_a_closed_connection_holds_no_memory(serve: Serve) -> None:
    """It is part of circles, which the garbage collector finds late: half a MiB of each client that
    had come and gone was kept, and a daemon with short visits grew to 300 MiB."""
    served = serve()
    served.client.send(served.client.header(READ, length=8)[:20])
    served.client.rounds()
    if served.inside is None:
        pytest.skip("C frees its memory with the connection")
    received = served.inside.intake._received
    assert len(received.data) > 0
    served.client.sock.close()
    served.until_closed()
    assert len(received.data) == len(received.view) == 0


@both_paths
def test_a_lost_clients_requests_end_in_the_background(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped)
    served.backend.held, served.backend.file.behaviour = True, "pending"
    served.backend.file.writes_inline = False
    served.client.request(READ, length=8)
    served.client.request(WRITE, payload=b"abcd")
    served.client.until(lambda: len(served.backend.waiting + served.backend.file.pending) == 2)
    served.client.sock.close()
    served.client.rounds()
    assert not served.closed
    for _ in range(2):
        if mapped:
            served.backend.file.complete()
        else:
            served.backend.end()
        served.client.rounds(3)
    served.until_closed()
    assert served.backend.disk[:4] == b"abcd"


@pytest.mark.parametrize("length", [100, MIB])
@pytest.mark.parametrize("arrived", [0, 50])
def test_a_client_lost_in_mid_payload_writes_nothing(
    serve: Serve, length: int, arrived: int
) -> None:
    served = serve(mapped=True)
    served.client.send(served.client.header(WRITE, length=length) + b"x" * arrived)
    served.client.sock.close()
    served.until_closed()
    assert not any(served.backend.disk)
    if served.inside is not None:
        assert served.inside.room() == Limits().in_flight_bytes_max


def test_a_client_lost_in_mid_header_is_forgotten(serve: Serve) -> None:
    served = serve()
    served.client.send(served.client.header(READ, length=8)[:13])
    served.client.sock.close()
    served.until_closed()


def test_a_client_that_only_shuts_its_writing_half_gets_its_replies(serve: Serve) -> None:
    served = serve()
    served.client.send(served.client.header(READ, cookie=7, length=8))
    served.client.sock.shutdown(socket.SHUT_WR)
    assert served.client.reply(8) == (7, 0, bytes(8))
    assert served.client.hung_up()


def test_a_client_lost_with_replies_unsent_is_dropped(serve: Serve) -> None:
    served = serve(mapped=True)
    served.client.send(b"".join(served.client.header(READ, length=MIB) for _ in range(10)))
    served.client.rounds()
    if served.inside is not None:
        assert served.inside.stopped
    served.client.sock.close()
    served.until_closed()
    if served.inside is not None:
        assert not served.inside.replies.bytes_held


# --- the server's wish ---


def test_close_of_an_idle_connection_is_prompt(serve: Serve) -> None:
    served = serve()
    served.connection.close()
    served.until_closed()
    assert served.client.hung_up()


def test_close_answers_what_is_in_flight(serve: Serve) -> None:
    served = serve()
    served.backend.held = True
    served.client.request(READ, cookie=1, length=8)
    served.connection.close()
    served.connection.close()
    assert served.client.silent()
    served.backend.end()
    assert served.client.reply(8) == (1, 0, bytes(8))
    assert served.client.hung_up()
    served.client.sock.close()
    served.client.rounds()
    served.until_closed()


def test_close_loses_no_reply_of_a_client_that_goes_on_sending(serve: Serve) -> None:
    """A TCP socket that was closed with unread requests in it was reset by the kernel, and the
    replies that the client had yet to take were gone."""
    served = serve(mapped=True, tcp=True)
    count = 3
    served.client.send(
        b"".join(served.client.header(READ, cookie=i, length=MIB) for i in range(count))
    )
    served.client.rounds()
    served.connection.close()
    assert served.client.send_some(served.client.header(WRITE, length=MIB) + bytes(MIB)) > 0
    assert [served.client.reply(MIB)[0] for _ in range(count)] == list(range(count))
    assert served.client.sock.recv(1) == b""
    assert not any(served.backend.disk)
    served.client.sock.close()
    served.until_closed()


def test_close_leaves_a_client_that_neither_sends_nor_closes(
    serve: Serve, clock: VirtualClock
) -> None:
    served = serve(tcp=True)
    served.connection.close()
    assert served.client.hung_up()
    clock.advance_ns(Limits().close_silence_ns - 1)
    served.client.rounds()
    assert not served.closed
    clock.advance_ns(1)
    served.client.rounds()
    served.until_closed()


def test_close_hears_out_a_client_that_never_stops_no_longer_than_it_said(
    serve: Serve, clock: VirtualClock
) -> None:
    limits = Limits(close_linger_ns=1000, close_silence_ns=300)
    served = serve(tcp=True, limits=limits)
    served.connection.close()
    for _ in range(4):
        served.client.send(bytes(100))
        served.client.rounds()
        assert not served.closed
        clock.advance_ns(249)
        served.client.rounds()
    clock.advance_ns(4)
    served.client.rounds()
    served.until_closed()


def test_close_of_a_unix_socket_with_unread_input_hangs_up_first(serve: Serve) -> None:
    """The client saw ECONNRESET where it should see the end of the stream."""
    served = serve()
    assert served.client.send_some(served.client.header(READ, length=8)) > 0
    served.connection.close()
    served.client.rounds()
    assert served.client.sock.recv(1) == b""


def test_close_waits_no_longer_than_it_said_for_a_stalled_client(
    serve: Serve, clock: VirtualClock
) -> None:
    served = serve(mapped=True)
    served.client.send(b"".join(served.client.header(READ, length=MIB) for _ in range(10)))
    served.client.rounds()
    served.connection.close()
    clock.advance_ns(Limits().close_linger_ns - 1)
    served.client.rounds()
    assert not served.closed
    clock.advance_ns(1)
    served.client.rounds()
    served.until_closed()


def test_close_in_mid_payload_drops_the_payload(serve: Serve) -> None:
    served = serve()
    served.client.send(served.client.header(WRITE, length=MIB) + b"x" * 1000)
    served.connection.close()
    served.until_closed()
    assert not any(served.backend.disk)


def test_an_ended_connection_leaves_its_neighbour_alone(serve: Serve, ctx: AioContext) -> None:
    first = serve()
    second = serve(export=first.export, backend=first.backend)
    first.client.send(bytes(32))
    assert first.client.hung_up()
    assert first.export.connections == {second.connection}
    second.client.request(READ, cookie=3, length=8)
    assert second.client.reply(8) == (3, 0, bytes(8))
