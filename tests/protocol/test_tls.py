# SPDX-License-Identifier: Apache-2.0
"""STARTTLS in each of a server's modes: without TLS, with it on offer, and insisting on it.

Section "TLS support", its modes "NOTLS", "FORCEDTLS", "SELECTIVETLS" (no export is for TLS only, so
nothing is ever refused for want of it), "NBD_OPT_STARTTLS".
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator

import pytest

from tests.protocol.client import STRUCTURED, Client, info_data, name_and_list
from tests.protocol.conftest import CONTENT, ProtocolServer, Servers
from tests.protocol.wire import Cmd, Err, Flag, Opt, Rep

MODES = ["on", "require"]
HAGGLING = {
    Opt.LIST: b"",
    Opt.INFO: info_data("disk"),
    Opt.GO: info_data("disk"),
    Opt.STRUCTURED_REPLY: b"",
    Opt.EXTENDED_HEADERS: b"",
    Opt.LIST_META_CONTEXT: name_and_list("disk"),
    Opt.SET_META_CONTEXT: name_and_list("disk", "base:allocation"),
    0xABCD: b"unknown",
}

Secure = Callable[[], ssl.SSLContext]


@pytest.fixture
def secure(servers: Servers) -> Secure:
    """A client's context that trusts the server's authority."""

    def make() -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(servers.pki.folder / "ca-cert.pem"))
        context.load_cert_chain(
            servers.pki.folder / "client-cert.pem", servers.pki.folder / "client-key.pem"
        )
        return context

    return make


def connections(server: ProtocolServer) -> Iterator[Client]:
    """One, greeted."""
    with Client.greeted(server.socket_path) as client:
        yield client
    server.assert_well()


@pytest.fixture
def forced(servers: Servers, native: str) -> Iterator[Client]:
    """Of a server that insists on TLS."""
    yield from connections(servers.get(native, tls="require"))


@pytest.fixture
def selective(servers: Servers, native: str) -> Iterator[Client]:
    """Of a server that has TLS for who wants it."""
    yield from connections(servers.get(native, tls="on"))


@pytest.fixture(params=MODES)
def willing(request: pytest.FixtureRequest, servers: Servers, native: str) -> Iterator[Client]:
    """Of either of them."""
    yield from connections(servers.get(native, tls=request.param))


# --- NOTLS mode ---


def test_notls_refuses_starttls_and_goes_on(client: Client) -> None:
    assert client.outcome(Opt.STARTTLS) in (Rep.ERR_POLICY, Rep.ERR_UNSUP)
    assert client.outcome(Opt.STARTTLS, b"data") in (
        Rep.ERR_POLICY,
        Rep.ERR_UNSUP,
        Rep.ERR_INVALID,
    )
    client.go("disk")
    assert client.alive()


def test_notls_never_asks_for_tls(client: Client) -> None:
    for option, data in HAGGLING.items():
        if option != Opt.GO:
            assert client.outcome(option, data) != Rep.ERR_TLS_REQD
    assert client.outcome(Opt.GO, info_data("nobody")) == Rep.ERR_UNKNOWN


# --- FORCEDTLS mode ---


def test_forced_asks_for_tls_whatever_is_asked_of_it(forced: Client) -> None:
    for option, data in HAGGLING.items():
        replies = forced.ask(option, data)
        assert [reply.kind for reply in replies] == [Rep.ERR_TLS_REQD], option


def test_forced_ends_the_session_on_export_name(forced: Client) -> None:
    forced.option(Opt.EXPORT_NAME, b"disk")
    assert forced.closed()


def test_forced_acknowledges_abort_without_tls(forced: Client) -> None:
    assert forced.ask(Opt.ABORT) == [(Opt.ABORT, Rep.ACK, b"")]
    assert forced.closed()


@pytest.mark.parametrize("flags", [0, 2])
def test_forced_gives_nothing_to_who_cant_have_tls(
    servers: Servers, native: str, flags: int
) -> None:
    server = servers.get(native, tls="require")
    for option, data in ((Opt.EXPORT_NAME, b"disk"), (Opt.STARTTLS, b"")):
        with Client.greeted(server.socket_path, flags) as client:
            client.option(option, data)
            assert client.closed()


# --- SELECTIVETLS mode ---


def test_selective_serves_without_tls(selective: Client) -> None:
    for option, data in HAGGLING.items():
        if option not in (Opt.GO, Opt.EXTENDED_HEADERS):
            assert selective.outcome(option, data) != Rep.ERR_TLS_REQD
    selective.style = STRUCTURED
    selective.go("disk")
    assert selective.read(0, 512) == CONTENT[:512]


# --- both ---


def test_starttls_is_acknowledged_and_all_goes_through_tls(willing: Client, secure: Secure) -> None:
    willing.start_tls(secure())
    willing.negotiate(STRUCTURED)
    willing.set_contexts("disk", "base:allocation")
    willing.go("disk")
    assert willing.read(0, 70_000) == CONTENT[:70_000]
    assert not willing.call(Cmd.BLOCK_STATUS, 0, 4096).error
    assert not willing.call(Cmd.FLUSH).error


def test_starttls_again_is_invalid(willing: Client, secure: Secure) -> None:
    willing.start_tls(secure())
    assert willing.outcome(Opt.STARTTLS) == Rep.ERR_INVALID
    willing.go("disk")
    assert willing.alive()


def test_starttls_with_data_is_invalid(willing: Client, secure: Secure) -> None:
    assert willing.outcome(Opt.STARTTLS, b"please") == Rep.ERR_INVALID
    willing.start_tls(secure())
    willing.go("disk")
    assert willing.alive()


def test_starttls_forgets_what_was_agreed_on(selective: Client, secure: Secure) -> None:
    selective.negotiate(STRUCTURED)
    selective.set_contexts("disk", "base:allocation")
    selective.start_tls(secure())
    selective.style = "simple"
    selective.go("disk")
    assert not selective.flags & Flag.SEND_DF
    assert selective.call(Cmd.READ, 0, 512).was_simple
    assert selective.call(Cmd.BLOCK_STATUS, 0, 4096).error == Err.EINVAL


def test_after_tls_nothing_asks_for_it(willing: Client, secure: Secure) -> None:
    willing.start_tls(secure())
    for option, data in HAGGLING.items():
        if option != Opt.GO:
            assert willing.outcome(option, data) != Rep.ERR_TLS_REQD
    assert willing.outcome(Opt.GO, info_data("nobody")) == Rep.ERR_UNKNOWN


def test_a_handshake_that_fails_ends_the_session(willing: Client) -> None:
    assert willing.ask(Opt.STARTTLS)[-1].kind == Rep.ACK
    willing.send(b"IHAVEOPT\0\0\0\3\0\0\0\0")
    said = willing.rest()
    assert b"disk" not in said


def test_a_client_that_trusts_nobody_is_let_go(
    willing: Client, servers: Servers, native: str
) -> None:
    with pytest.raises(ssl.SSLError):
        willing.start_tls(ssl.create_default_context())
    with Client.greeted(servers.get(native, tls="on").socket_path) as other:
        other.go("disk")
        assert other.alive()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_versions_from_1_2_on_are_spoken(
    willing: Client, secure: Secure, version: ssl.TLSVersion
) -> None:
    context = secure()
    context.minimum_version = context.maximum_version = version
    willing.start_tls(context)
    willing.go("disk")
    assert willing.alive()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_versions_before_1_2_are_not_spoken(willing: Client, secure: Secure) -> None:
    context = secure()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        willing.start_tls(context)


def test_disc_closes_tls_and_then_the_connection(willing: Client, secure: Secure) -> None:
    willing.start_tls(secure())
    willing.go("disk")
    cookies = [willing.request(Cmd.READ, 0, 4096) for _ in range(5)]
    willing.request(Cmd.DISC)
    assert sorted(willing.answers(5)) == cookies
    # An end of the connection without TLS's own would be an SSLEOFError.
    assert willing.sock.recv(1) == b""


def test_abort_closes_tls_and_then_the_connection(willing: Client, secure: Secure) -> None:
    willing.start_tls(secure())
    assert willing.ask(Opt.ABORT) == [(Opt.ABORT, Rep.ACK, b"")]
    assert willing.sock.recv(1) == b""
