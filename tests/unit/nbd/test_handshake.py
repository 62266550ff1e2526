# SPDX-License-Identifier: Apache-2.0
"""Negotiation by byte scripts: every option, every way to get it wrong, every limit."""

from __future__ import annotations

import struct

import pytest

from blockemu.drivers.nbd.protocol import (
    EXPORT_NAME_REPLY,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    Command,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)
from blockemu.limits import Limits
from blockemu.loop.clock import VirtualClock
from tests.unit.nbd.client import Client
from tests.unit.nbd.conftest import DISK_BYTES, StartServer

GO = Option.NBD_OPT_GO
STRUCTURED_REPLY = Option.NBD_OPT_STRUCTURED_REPLY
EXTENDED_HEADERS = Option.NBD_OPT_EXTENDED_HEADERS
INFO = Option.NBD_OPT_INFO
LIST = Option.NBD_OPT_LIST
EXPORT_NAME = Option.NBD_OPT_EXPORT_NAME
ABORT = Option.NBD_OPT_ABORT

WRITABLE = (
    TransmissionFlag.NBD_FLAG_HAS_FLAGS
    | TransmissionFlag.NBD_FLAG_SEND_FLUSH
    | TransmissionFlag.NBD_FLAG_SEND_FUA
    | TransmissionFlag.NBD_FLAG_SEND_TRIM
    | TransmissionFlag.NBD_FLAG_SEND_WRITE_ZEROES
    | TransmissionFlag.NBD_FLAG_SEND_FAST_ZERO
    | TransmissionFlag.NBD_FLAG_SEND_CACHE
    | TransmissionFlag.NBD_FLAG_CAN_MULTI_CONN
)
READ_ONLY = (
    TransmissionFlag.NBD_FLAG_HAS_FLAGS
    | TransmissionFlag.NBD_FLAG_READ_ONLY
    | TransmissionFlag.NBD_FLAG_SEND_FLUSH
    | TransmissionFlag.NBD_FLAG_SEND_FUA
    | TransmissionFlag.NBD_FLAG_SEND_CACHE
    | TransmissionFlag.NBD_FLAG_CAN_MULTI_CONN
)


def info_data(name: bytes, *items: int) -> bytes:
    """The data of INFO and GO."""
    return struct.pack(f">I{len(name)}sH{len(items)}H", len(name), name, len(items), *items)


@pytest.fixture
def client(start_server: StartServer) -> Client:
    """A client of a server with two exports, who has been greeted."""
    client = start_server().connect()
    client.greet()
    return client


def answers(client: Client) -> bool:
    """The server still negotiates."""
    client.option(LIST)
    return client.option_reply(LIST)[0] == Reply.NBD_REP_SERVER


def serves(client: Client) -> bool:
    """The client is in transmission."""
    client.request(Command.NBD_CMD_READ, cookie=9, length=16)
    return client.reply(16) == (9, 0, bytes(16))


# --- EXPORT_NAME ---


@pytest.mark.parametrize("name", [b"disk", b""])
@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_export_name_begins_transmission(
    start_server: StartServer, name: bytes, flags: int
) -> None:
    client = start_server().connect()
    client.greet(flags)
    client.option(EXPORT_NAME, name)
    reply = client.receive(EXPORT_NAME_REPLY.size)
    assert EXPORT_NAME_REPLY.unpack(reply) == (DISK_BYTES, WRITABLE)
    if not flags & 2:
        assert client.receive(124) == bytes(124)
    assert serves(client)


@pytest.mark.parametrize("name", [b"none", b"\xff", b"d" * 4097, b"d" * 20_000])
def test_bad_export_name_hangs_up(client: Client, name: bytes) -> None:
    client.option(EXPORT_NAME, name)
    assert client.hung_up()


# --- GO and INFO ---


def collect(client: Client, option: int) -> dict[int, bytes]:
    """All INFO replies up to the ACK."""
    items: dict[int, bytes] = {}
    while True:
        reply, data = client.option_reply(option)
        if reply == Reply.NBD_REP_ACK:
            assert not data
            return items
        assert reply == Reply.NBD_REP_INFO
        items[int.from_bytes(data[:2], "big")] = data


@pytest.mark.parametrize("option", [INFO, GO])
def test_info_without_wishes_tells_the_export(client: Client, option: int) -> None:
    client.option(option, info_data(b"disk"))
    assert collect(client, option) == {
        Info.NBD_INFO_EXPORT: INFO_EXPORT.pack(Info.NBD_INFO_EXPORT, DISK_BYTES, WRITABLE)
    }
    assert serves(client) if option == GO else answers(client)


def test_info_tells_what_is_asked_for(client: Client) -> None:
    client.option(INFO, info_data(b"", 1, 2, 3, 3, 99))
    items = collect(client, INFO)
    assert set(items) == {0, 1, 2, 3}
    assert items[Info.NBD_INFO_NAME][2:] == b"disk"
    assert items[Info.NBD_INFO_DESCRIPTION][2:] == b"the first"
    sizes = INFO_BLOCK_SIZE.unpack(items[Info.NBD_INFO_BLOCK_SIZE])
    assert sizes == (Info.NBD_INFO_BLOCK_SIZE, 1, 4096, 32 << 20)


def test_read_only_export_says_so(client: Client) -> None:
    client.option(INFO, info_data(b"zweite Platte"))
    items = collect(client, INFO)
    assert INFO_EXPORT.unpack(items[0])[2] == READ_ONLY


def test_a_description_that_there_isnt_isnt_told(client: Client) -> None:
    client.option(INFO, info_data(b"zweite Platte", Info.NBD_INFO_DESCRIPTION))
    assert set(collect(client, INFO)) == {Info.NBD_INFO_EXPORT}


@pytest.mark.parametrize("option", [INFO, GO])
def test_unknown_export_is_told_and_haggling_goes_on(client: Client, option: int) -> None:
    client.option(option, info_data(b"none"))
    assert client.option_reply(option)[0] == Reply.NBD_REP_ERR_UNKNOWN
    client.option(GO, info_data(b"disk"))
    collect(client, GO)
    assert serves(client)


def test_no_default_export_where_there_are_none(start_server: StartServer) -> None:
    server = start_server()
    for export in server.exports.list():
        server.exports.remove(export.name)
    client = server.connect()
    client.greet()
    client.option(GO, info_data(b""))
    assert client.option_reply(GO)[0] == Reply.NBD_REP_ERR_UNKNOWN


@pytest.mark.parametrize("option", [INFO, GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 5,
        struct.pack(">I", 1) + b"\0\0",
        struct.pack(">I4sH", 5, b"disk", 0),
        struct.pack(">I4sH", 2**32 - 1, b"disk", 0),
        struct.pack(">I4sH", 4, b"disk", 1),
        struct.pack(">I4sHH", 4, b"disk", 0, 3),
        struct.pack(">I4sHB", 4, b"disk", 1, 3),
        struct.pack(">I4sH", 4, b"\xff\xfe\xfd\xfc", 0),
        struct.pack(">I4097sH", 4097, b"x" * 4097, 0),
    ],
)
def test_malformed_info_is_invalid(client: Client, option: int, data: bytes) -> None:
    client.option(option, data)
    assert client.option_reply(option)[0] == Reply.NBD_REP_ERR_INVALID
    assert answers(client)


def test_the_longest_name_is_only_unknown(client: Client) -> None:
    client.option(GO, info_data(b"x" * 4096))
    assert client.option_reply(GO)[0] == Reply.NBD_REP_ERR_UNKNOWN


# --- the other options ---


def test_list_names_all_exports(client: Client) -> None:
    client.option(LIST)
    replies = [client.option_reply(LIST) for _ in range(3)]
    assert [reply for reply, _ in replies] == [2, 2, 1]
    assert [data for _, data in replies] == [
        struct.pack(">I", 4) + b"disk" + b"the first",
        struct.pack(">I", 13) + b"zweite Platte",
        b"",
    ]


def test_list_with_data_is_invalid(client: Client) -> None:
    client.option(LIST, b"x")
    assert client.option_reply(LIST)[0] == Reply.NBD_REP_ERR_INVALID
    assert answers(client)


@pytest.mark.parametrize("data", [b"", b"why", b"x" * 20_000])
def test_abort_is_acknowledged(client: Client, data: bytes) -> None:
    client.option(ABORT, data)
    assert client.option_reply(ABORT) == (Reply.NBD_REP_ACK, b"")
    assert client.hung_up()


@pytest.mark.parametrize("option", [0, 4, 5, 12, 2**31, 2**32 - 1])
@pytest.mark.parametrize("data", [b"", b"x" * 1000])
def test_unknown_option_is_unsupported(client: Client, option: int, data: bytes) -> None:
    client.option(option, data)
    assert client.option_reply(option)[0] == Reply.NBD_REP_ERR_UNSUP
    assert answers(client)


@pytest.mark.parametrize("option", [LIST, INFO, GO, 99])
def test_too_long_option_is_dropped_and_told(client: Client, option: int) -> None:
    client.option(option, bytes(Limits().option_length_max + 1))
    assert client.option_reply(option)[0] == Reply.NBD_REP_ERR_TOO_BIG
    assert answers(client)


# --- what ends negotiation ---


@pytest.mark.parametrize("flags", [4, 7, 1 << 31])
def test_unknown_client_flags_hang_up(start_server: StartServer, flags: int) -> None:
    client = start_server().connect()
    client.greet(flags)
    assert client.hung_up()


def test_options_need_fixed_newstyle(start_server: StartServer) -> None:
    client = start_server().connect()
    client.greet(0)
    client.option(LIST)
    assert client.hung_up()


def test_bad_option_magic_hangs_up(client: Client) -> None:
    client.send(OPTION.pack(IHAVEOPT + 1, LIST, 0))
    assert client.hung_up()


def test_absurd_option_length_hangs_up(client: Client) -> None:
    client.send(OPTION.pack(IHAVEOPT, 99, 2**32 - 1))
    sent = 0
    try:
        while sent < 8 << 20:
            sent += client.sock.send(bytes(65536))
            client.rounds(1)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass
    assert client.hung_up()
    assert sent < 4 << 20


def test_bytes_in_negotiation_are_bounded(client: Client) -> None:
    sent = 0
    try:
        while sent < 4 << 20:
            client.option(99, bytes(10_000))
            client.drain_some()
            sent += 10_016
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert Limits().negotiation_bytes_max - 20_000 < sent < 2 << 20


@pytest.mark.parametrize("script", [b"", b"\0\0", struct.pack(">I", 3) + b"IHAVEOPT"])
def test_a_silent_client_is_shown_the_door(
    start_server: StartServer, clock: VirtualClock, script: bytes
) -> None:
    server = start_server()
    client = server.connect()
    client.receive(18)
    client.send(script)
    clock.advance_ns(Limits().negotiation_time_max_ns - 1)
    assert client.silent()
    clock.advance_ns(1)
    assert client.hung_up()
    assert not server.server.connection_count


def test_a_client_that_reads_no_replies_is_shown_the_door(
    start_server: StartServer, clock: VirtualClock
) -> None:
    server = start_server()
    client = server.connect()
    client.greet()
    client.send_some(OPTION.pack(IHAVEOPT, LIST, 0) * 60_000)
    client.rounds(100)
    clock.advance_ns(Limits().negotiation_time_max_ns)
    client.rounds()
    assert not server.server.connection_count


@pytest.mark.parametrize("cut", [0, 3, 4, 10, 19, 20, 25])
def test_a_client_that_leaves_is_forgotten(start_server: StartServer, cut: int) -> None:
    server = start_server()
    client = server.connect()
    client.receive(18)
    client.send((struct.pack(">I", 3) + OPTION.pack(IHAVEOPT, GO, 10) + info_data(b"disk"))[:cut])
    client.sock.close()
    client.until(lambda: not server.server.connection_count)


def test_negotiation_comes_through_byte_by_byte(start_server: StartServer) -> None:
    client = start_server().connect()
    client.receive(18)
    data = info_data(b"disk")
    for byte in struct.pack(">I", 3) + OPTION.pack(IHAVEOPT, GO, len(data)) + data:
        client.send(bytes([byte]))
    collect(client, GO)
    assert serves(client)


def test_requests_sent_before_the_answer_are_not_lost(start_server: StartServer) -> None:
    client = start_server().connect()
    client.receive(18)
    data = info_data(b"disk")
    client.sock.send(struct.pack(">I", 3) + OPTION.pack(IHAVEOPT, GO, len(data)) + data)
    client.request(Command.NBD_CMD_READ, cookie=1, length=8)
    collect(client, GO)
    assert client.reply(8) == (1, 0, bytes(8))


# --- structured replies and extended headers ---


def read_one(client: Client, style: str) -> tuple[int, int, bytes]:
    """Choose the export and read from it in `style`."""
    client.option(GO, info_data(b"disk"))
    kind, info = client.option_reply(GO)
    assert kind == Reply.NBD_REP_INFO
    flags = struct.unpack(">HQH", info)[2]
    assert bool(flags & TransmissionFlag.NBD_FLAG_SEND_DF) is (style != "simple")
    assert client.option_reply(GO)[0] == Reply.NBD_REP_ACK
    client.style = style
    client.request(Command.NBD_CMD_READ, cookie=9, length=16)
    return client.reply(16)


@pytest.mark.parametrize(
    ("options", "agreed"),
    [
        ([STRUCTURED_REPLY], "structured"),
        ([EXTENDED_HEADERS], "extended"),
        ([STRUCTURED_REPLY, EXTENDED_HEADERS], "extended"),
    ],
)
def test_the_style_asked_for_is_spoken(client: Client, options: list[int], agreed: str) -> None:
    for option in options:
        client.option(option)
        assert client.option_reply(option) == (Reply.NBD_REP_ACK, b"")
    assert read_one(client, agreed) == (9, 0, bytes(16))


@pytest.mark.parametrize("option", [STRUCTURED_REPLY, EXTENDED_HEADERS])
def test_style_with_data_is_invalid_and_changes_nothing(client: Client, option: int) -> None:
    client.option(option, b"x")
    assert client.option_reply(option)[0] == Reply.NBD_REP_ERR_INVALID
    assert read_one(client, "simple") == (9, 0, bytes(16))


@pytest.mark.parametrize(
    ("option", "agreed"), [(STRUCTURED_REPLY, "structured"), (EXTENDED_HEADERS, "extended")]
)
def test_style_asked_for_twice_is_invalid_and_stays(
    client: Client, option: int, agreed: str
) -> None:
    client.option(option)
    assert client.option_reply(option)[0] == Reply.NBD_REP_ACK
    client.option(option)
    assert client.option_reply(option)[0] == Reply.NBD_REP_ERR_INVALID
    assert read_one(client, agreed) == (9, 0, bytes(16))


def test_extended_headers_take_precedence_over_structured_replies(client: Client) -> None:
    client.option(EXTENDED_HEADERS)
    assert client.option_reply(EXTENDED_HEADERS)[0] == Reply.NBD_REP_ACK
    client.option(STRUCTURED_REPLY)
    assert client.option_reply(STRUCTURED_REPLY)[0] == Reply.NBD_REP_ERR_EXT_HEADER_REQD
    client.option(STRUCTURED_REPLY, b"x")
    assert client.option_reply(STRUCTURED_REPLY)[0] == Reply.NBD_REP_ERR_INVALID
    assert read_one(client, "extended") == (9, 0, bytes(16))


def test_export_name_after_extended_headers_ends_the_connection(client: Client) -> None:
    client.option(EXTENDED_HEADERS)
    assert client.option_reply(EXTENDED_HEADERS)[0] == Reply.NBD_REP_ACK
    client.option(EXPORT_NAME, b"disk")
    assert client.hung_up()


def test_export_name_after_structured_replies_offers_df(client: Client) -> None:
    client.option(STRUCTURED_REPLY)
    assert client.option_reply(STRUCTURED_REPLY)[0] == Reply.NBD_REP_ACK
    client.option(EXPORT_NAME, b"disk")
    _, flags = EXPORT_NAME_REPLY.unpack(client.receive(EXPORT_NAME_REPLY.size))
    assert flags & TransmissionFlag.NBD_FLAG_SEND_DF
