# SPDX-License-Identifier: Apache-2.0
"""Accepting, moving a connection to its export's context, the limit of connections, closing."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from blockemu.drivers.nbd.protocol import IHAVEOPT, OPTION, Command, Option, Reply
from blockemu.exports import Export
from blockemu.limits import Limits
from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import VirtualClock
from blockemu.loop.iothread import IOThread
from blockemu.nbd.server import ACCEPT_RETRY_NS
from tests.unit.nbd.client import Client
from tests.unit.nbd.conftest import StartServer
from tests.unit.nbd.fakes import FakeBackend

READ = Command.NBD_CMD_READ


def test_clients_beyond_the_limit_wait_for_one_to_leave(start_server: StartServer) -> None:
    server = start_server(limits=Limits(connections_max=2))
    first = server.enter("disk")
    second = server.connect()
    second.receive(18)
    third = server.connect()
    assert third.silent()
    assert server.server.connection_count == 2
    first.sock.close()
    third.receive(18)
    fourth = server.connect()
    assert fourth.silent()
    second.sock.close()
    fourth.receive(18)


def test_a_flood_of_clients_is_accepted_in_portions(start_server: StartServer) -> None:
    server = start_server(limits=Limits(accepts_per_round_max=3))
    clients = [server.connect() for _ in range(10)]
    clients[0].rounds(1)
    assert server.server.connection_count == 3
    clients[0].until(lambda: server.server.connection_count == 10)


def test_a_host_out_of_descriptors_is_asked_again_later(
    start_server: StartServer,
    clock: VirtualClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = start_server()
    with monkeypatch.context() as patch:

        def accept(sock: socket.socket) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        patch.setattr(socket.socket, "accept", accept)
        client = server.connect()
        for _ in range(5):
            client.rounds(20)
            clock.advance_ns(ACCEPT_RETRY_NS)
        client.rounds(20)
    assert caplog.text.count("can't accept") == 1
    assert client.silent()
    clock.advance_ns(ACCEPT_RETRY_NS)
    client.receive(18)
    assert "clients are accepted again, after 0.6 s" in caplog.text


def test_a_descriptor_that_a_client_gives_back_goes_to_the_next_at_once(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It took up to 100 ms, for each client; a line in the log, too."""
    server = start_server()
    first = server.enter("disk")
    with monkeypatch.context() as patch:

        def accept(sock: socket.socket) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        patch.setattr(socket.socket, "accept", accept)
        second = server.connect()
        second.rounds(20)
    assert second.silent()
    first.sock.close()
    second.receive(18)
    assert caplog.text.count("can't accept clients: Too many open files; 1 are connected") == 1


def test_two_listening_sockets_serve_the_same_exports(start_server: StartServer) -> None:
    server = start_server()
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        tcp.setblocking(False)
        port = tcp.getsockname()[1]
        server.server.listen(tcp)
        over_tcp = Client(socket.create_connection(("127.0.0.1", port)), server.ctx)
        server.clients.append(over_tcp)
        server.choose(over_tcp, "disk")
        over_tcp.request(READ, length=8)
        assert over_tcp.reply(8) == (0, 0, bytes(8))
        assert server.enter("disk").silent()
        server.close()


def test_close_ends_every_kind_of_client(start_server: StartServer, clock: VirtualClock) -> None:
    server = start_server()
    greeted = server.connect()
    greeted.receive(18)
    idle = server.enter("disk")
    busy = server.enter("disk")
    server.backend.held = True
    busy.request(READ, cookie=5, length=8)
    closing = server.ctx.spawn(server.server.close())
    assert greeted.hung_up()
    assert idle.hung_up()
    assert not closing.done()
    server.backend.end()
    assert busy.reply(8) == (5, 0, bytes(8))
    assert busy.hung_up()
    busy.sock.close()
    busy.until(closing.done)
    assert not server.server.connection_count
    with pytest.raises(OSError, match="refused"):
        server.connect()


def test_close_answers_the_options_that_clients_have_begun(start_server: StartServer) -> None:
    server = start_server()
    greeted, halfway, ready = (server.connect() for _ in range(3))
    for client in (halfway, ready):
        client.greet()
    greeted.receive(18)
    halfway.send(OPTION.pack(IHAVEOPT, Option.NBD_OPT_LIST, 4)[:7])
    halfway.rounds()
    ready.sock.sendall(
        OPTION.pack(IHAVEOPT, Option.NBD_OPT_LIST, 0)
        + OPTION.pack(IHAVEOPT, Option.NBD_OPT_ABORT, 0)
    )
    closing = server.ctx.spawn(server.server.close())
    assert greeted.hung_up()
    error, text = ready.option_reply(Option.NBD_OPT_LIST)
    assert (error, text) == (Reply.NBD_REP_ERR_SHUTDOWN, b"the server is shutting down")
    assert ready.option_reply(Option.NBD_OPT_ABORT) == (Reply.NBD_REP_ACK, b"")
    assert ready.hung_up()
    assert not closing.done()
    halfway.send(OPTION.pack(IHAVEOPT, Option.NBD_OPT_LIST, 4)[7:] + b"data")
    assert halfway.option_reply(Option.NBD_OPT_LIST)[0] == Reply.NBD_REP_ERR_SHUTDOWN
    assert halfway.hung_up()
    halfway.until(closing.done)


def test_close_waits_a_moment_for_the_option_under_way(
    start_server: StartServer, clock: VirtualClock
) -> None:
    server = start_server()
    slow = server.connect()
    slow.greet()
    slow.send(b"IHAVE")
    slow.rounds()
    closing = server.ctx.spawn(server.server.close())
    slow.rounds()
    clock.advance_ns(Limits().close_silence_ns - 1)
    slow.rounds()
    assert not closing.done()
    clock.advance_ns(1)
    assert slow.hung_up()
    slow.until(closing.done)


def test_close_without_clients_is_prompt(start_server: StartServer) -> None:
    server = start_server()
    assert server.ctx.spawn(server.server.close()).done()


def test_disconnect_leaves_other_exports_clients_alone(start_server: StartServer) -> None:
    server = start_server()
    leaving, staying = server.enter("disk"), server.enter("zweite Platte")
    export = server.exports.remove("disk")
    task = server.ctx.spawn(server.server.disconnect(export))
    assert leaving.hung_up()
    leaving.until(task.done)
    staying.request(READ, length=8)
    assert staying.reply(8) == (0, 0, bytes(8))


def test_a_name_can_be_taken_once_only(start_server: StartServer) -> None:
    server = start_server()
    with pytest.raises(ValueError, match="disk"):
        server.exports.add(Export("disk", server.backend.as_backend))


def test_an_export_named_nothing_is_the_default(start_server: StartServer) -> None:
    server = start_server()
    first = server.exports.get("")
    assert first is not None
    assert first.name == "disk"
    nameless = Export("", server.backend.as_backend)
    server.exports.add(nameless)
    assert server.exports.get("") is nameless
    assert server.exports.get("other") is None
    assert len(server.exports) == 3
    assert list(server.exports) == server.exports.list()


def test_transmission_runs_in_the_exports_thread(start_server: StartServer) -> None:
    server = start_server()
    thread = IOThread("io0")
    thread.start()
    try:
        backend = FakeBackend(thread.ctx, 4096)
        homes: list[AioContext | None] = []
        preadv = backend.preadv

        async def spy(offset: int, view: memoryview) -> None:
            homes.append(AioContext.current())
            await preadv(offset, view)

        backend.preadv = spy  # type: ignore[method-assign]
        server.exports.add(Export("threaded", backend.as_backend))
        client = server.enter("threaded")
        client.sock.setblocking(True)
        client.sock.settimeout(10)
        client.request(READ, cookie=1, length=8)
        assert len(client.sock.recv(24, socket.MSG_WAITALL)) == 24
        assert homes == [thread.ctx]
        server.ctx.run(server.server.close())
        assert client.sock.recv(1) == b""
    finally:
        thread.stop()


def test_the_last_client_to_leave_ends_it_if_any_was_served(start_server: StartServer) -> None:
    calls: list[str] = []
    server = start_server()
    server.server.end_with_last_client(lambda: calls.append("gone"))
    asks = server.connect()
    asks.receive(18)
    asks.sock.close()
    first, second = server.enter("disk"), server.enter("disk")
    first.until(lambda: server.server.connection_count == 2)
    first.sock.close()
    second.until(lambda: server.server.connection_count == 1)
    assert calls == []
    second.sock.close()
    second.until(lambda: calls == ["gone"])
    assert server.connect().silent()
