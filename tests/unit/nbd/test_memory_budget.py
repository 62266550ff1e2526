# SPDX-License-Identifier: Apache-2.0
"""Memory that all connections share: who gets it, who waits, and who is thrown out for it."""

from __future__ import annotations

import pytest

from blockemu.drivers.nbd.protocol import Command
from blockemu.limits import Limits
from blockemu.loop.clock import VirtualClock
from tests.unit.nbd.client import Client, header
from tests.unit.nbd.conftest import Server, StartServer

KIB, MIB = 1024, 1 << 20
READ, WRITE = Command.NBD_CMD_READ, Command.NBD_CMD_WRITE

TIGHT = Limits(
    memory_bytes_max=2 * MIB,
    memory_reserve_bytes=64 * KIB,
    in_flight_bytes_max=2 * MIB,
    request_length_max=MIB,
)


def wait_for(server: Server, count: int) -> None:
    """Until so many requests wait in the backend; a native server takes more rounds."""
    server.clients[0].until(lambda: len(server.backend.waiting) == count)
    server.clients[0].rounds(20)
    assert len(server.backend.waiting) == count


def settled(server: Server) -> None:
    """All who were granted something have given it back, or are gone."""
    budget = server.server.memory
    server.clients[0].until(lambda: budget.waiting_count == 0)


def held(server: Server) -> Server:
    server.backend.held = True
    return server


def read(client: Client, length: int, cookie: int = 0) -> None:
    client.request(READ, cookie=cookie, length=length)


def test_large_requests_of_all_clients_take_turns_in_their_order(
    start_server: StartServer,
) -> None:
    server = held(start_server(limits=TIGHT))
    clients = [server.enter("disk") for _ in range(4)]
    for client in clients:
        read(client, MIB)
        client.rounds(5)
    wait_for(server, 2)
    assert server.server.memory.waiting_count == 2
    for number in range(4):
        server.backend.end()
        assert clients[number].reply(MIB) == (0, 0, bytes(MIB))
        wait_for(server, min(2, 3 - number))
    settled(server)


def test_a_client_with_small_requests_goes_on_whatever_the_others_hold(
    start_server: StartServer,
) -> None:
    server = held(start_server(limits=TIGHT))
    for _ in range(3):
        read(server.enter("disk"), MIB)
    wait_for(server, 2)
    small = server.enter("disk")
    for number in range(20):
        read(small, 16 * KIB, number)
        wait_for(server, 3)
        server.backend.end(2)
        assert small.reply(16 * KIB) == (number, 0, bytes(16 * KIB))
    assert server.server.memory.waiting_count == 1


def test_one_client_cannot_take_again_what_others_wait_for(start_server: StartServer) -> None:
    """Its requests behind the first two queue up behind the other's, and not in front of it."""
    server = held(start_server(limits=TIGHT))
    greedy, modest = server.enter("disk"), server.enter("disk")
    for number in range(6):
        read(greedy, 900 * KIB, number)
    wait_for(server, 2)
    read(modest, MIB)
    modest.rounds(20)
    order = []
    for _ in range(7):
        server.backend.end()
        for name, client, length in (("greedy", greedy, 900 * KIB), ("modest", modest, MIB)):
            if not client.silent():
                client.reply(length)
                order.append(name)
        greedy.rounds(20)
    assert len(order) == 7
    assert order.index("modest") <= 3, order
    settled(server)


def test_a_client_that_asks_while_there_is_plenty_asks_once(start_server: StartServer) -> None:
    limits = Limits(
        memory_bytes_max=64 * MIB,
        memory_reserve_bytes=64 * KIB,
        in_flight_bytes_max=4 * MIB,
        request_length_max=MIB,
    )
    server = start_server(limits=limits)
    budget = server.server.memory
    client = server.enter("disk")
    for number in range(8):
        read(client, MIB, number)
    for number in range(8):
        assert client.reply(MIB)[0] == number
    assert budget.free_bytes == 64 * MIB - (4 * MIB - 64 * KIB)
    client.sock.close()
    client.until(lambda: budget.free_bytes == 64 * MIB)


def test_what_a_client_that_leaves_had_goes_to_those_who_wait(start_server: StartServer) -> None:
    server = start_server(limits=TIGHT)
    holders = [server.enter("disk") for _ in range(2)]
    for holder in holders:
        # Half a payload, for which there is a buffer.
        holder.send(header(WRITE, length=MIB) + bytes(100 * KIB))
        holder.rounds(20)
    waiting = server.enter("disk")
    read(waiting, MIB)
    waiting.rounds(20)
    assert server.server.memory.waiting_count == 1
    holders[0].sock.close()
    assert waiting.reply(MIB) == (0, 0, bytes(MIB))


def test_half_a_payload_is_waited_for_only_while_nobody_needs_its_memory(
    start_server: StartServer, clock: VirtualClock
) -> None:
    """32 clients with half a write of 32 MiB each held a gigabyte, for as long as they liked."""
    server = start_server(limits=TIGHT)
    holders = [server.enter("disk") for _ in range(2)]
    for holder in holders:
        holder.send(header(WRITE, length=MIB) + bytes(100 * KIB))
        holder.rounds(20)
    clock.advance_ns(2 * TIGHT.unread_time_max_ns)
    assert all(holder.silent() for holder in holders)
    waiting = server.enter("disk")
    read(waiting, MIB)
    waiting.rounds(20)
    clock.advance_ns(TIGHT.unread_time_max_ns - 1)
    holders[0].send(bytes(100 * KIB))  # it moves, if slowly
    assert waiting.silent()
    clock.advance_ns(1)
    assert waiting.reply(MIB) == (0, 0, bytes(MIB))
    assert holders[1].hung_up()
    holders[0].send(bytes(MIB - 200 * KIB))
    assert holders[0].reply() == (0, 0, b"")


@pytest.mark.parametrize("reads_some", [False, True])
def test_a_client_that_takes_none_of_its_replies_is_dropped(
    start_server: StartServer, clock: VirtualClock, reads_some: bool
) -> None:
    server = start_server(limits=Limits(unread_time_max_ns=1000))
    client = server.enter("disk")
    for number in range(16):
        client.send_some(header(READ, cookie=number, length=MIB))
    client.rounds(50)
    clock.advance_ns(999)
    client.rounds(5)
    assert server.server.connection_count == 1
    if reads_some:
        client.receive(3 * MIB)
    clock.advance_ns(1)
    if reads_some:
        client.rounds(20)
        assert server.server.connection_count == 1
        clock.advance_ns(1000)
    client.until(lambda: server.server.connection_count == 0)


def test_a_client_that_takes_its_replies_late_is_served_on(
    start_server: StartServer, clock: VirtualClock
) -> None:
    server = start_server(limits=Limits(unread_time_max_ns=1000))
    client = server.enter("disk")
    for turn in range(3):
        for number in range(8):
            read(client, MIB, number)
        clock.advance_ns(999)
        client.rounds(5)
        for number in range(8):
            assert client.reply(MIB)[0] == number, turn
        clock.advance_ns(5000)
        client.rounds(5)
    assert server.server.connection_count == 1
