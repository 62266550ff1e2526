# SPDX-License-Identifier: Apache-2.0
"""STARTTLS in negotiation: what is answered before it, behind it, and to whom it is refused."""

from __future__ import annotations

import ssl
import struct

import pytest

from blockemu.drivers.crypto.authorization import SimpleAuthorizer
from blockemu.drivers.nbd.protocol import IHAVEOPT, OPTION, Command, Option, Reply
from blockemu.limits import Limits
from blockemu.loop.clock import VirtualClock
from blockemu.loop.tls_stream import TlsError
from tests.peers.certificates import CLIENT, Authority, Pki, distinguished_name
from tests.unit.nbd.client import Client
from tests.unit.nbd.conftest import StartServer
from tests.unit.nbd.tls_client import (
    START,
    ask_for_tls,
    client_context,
    policy,
    shake_hands,
    start_tls,
)

ABORT, LIST, GO = Option.NBD_OPT_ABORT, Option.NBD_OPT_LIST, Option.NBD_OPT_GO
EXPORT_NAME = Option.NBD_OPT_EXPORT_NAME
TLS_REQD, INVALID = Reply.NBD_REP_ERR_TLS_REQD, Reply.NBD_REP_ERR_INVALID

GO_DISK = struct.pack(">I4sH", 4, b"disk", 0)


def go(client: Client) -> None:
    """Choose "disk", and read from it."""
    client.option(GO, GO_DISK)
    while (reply := client.option_reply(GO)[0]) == Reply.NBD_REP_INFO:
        pass
    assert reply == Reply.NBD_REP_ACK
    client.request(Command.NBD_CMD_READ, cookie=9, length=16)
    assert client.reply(16) == (9, 0, bytes(16))


def is_listed(client: Client) -> bool:
    """The server tells its exports."""
    client.option(LIST)
    while (reply := client.option_reply(LIST)[0]) == Reply.NBD_REP_SERVER:
        pass
    return reply == Reply.NBD_REP_ACK


# --- without TLS ---


@pytest.mark.parametrize("data", [b"", b"x"])
def test_a_server_without_tls_refuses_it_and_never_asks_for_it(
    start_server: StartServer, data: bytes
) -> None:
    client = start_server().connect()
    client.greet()
    client.option(START, data)
    assert client.option_reply(START)[0] == Reply.NBD_REP_ERR_POLICY
    go(client)


# --- TLS is required ---


@pytest.mark.parametrize("option", [LIST, Option.NBD_OPT_INFO, GO, 8, 9, 10, 11, 99])
@pytest.mark.parametrize("length", [0, 10, 20_000])
def test_nothing_is_told_before_required_tls(
    start_server: StartServer, pki: Pki, option: int, length: int
) -> None:
    client = start_server(tls=policy(pki.folder)).connect()
    client.greet()
    client.option(option, bytes(length))
    assert client.option_reply(option)[0] == TLS_REQD
    client.option(START)
    assert client.option_reply(START) == (Reply.NBD_REP_ACK, b"")


def test_an_export_cannot_be_had_by_name_without_required_tls(
    start_server: StartServer, pki: Pki
) -> None:
    client = start_server(tls=policy(pki.folder)).connect()
    client.greet()
    client.option(EXPORT_NAME, b"disk")
    assert client.hung_up()


def test_a_client_may_leave_without_required_tls(start_server: StartServer, pki: Pki) -> None:
    client = start_server(tls=policy(pki.folder)).connect()
    client.greet()
    client.option(ABORT)
    assert client.option_reply(ABORT) == (Reply.NBD_REP_ACK, b"")
    assert client.hung_up()


def test_a_client_of_the_simple_newstyle_gets_no_tls(start_server: StartServer, pki: Pki) -> None:
    """ "TLS requires fixed newstyle negotiation to have completed.\""""
    client = start_server(tls=policy(pki.folder)).connect()
    client.greet(client_flags=2)
    client.option(START)
    assert client.hung_up()


@pytest.mark.parametrize("required", [True, False])
def test_an_export_is_served_through_tls(
    start_server: StartServer, pki: Pki, required: bool
) -> None:
    client = start_server(tls=policy(pki.folder, required=required)).connect()
    stream = start_tls(client, pki.folder)
    assert stream.description.startswith("TLSv1.3")
    assert is_listed(client)
    client.option(99)
    assert client.option_reply(99)[0] == Reply.NBD_REP_ERR_UNSUP
    go(client)


def test_starttls_with_data_is_invalid_and_can_be_asked_again(
    start_server: StartServer, pki: Pki
) -> None:
    client = start_server(tls=policy(pki.folder)).connect()
    client.greet()
    client.option(START, b"now")
    assert client.option_reply(START)[0] == INVALID
    client.option(START)
    assert client.option_reply(START)[0] == Reply.NBD_REP_ACK
    shake_hands(client, client_context(pki.folder))
    go(client)


def test_starttls_twice_is_invalid(start_server: StartServer, pki: Pki) -> None:
    client = start_server(tls=policy(pki.folder)).connect()
    start_tls(client, pki.folder)
    client.option(START)
    assert client.option_reply(START)[0] == INVALID
    go(client)


def test_the_last_option_under_tls_may_come_with_requests(
    start_server: StartServer, pki: Pki
) -> None:
    """What TLS had read ahead is not lost when the connection changes hands."""
    client = start_server(tls=policy(pki.folder)).connect()
    start_tls(client, pki.folder)
    head = OPTION.pack(IHAVEOPT, GO, len(GO_DISK)) + GO_DISK
    request = struct.pack(">IHHQQI", 0x25609513, 0, Command.NBD_CMD_READ, 5, 0, 8)
    assert client.sock.send(head + request) == len(head + request)
    while client.option_reply(GO)[0] == Reply.NBD_REP_INFO:
        pass
    assert client.reply(8) == (5, 0, bytes(8))


# --- TLS is offered ---


def test_offered_tls_need_not_be_taken(start_server: StartServer, pki: Pki) -> None:
    client = start_server(tls=policy(pki.folder, required=False)).connect()
    client.greet()
    assert is_listed(client)
    go(client)


def test_what_was_agreed_on_before_tls_is_forgotten(start_server: StartServer, pki: Pki) -> None:
    """Structured replies and a meta context, by somebody in the middle perhaps."""
    client = start_server(tls=policy(pki.folder, required=False)).connect()
    client.greet()
    structured, context = Option.NBD_OPT_STRUCTURED_REPLY, Option.NBD_OPT_SET_META_CONTEXT
    query = struct.pack(">I4sII", 4, b"disk", 1, 15) + b"base:allocation"
    client.option(structured)
    assert client.option_reply(structured)[0] == Reply.NBD_REP_ACK
    client.option(context, query)
    assert client.option_reply(context)[0] == Reply.NBD_REP_META_CONTEXT
    assert client.option_reply(context)[0] == Reply.NBD_REP_ACK
    client.option(START)
    assert client.option_reply(START)[0] == Reply.NBD_REP_ACK
    shake_hands(client, client_context(pki.folder))
    client.option(context, query)
    assert client.option_reply(context)[0] == INVALID
    go(client)  # whose reply to READ is a simple one


# --- what is no TLS ---


def test_what_was_injected_behind_starttls_is_not_taken_for_encrypted(
    start_server: StartServer, pki: Pki
) -> None:
    """CVE-2021-3716's kind: somebody in the middle adds an option in the clear."""
    server = start_server(tls=policy(pki.folder))
    client = server.connect()
    client.greet()
    client.sock.send(OPTION.pack(IHAVEOPT, START, 0) + OPTION.pack(IHAVEOPT, LIST, 0))
    assert client.drain() == b""
    assert not server.server.connection_count


@pytest.mark.parametrize(
    "garbage", [OPTION.pack(IHAVEOPT, LIST, 0), bytes(100), b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03"]
)
def test_garbage_for_a_handshake_ends_the_connection(
    start_server: StartServer, pki: Pki, garbage: bytes
) -> None:
    server = start_server(tls=policy(pki.folder))
    client = server.connect()
    ask_for_tls(client)
    client.send(garbage)
    client.sock.shutdown(1)
    said = client.drain()
    assert len(said) <= 7  # an alert at most
    assert not server.server.connection_count


@pytest.mark.parametrize("sent", [0, 1, 100])
def test_silence_in_the_handshake_has_an_end(
    start_server: StartServer, pki: Pki, clock: VirtualClock, sent: int
) -> None:
    server = start_server(tls=policy(pki.folder))
    client = server.connect()
    ask_for_tls(client)
    hello = client_hello()
    client.send(hello[:sent])
    clock.advance_ns(Limits().negotiation_time_max_ns - 1)
    assert client.silent()
    clock.advance_ns(1)
    assert client.hung_up()
    assert not server.server.connection_count


def test_a_handshake_counts_in_the_bytes_of_negotiation(
    start_server: StartServer, pki: Pki
) -> None:
    limits = Limits(negotiation_bytes_max=400, option_length_max=100, name_length_max=100)
    client = start_server(tls=policy(pki.folder), limits=limits).connect()
    ask_for_tls(client)
    client.sock.send(client_hello() + bytes(400))
    client.rounds()
    assert client.drain()[:1] in (b"", b"\x15", b"\x16")
    assert client.hung_up()


def test_half_done_handshakes_hold_up_nobody(start_server: StartServer, pki: Pki) -> None:
    server = start_server(tls=policy(pki.folder))
    hello = client_hello()
    for number in range(100):
        half = server.connect()
        ask_for_tls(half)
        half.send(hello if number % 2 else hello[:50])
    client = server.connect()
    start_tls(client, pki.folder)
    go(client)
    assert server.server.connection_count == 101
    for other in server.clients:
        other.sock.close()
    client.until(lambda: not server.server.connection_count)


def client_hello() -> bytes:
    """The first thing that a client says."""
    outgoing = ssl.MemoryBIO()
    tls = client_context(None).wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


# --- who may come in ---


def refused(client: Client, context: ssl.SSLContext) -> bool:
    """The server doesn't take this client. In TLS 1.3 the client believes that it was taken until
    it hears otherwise."""
    ask_for_tls(client)
    try:
        shake_hands(client, context)
        client.option(LIST)
        client.receive(20)
    except (OSError, AssertionError) as error:
        return isinstance(error, OSError) or "hung up" in str(error)
    return False


def test_a_client_without_certificate_is_refused(start_server: StartServer, pki: Pki) -> None:
    folder = pki.folder_of("nobody")
    assert refused(start_server(tls=policy(pki.folder)).connect(), client_context(folder))


def test_a_client_without_certificate_may_come_where_none_is_asked_for(
    start_server: StartServer, pki: Pki
) -> None:
    folder = pki.folder_of("nobody")
    client = start_server(tls=policy(pki.folder, **{"verify-peer": False})).connect()
    start_tls(client, folder)
    go(client)


def test_a_client_of_another_authority_is_refused(start_server: StartServer, pki: Pki) -> None:
    stranger = Authority("somebody else").issue("laptop", purpose=CLIENT)
    stranger.put(pki.folder.parent / "stranger", "client")
    context = client_context(None)
    folder = pki.folder.parent / "stranger"
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    assert refused(start_server(tls=policy(pki.folder)).connect(), context)


@pytest.mark.parametrize("wrong", ["expired", "for servers", "revoked"])
def test_a_client_with_a_bad_certificate_is_refused(
    start_server: StartServer, pki: Pki, wrong: str
) -> None:
    if wrong == "for servers":
        identity = pki.authority.issue("laptop")
    else:
        identity = pki.authority.issue("laptop", purpose=CLIENT, expired=wrong == "expired")
    other = pki.authority.issue("pc", purpose=CLIENT)
    folder = pki.folder_of(f"bad {wrong}", client=identity)
    server_folder = pki.folder_of(
        f"server against {wrong}",
        server=pki.authority.issue(),
        revoked=[identity] if wrong == "revoked" else [other],
    )
    context = client_context(None)
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    assert refused(start_server(tls=policy(server_folder)).connect(), context)


@pytest.mark.parametrize("name", ["laptop", "desktop"])
def test_only_those_on_the_list_come_in(start_server: StartServer, pki: Pki, name: str) -> None:
    authorizer = SimpleAuthorizer(distinguished_name("laptop"))
    folder = pki.folder_of(name, client=pki.authority.issue(name, purpose=CLIENT))
    client = start_server(tls=policy(pki.folder, authorizer=authorizer)).connect()
    assert refused(client, client_context(folder)) == (name != "laptop")


def test_an_old_version_of_tls_is_refused(start_server: StartServer, pki: Pki) -> None:
    context = client_context(pki.folder)
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    client = start_server(tls=policy(pki.folder)).connect()
    ask_for_tls(client)
    with pytest.raises(TlsError, match="protocol version"):
        shake_hands(client, context)


def test_tls_1_2_will_do(start_server: StartServer, pki: Pki) -> None:
    context = client_context(pki.folder)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = start_server(tls=policy(pki.folder)).connect()
    ask_for_tls(client)
    assert shake_hands(client, context).description.startswith("TLSv1.2")
    go(client)
