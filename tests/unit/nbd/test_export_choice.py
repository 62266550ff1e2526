# SPDX-License-Identifier: Apache-2.0
"""Which exports clients see, get by default, and are refused because others are there."""

from __future__ import annotations

import socket

import pytest

from blockemu.drivers.nbd.protocol import Option, Reply, TransmissionFlag
from blockemu.exports import Export, ExportTable
from blockemu.limits import Limits
from tests.unit.nbd.client import Client
from tests.unit.nbd.conftest import Server, StartServer
from tests.unit.nbd.fakes import FakeBackend
from tests.unit.nbd.test_handshake import info_data

GO = Option.NBD_OPT_GO
INFO = Option.NBD_OPT_INFO
LIST = Option.NBD_OPT_LIST


def greeted(server: Server) -> Client:
    client = server.connect()
    client.greet()
    return client


def asked(client: Client, option: int, name: bytes) -> list[tuple[int, bytes]]:
    """All replies to INFO or GO."""
    client.option(option, info_data(name))
    replies = [client.option_reply(option)]
    while replies[-1][0] == Reply.NBD_REP_INFO:
        replies.append(client.option_reply(option))
    return replies


def listed(client: Client) -> list[bytes]:
    client.option(LIST)
    names = []
    while (reply := client.option_reply(LIST))[0] == Reply.NBD_REP_SERVER:
        names.append(reply[1][4:][: int.from_bytes(reply[1][:4], "big")])
    assert reply[0] == Reply.NBD_REP_ACK
    return names


def test_a_hidden_export_is_not_listed_and_is_entered_by_its_name(
    start_server: StartServer,
) -> None:
    server = start_server()
    secret = FakeBackend(server.ctx, 8192)
    server.exports.add(Export("secret", secret.as_backend, hidden=True))
    client = greeted(server)
    assert listed(client) == [b"disk", b"zweite Platte"]
    assert asked(client, GO, b"secret")[-1][0] == Reply.NBD_REP_ACK


def test_a_hidden_export_is_nobodys_default_unless_it_is_named_so(
    start_server: StartServer,
) -> None:
    server = start_server()
    for name, hidden in (("first", True), ("second", False)):
        backend = FakeBackend(server.ctx, 4096).as_backend
        server.exports.add(Export(name, backend, hidden=hidden))
    for name in ("disk", "zweite Platte"):
        server.exports.remove(name)
    found = server.exports.get("")
    assert found is not None
    assert found.name == "second"
    server.exports.default_name = "first"
    found = server.exports.get("")
    assert found is not None
    assert found.name == "first"


def test_the_default_export_can_be_another_than_the_first(start_server: StartServer) -> None:
    server = start_server()
    server.exports.default_name = "zweite Platte"
    (info, _) = asked(greeted(server), INFO, b"")
    assert int.from_bytes(info[1][2:10], "big") == 4096


def test_a_default_that_is_gone_is_no_export(start_server: StartServer) -> None:
    server = start_server()
    server.exports.default_name = "gone"
    ((reply, text),) = asked(greeted(server), INFO, b"")
    assert (reply, text) == (Reply.NBD_REP_ERR_UNKNOWN, b"no default export")


def test_where_nobody_may_list_it_is_a_policy_and_haggling_goes_on(
    start_server: StartServer,
) -> None:
    server = start_server()
    path = server.path.with_name("unlisted")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    server.server.listen(listener, lists=False)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    client = Client(sock, server.ctx)
    client.greet()
    client.option(LIST)
    assert client.option_reply(LIST) == (Reply.NBD_REP_ERR_POLICY, b"exports aren't listed here")
    assert asked(client, GO, b"disk")[-1][0] == Reply.NBD_REP_ACK
    assert listed(greeted(server)) == [b"disk", b"zweite Platte"]  # the other listener's clients
    sock.close()


@pytest.mark.parametrize(("of_export", "of_all"), [(2, 9), (None, 2)])
def test_clients_beyond_an_exports_bound_are_told_and_may_choose_another(
    start_server: StartServer, of_export: int | None, of_all: int
) -> None:
    server = start_server(limits=Limits(export_connections_max=of_all))
    disk = server.exports.get("disk")
    assert disk is not None
    disk.connections_max = of_export
    first = server.enter("disk")
    server.enter("disk")
    client = greeted(server)
    ((reply, text),) = asked(client, GO, b"disk")
    assert reply == Reply.NBD_REP_ERR_POLICY
    assert text == b"export 'disk' has all its 2 clients already; try again later"
    assert asked(client, INFO, b"disk")[-1][0] == Reply.NBD_REP_ACK
    late = greeted(server)
    late.option(Option.NBD_OPT_EXPORT_NAME, b"disk")
    assert late.hung_up()
    first.sock.close()
    client.until(lambda: disk.clients == 1)
    assert asked(client, GO, b"disk")[-1][0] == Reply.NBD_REP_ACK
    assert disk.clients == 2
    assert asked(greeted(server), GO, b"zweite Platte")[-1][0] == Reply.NBD_REP_ACK


def test_a_client_that_leaves_as_it_gets_in_gives_its_place_back(start_server: StartServer) -> None:
    server = start_server(limits=Limits(export_connections_max=1))
    disk = server.exports.get("disk")
    assert disk is not None
    for _ in range(3):
        client = greeted(server)
        client.option(GO, info_data(b"disk"))
        client.sock.close()
        client.rounds()
        assert disk.clients == 0
    assert asked(greeted(server), GO, b"disk")[-1][0] == Reply.NBD_REP_ACK


def test_flags_say_what_the_export_is(start_server: StartServer) -> None:
    flag = TransmissionFlag
    backend = FakeBackend(start_server().ctx, 4096).as_backend
    plain = Export("plain", backend).transmission_flags
    assert plain & flag.NBD_FLAG_CAN_MULTI_CONN
    assert not plain & (flag.NBD_FLAG_ROTATIONAL | flag.NBD_FLAG_SEND_RESIZE)
    special = Export("special", backend, multi_conn=False, rotational=True, resizable=True)
    assert special.transmission_flags == (
        plain & ~flag.NBD_FLAG_CAN_MULTI_CONN | flag.NBD_FLAG_ROTATIONAL | flag.NBD_FLAG_SEND_RESIZE
    )
    assert not Export("ro", backend, read_only=True, resizable=True).resizable


def test_names_and_ids_are_each_taken_once(start_server: StartServer) -> None:
    table = ExportTable()
    backend = FakeBackend(start_server().ctx, 4096).as_backend
    first = Export("a", backend, id="one")
    table.add(first)
    with pytest.raises(ValueError, match="'a' exists"):
        table.add(Export("a", backend, id="two"))
    with pytest.raises(ValueError, match="id 'one' exists"):
        table.add(Export("b", backend, id="one"))
    table.begin_to_remove(first)
    assert table.get("a") is None
    assert table.by_id("one") is first
    table.add(Export("a", backend, id="two"))  # the name is free at once, the id isn't
    with pytest.raises(ValueError, match="id 'one' exists"):
        table.add(Export("b", backend, id="one"))
    table.forget(first)
    assert table.by_id("one") is None
