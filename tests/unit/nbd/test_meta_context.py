# SPDX-License-Identifier: Apache-2.0
"""Choosing meta contexts in negotiation: wild cards, what replaces what, and every wrong way."""

from __future__ import annotations

import struct

import pytest

from blockemu.drivers.dirty_bitmap import DirtyBitmap
from blockemu.drivers.nbd.protocol import (
    ChunkType,
    Command,
    CommandFlag,
    Option,
    Reply,
    TransmissionFlag,
)
from blockemu.limits import Limits
from blockemu.nbd.meta_context import BadQuery, TooManyQueries, parse_query
from tests.unit.nbd.client import Client
from tests.unit.nbd.conftest import DISK_BYTES, Server, StartServer

LIST = Option.NBD_OPT_LIST_META_CONTEXT
SET = Option.NBD_OPT_SET_META_CONTEXT
BASE, DEPTH = b"base:allocation", b"qemu:allocation-depth"
BITMAPS = (b"qemu:dirty-bitmap:b0", b"qemu:dirty-bitmap:b:1")
ALL = (BASE, DEPTH, *BITMAPS)


def query(name: bytes, *queries: bytes) -> bytes:
    """The data of LIST and SET."""
    parts = [struct.pack(">I", len(name)), name, struct.pack(">I", len(queries))]
    for one in queries:
        parts += [struct.pack(">I", len(one)), one]
    return b"".join(parts)


@pytest.fixture
def server(start_server: StartServer) -> Server:
    """Export "disk" offers all there is, "zweite Platte" only base:allocation."""
    server = start_server()
    disk = server.exports.get("disk")
    assert disk is not None
    disk.allocation_depth = True
    disk.bitmaps = tuple(
        DirtyBitmap(name, DISK_BYTES, granularity=512, enabled=False) for name in ("b0", "b:1")
    )
    return server


@pytest.fixture
def client(server: Server) -> Client:
    """Has agreed on structured replies."""
    return structured(server)


def structured(server: Server) -> Client:
    client = server.connect()
    client.greet()
    client.option(Option.NBD_OPT_STRUCTURED_REPLY)
    assert client.option_reply(Option.NBD_OPT_STRUCTURED_REPLY) == (Reply.NBD_REP_ACK, b"")
    client.style = "structured"
    return client


def ask(client: Client, option: int, data: bytes) -> dict[bytes, int] | Reply:
    """Names and ids that the server answers, or the error."""
    client.option(option, data)
    found: dict[bytes, int] = {}
    while True:
        reply, answer = client.option_reply(option)
        if reply == Reply.NBD_REP_ACK:
            assert answer == b""
            return found
        if reply != Reply.NBD_REP_META_CONTEXT:
            assert answer.decode(), "an error without a reason"
            return Reply(reply)
        (number,) = struct.unpack_from(">I", answer)
        assert answer[4:] not in found
        found[answer[4:]] = number


def go(client: Client, name: bytes) -> TransmissionFlag:
    """Enter the export. Returns its flags."""
    client.option(Option.NBD_OPT_GO, struct.pack(f">I{len(name)}sH", len(name), name, 0))
    reply, data = client.option_reply(Option.NBD_OPT_GO)
    assert reply == Reply.NBD_REP_INFO
    assert client.option_reply(Option.NBD_OPT_GO)[0] == Reply.NBD_REP_ACK
    return TransmissionFlag(struct.unpack_from(">HQH", data)[2])


def has_status(client: Client) -> bool:
    """The server refuses a BLOCK_STATUS, or begins to serve it."""
    client.request(Command.NBD_CMD_BLOCK_STATUS, length=512)
    chunk = client.chunk()
    if chunk.kind == ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS:
        return True
    assert chunk.error[0] == 22
    return False


# --- LIST ---


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ((), ALL),
        ((b"base:",), (BASE,)),
        ((b"qemu:",), (DEPTH, *BITMAPS)),
        ((b"qemu:dirty-bitmap:",), BITMAPS),
        ((b"qemu:", b"base:"), ALL),
        ((BITMAPS[1], BASE, BASE), (BASE, BITMAPS[1])),
        ((b"base:other", b"x-mine:", b"\xff\0", b"", b"base", b"qemu:dirty-bitmap:b"), ()),
    ],
)
def test_list_finds_by_names_and_wild_cards(
    client: Client, queries: tuple[bytes, ...], expected: tuple[bytes, ...]
) -> None:
    assert ask(client, LIST, query(b"disk", *queries)) == dict.fromkeys(expected, 0)


def test_list_tells_only_what_the_export_offers(client: Client) -> None:
    assert ask(client, LIST, query(b"zweite Platte")) == {BASE: 0}
    assert ask(client, LIST, query(b"")) == dict.fromkeys(ALL, 0), "that of the default export"


def test_list_chooses_nothing_and_forgets_nothing(client: Client) -> None:
    assert ask(client, SET, query(b"disk", BASE))
    assert ask(client, LIST, query(b"zweite Platte", BASE))
    assert ask(client, LIST, b"") == Reply.NBD_REP_ERR_INVALID
    go(client, b"disk")
    assert has_status(client)


# --- SET ---


def test_set_chooses_with_ids_of_their_own(client: Client) -> None:
    found = ask(client, SET, query(b"disk", *ALL, b"base:other", BASE))
    assert isinstance(found, dict)
    assert set(found) == set(ALL)
    assert len(set(found.values())) == len(ALL)


@pytest.mark.parametrize(
    "queries", [(), (b"base:",), (b"qemu:", b"qemu:dirty-bitmap:"), (b"qemu:dirty-bitmap:none",)]
)
def test_set_takes_no_wild_cards(client: Client, queries: tuple[bytes, ...]) -> None:
    assert ask(client, SET, query(b"disk", *queries)) == {}
    go(client, b"disk")
    assert not has_status(client)


def replaced(client: Client) -> None:
    assert ask(client, SET, query(b"disk")) == {}


def of_another_export(client: Client) -> None:
    assert ask(client, SET, query(b"zweite Platte", BASE)) == {BASE: 0}


def unknown_export(client: Client) -> None:
    assert ask(client, SET, query(b"none", BASE)) == Reply.NBD_REP_ERR_UNKNOWN


def malformed(client: Client) -> None:
    assert ask(client, SET, b"abc") == Reply.NBD_REP_ERR_INVALID


def too_many(client: Client) -> None:
    queries = [BASE] * (Limits().meta_queries_max + 1)
    assert ask(client, SET, query(b"disk", *queries)) == Reply.NBD_REP_ERR_TOO_BIG


def too_long(client: Client) -> None:
    data = query(b"disk", b"x" * Limits().option_length_max)
    assert ask(client, SET, data) == Reply.NBD_REP_ERR_TOO_BIG


@pytest.mark.parametrize(
    "spoil", [replaced, of_another_export, unknown_export, malformed, too_many, too_long]
)
def test_the_last_set_counts_even_if_it_fails(client: Client, spoil: object) -> None:
    assert ask(client, SET, query(b"disk", BASE))
    assert callable(spoil)
    spoil(client)
    go(client, b"disk")
    assert not has_status(client)


def test_a_choice_by_the_default_name_is_one_for_that_export(client: Client) -> None:
    assert ask(client, SET, query(b"", BASE))
    go(client, b"disk")
    assert has_status(client)


@pytest.mark.parametrize("option", [LIST, SET])
def test_structured_replies_come_first(server: Server, option: int) -> None:
    client = server.connect()
    client.greet()
    assert ask(client, option, query(b"disk", BASE)) == Reply.NBD_REP_ERR_INVALID


def test_payloads_are_offered_with_extended_headers_and_a_choice(server: Server) -> None:
    flag = TransmissionFlag.NBD_FLAG_BLOCK_STATUS_PAYLOAD
    for extended, queries, offered in ((1, (BASE,), 1), (1, (), 0), (0, (BASE,), 0)):
        client = structured(server)
        if extended:
            client.option(Option.NBD_OPT_EXTENDED_HEADERS)
            reply, _ = client.option_reply(Option.NBD_OPT_EXTENDED_HEADERS)
            assert reply == Reply.NBD_REP_ACK
        ask(client, SET, query(b"disk", *queries))
        assert bool(go(client, b"disk") & flag) == bool(offered)


def test_a_client_that_chose_nothing_is_told_so(client: Client) -> None:
    go(client, b"disk")
    flags = CommandFlag.NBD_CMD_FLAG_REQ_ONE
    client.request(Command.NBD_CMD_BLOCK_STATUS, flags=flags, length=512)
    value, text, _ = client.chunk().error
    assert value == 22
    assert "meta context" in text


# --- the data ---


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\5disk",
        query(b"disk")[:-1],
        query(b"disk", BASE)[:-1],
        query(b"disk", BASE) + b"x",
        b"\0\0\0\4disk\0\0\0\2\0\0\0\0",
        b"\0\0\0\4disk" + b"\xff" * 4,
        b"\xff" * 12,
        query(b"disk", b"x" * 4097),
    ],
)
def test_malformed_data_is_refused(data: bytes) -> None:
    with pytest.raises(BadQuery):
        parse_query(data, queries_max=8)


def test_the_number_of_queries_has_a_bound() -> None:
    assert len(parse_query(query(b"d", *[b"x"] * 8), queries_max=8).queries) == 8
    with pytest.raises(TooManyQueries, match="more than 8"):
        parse_query(query(b"d", *[b"x"] * 9), queries_max=8)
