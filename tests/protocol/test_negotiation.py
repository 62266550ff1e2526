# SPDX-License-Identifier: Apache-2.0
"""The handshake's general rules: greeting, client flags, the form of replies, who may hang up when.

Sections "Conventions" to "Termination of the session during option haggling", and "Flag fields".
"""

from __future__ import annotations

import contextlib
import signal
import struct
from pathlib import Path

import pytest

from tests.peers.blockemu import BlockemuDaemon
from tests.protocol.client import Client, OptionReply, info_data
from tests.protocol.conftest import CONTENT, DISK_BYTES, Connect, ProtocolServer
from tests.protocol.wire import (
    FIXED_NEWSTYLE,
    IHAVEOPT,
    NBDMAGIC,
    NO_ZEROES,
    STRING_BYTES_MAX,
    Info,
    Opt,
    Rep,
)


def goes_on(client: Client) -> bool:
    """Negotiation does."""
    return client.outcome(Opt.LIST) == Rep.ACK


# --- Conventions ---


def is_string(data: bytes) -> bool:
    """What the document calls a string."""
    data.decode()
    return b"\0" not in data and len(data) <= STRING_BYTES_MAX


def test_strings_that_the_server_sends_keep_the_rules_of_strings(client: Client) -> None:
    said: list[OptionReply] = [
        *client.ask(Opt.INFO, info_data("n" * STRING_BYTES_MAX)),
        *client.ask(Opt.INFO, info_data("a\0b")),
        *client.ask(Opt.INFO, b"?"),
        *client.ask(Opt.LIST, b"?"),
        *client.ask(0x7FFF),
    ]
    assert all(reply.is_error and is_string(reply.data) for reply in said)
    for entry in client.ask(Opt.LIST)[:-1]:
        (length,) = struct.unpack_from(">I", entry.data)
        assert is_string(entry.data[4 : 4 + length])
        assert is_string(entry.data[4 + length :])
    assert is_string(client.info("", Info.NAME)[Info.NAME])


@pytest.mark.parametrize("name", ["a\0b", "x" * (STRING_BYTES_MAX + 1)])
def test_strings_that_break_the_rules_name_no_export(client: Client, name: str) -> None:
    assert client.ask(Opt.INFO, info_data(name))[-1].is_error
    assert goes_on(client)


def test_haggling_an_option_under_way_at_shutdown_is_answered(tmp_path: Path, native: str) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))
    patient = ["--limit", "close-silence=10s"]
    server = BlockemuDaemon(disk, fmt="raw", socket_path=tmp_path / "sock", extra=patient)
    server.environment["BLOCKEMU_NATIVE"] = native
    with server, Client.greeted(server.socket_path) as client:
        assert goes_on(client)
        option = IHAVEOPT + struct.pack(">II", Opt.INFO, 6) + info_data("")
        client.send(option[:10])
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError):
            while True:  # until nobody listens any more
                Client.dial(server.socket_path).close()
        client.send(option[10:])
        reply = client.option_reply()
        assert (reply.option, reply.kind) == (Opt.INFO, Rep.ERR_SHUTDOWN)
        assert client.closed()
        assert server.wait() == 0


# --- Newstyle negotiation ---


def test_newstyle_greeting_is_not_oldstyle(server: ProtocolServer) -> None:
    with Client.dial(server.socket_path) as client:
        assert client.receive(16) == NBDMAGIC + IHAVEOPT


def test_newstyle_unknown_client_flag_closes(connect: Connect) -> None:
    for bit in range(2, 32):
        assert connect(FIXED_NEWSTYLE | NO_ZEROES | 1 << bit).closed()


@pytest.mark.parametrize("name", ["nobody", "disk\0", "Disk", "x" * 5000])
def test_newstyle_export_name_that_isnt_offered_ends_the_session(client: Client, name: str) -> None:
    client.option(Opt.EXPORT_NAME, name.encode())
    assert client.closed()


# --- Fixed newstyle negotiation ---


@pytest.mark.parametrize("option", [Opt.LIST, Opt.INFO, Opt.ABORT, 0xDEAD])
def test_fixed_newstyle_replies_name_the_option_that_they_answer(
    client: Client, option: int
) -> None:
    assert {reply.option for reply in client.ask(option)} == {option}


@pytest.mark.parametrize("length", [0, 1, 4096, 10_000])
def test_fixed_newstyle_unknown_options_data_is_skipped(client: Client, length: int) -> None:
    assert client.outcome(0xBEEF, bytes(length)) == Rep.ERR_UNSUP
    assert goes_on(client)


# --- Termination of the session during option haggling ---


def test_haggling_errors_never_end_the_session(client: Client) -> None:
    for round_ in range(50):
        assert client.outcome(0x1000 + round_) == Rep.ERR_UNSUP
        assert client.outcome(Opt.GO, info_data("nobody")) == Rep.ERR_UNKNOWN
        assert client.outcome(Opt.INFO, b"\xff" * round_) == Rep.ERR_INVALID
        assert client.outcome(Opt.LIST, b"!") == Rep.ERR_INVALID
    client.go("disk")
    assert client.read(0, 512) == CONTENT[:512]


def test_haggling_what_cant_be_answered_with_an_error_is_hung_up_on(client: Client) -> None:
    client.option(Opt.EXPORT_NAME, b"nobody")
    assert client.closed()


def test_haggling_out_of_step_is_hung_up_on(client: Client) -> None:
    client.send(b"IHAVENOT" + struct.pack(">II", Opt.LIST, 0))
    assert client.closed()


# --- Handshake flags, client flags ---


def test_handshake_flags_are_fixed_newstyle_and_no_zeroes_alone(server: ProtocolServer) -> None:
    with Client.dial(server.socket_path) as client:
        assert client.greet() == FIXED_NEWSTYLE | NO_ZEROES


@pytest.mark.parametrize("fixed", [0, FIXED_NEWSTYLE])
def test_client_flag_no_zeroes_leaves_the_zeroes_out(connect: Connect, fixed: int) -> None:
    client = connect(fixed | NO_ZEROES)
    client.export_name("disk")
    assert client.size_bytes == DISK_BYTES
    assert client.read(0, 16) == CONTENT[:16]


@pytest.mark.parametrize("fixed", [0, FIXED_NEWSTYLE])
def test_client_without_no_zeroes_gets_124_zeroes(connect: Connect, fixed: int) -> None:
    client = connect(fixed)
    client.export_name("disk", zeroes=True)
    assert client.read(0, 16) == CONTENT[:16]
