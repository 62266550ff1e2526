# SPDX-License-Identifier: Apache-2.0
"""Each option and each type of option reply, but for TLS and meta contexts, which have files of
their own. Sections "Option types", "Option reply types", "Transmission flags", "Baseline".
"""

from __future__ import annotations

import struct

import pytest

from tests.protocol.client import Client, info_data
from tests.protocol.conftest import CONTENT, DISK_BYTES, Connect, ProtocolServer
from tests.protocol.wire import Cmd, CmdFlag, Err, Flag, Info, Opt, Rep

HAGGLING = [Opt.INFO, Opt.GO]
EXPORTS = ["disk", "sparse"]


def goes_on(client: Client) -> bool:
    """Negotiation does."""
    return client.outcome(Opt.LIST) == Rep.ACK


# --- Transmission flags ---


def flags_of(client: Client, export: str = "disk") -> Flag:
    """As INFO tells them."""
    return Flag(struct.unpack(">QH", client.info(export)[Info.EXPORT])[1])


def test_transmission_flags_say_that_there_are_flags(client: Client) -> None:
    assert flags_of(client) & Flag.HAS_FLAGS


def test_transmission_flags_promise_only_commands_that_work(connect: Connect) -> None:
    client = connect()
    flags = flags_of(client)
    client.go("disk")
    at = DISK_BYTES - 4096
    for flag, command, length in (
        (Flag.SEND_FLUSH, Cmd.FLUSH, 0),
        (Flag.SEND_TRIM, Cmd.TRIM, 512),
        (Flag.SEND_WRITE_ZEROES, Cmd.WRITE_ZEROES, 512),
        (Flag.SEND_CACHE, Cmd.CACHE, 512),
    ):
        answer = client.call(command, at if length else 0, length)
        assert (answer.error == Err.OK) == bool(flags & flag), (flag, answer)
    if flags & Flag.SEND_FUA:
        assert not client.call(Cmd.WRITE, at, flags=CmdFlag.FUA, payload=b"x").error


def test_transmission_flag_df_is_clear_without_structured_replies(client: Client) -> None:
    assert not flags_of(client) & Flag.SEND_DF


def test_transmission_flag_fast_zero_needs_write_zeroes(
    client: Client, read_only_server: ProtocolServer
) -> None:
    with Client.greeted(read_only_server.socket_path) as locked:
        for flags in (flags_of(client), flags_of(locked)):
            assert not flags & Flag.SEND_FAST_ZERO or flags & Flag.SEND_WRITE_ZEROES


def test_transmission_flag_read_only_is_told(read_only_server: ProtocolServer) -> None:
    with Client.greeted(read_only_server.socket_path) as locked:
        assert flags_of(locked) & Flag.READ_ONLY


def test_transmission_flag_multi_conn_makes_writes_seen_by_all(connect: Connect) -> None:
    one, other = connect(), connect()
    assert flags_of(one) & Flag.CAN_MULTI_CONN
    one.go("disk")
    other.go("disk")
    at, data = DISK_BYTES - 8192, b"seen by all".ljust(4096, b".")
    assert not one.call(Cmd.WRITE, at, payload=data).error
    assert not other.call(Cmd.FLUSH).error
    assert other.read(at, 4096) == data
    assert not other.call(Cmd.WRITE, at, flags=CmdFlag.FUA, payload=data[::-1]).error
    assert one.read(at, 4096) == data[::-1]


# --- NBD_OPT_EXPORT_NAME ---


@pytest.mark.parametrize("name", ["disk", ""])
def test_export_name_enters_transmission(client: Client, name: str) -> None:
    client.export_name(name)
    assert client.size_bytes == DISK_BYTES
    assert client.read(0, 512) == CONTENT[:512]


def test_export_name_works_without_fixed_newstyle(connect: Connect) -> None:
    client = connect(0)
    client.export_name("disk", zeroes=True)
    assert client.alive()


def test_other_options_need_fixed_newstyle(connect: Connect) -> None:
    client = connect(0)
    client.option(Opt.LIST)
    assert client.closed()


# --- NBD_OPT_ABORT ---


@pytest.mark.parametrize("data", [b"", b"goodbye", bytes(9000)])
def test_abort_is_acknowledged_whatever_comes_with_it(client: Client, data: bytes) -> None:
    assert client.ask(Opt.ABORT, data) == [(Opt.ABORT, Rep.ACK, b"")]
    assert client.closed()


def test_abort_of_a_client_that_doesnt_wait_is_taken_well(connect: Connect) -> None:
    for _ in range(20):
        client = connect()
        client.option(Opt.ABORT)
        client.close()
    assert goes_on(connect())


# --- NBD_OPT_LIST ---


def test_list_names_each_export_once_and_acknowledges(client: Client) -> None:
    *entries, final = client.ask(Opt.LIST)
    assert (final.kind, final.data) == (Rep.ACK, b"")
    names = []
    for entry in entries:
        assert entry.kind == Rep.SERVER
        (length,) = struct.unpack_from(">I", entry.data)
        assert length <= len(entry.data) - 4
        names.append(entry.data[4 : 4 + length].decode())
    assert names == EXPORTS


@pytest.mark.parametrize("data", [b"\0", b"disk", bytes(4096)])
def test_list_with_data_is_invalid(client: Client, data: bytes) -> None:
    assert client.outcome(Opt.LIST, data) == Rep.ERR_INVALID
    assert goes_on(client)


def test_listed_names_are_those_that_info_takes(client: Client) -> None:
    for name in EXPORTS:
        assert client.info(name, Info.NAME)[Info.NAME] == name.encode()


# --- NBD_OPT_INFO and NBD_OPT_GO ---


@pytest.mark.parametrize("option", HAGGLING)
def test_info_and_go_always_tell_the_export(connect: Connect, option: int) -> None:
    for wanted in ((), (Info.NAME,), (Info.BLOCK_SIZE, Info.DESCRIPTION), (0x4321,)):
        found = connect().info("disk", *wanted, option=option)
        size, flags = struct.unpack(">QH", found[Info.EXPORT])
        assert size == DISK_BYTES
        assert flags & Flag.HAS_FLAGS


@pytest.mark.parametrize("option", HAGGLING)
def test_info_and_go_ignore_items_that_they_dont_know(connect: Connect, option: int) -> None:
    assert set(connect().info("disk", 7, 0xFFFF, option=option)) == {Info.EXPORT}


@pytest.mark.parametrize("option", HAGGLING)
def test_info_and_go_of_no_name_mean_the_default_export(connect: Connect, option: int) -> None:
    assert connect().info("", Info.NAME, option=option)[Info.NAME] == b"disk"


@pytest.mark.parametrize("option", HAGGLING)
def test_info_and_go_of_an_unknown_export_tell_nothing_but_that(
    client: Client, option: int
) -> None:
    replies = client.ask(option, info_data("nobody", Info.NAME, Info.BLOCK_SIZE))
    assert [reply.kind for reply in replies] == [Rep.ERR_UNKNOWN]
    assert goes_on(client)


@pytest.mark.parametrize("option", HAGGLING)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0\0",
        struct.pack(">I4sH", 5, b"disk", 0),
        struct.pack(">I4sH", 0xFFFFFFFF, b"disk", 0),
        struct.pack(">I4sHH", 4, b"disk", 2, 0),
        struct.pack(">I4sHHH", 4, b"disk", 1, 0, 0),
    ],
)
def test_info_and_go_with_lengths_that_lie_are_invalid(
    client: Client, option: int, data: bytes
) -> None:
    assert client.outcome(option, data) == Rep.ERR_INVALID
    assert goes_on(client)


def test_info_then_go_tell_the_same(client: Client) -> None:
    wanted = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
    assert client.info("disk", *wanted) == client.go("disk", *wanted)


def test_info_stays_in_negotiation(client: Client) -> None:
    client.info("disk")
    assert goes_on(client)


@pytest.mark.parametrize("flags", [1, 3])
def test_go_enters_transmission_without_padding(connect: Connect, flags: int) -> None:
    client = connect(flags)
    client.go("disk")
    assert client.read(0, 100) == CONTENT[:100]


@pytest.mark.parametrize("items", [(), (Info.BLOCK_SIZE,)])
def test_go_never_requires_a_block_size_request(client: Client, items: tuple[int, ...]) -> None:
    client.go("disk", *items)
    assert client.alive()


# --- NBD_REP_INFO ---


def test_info_items_have_their_lengths(client: Client) -> None:
    found = client.info("disk", Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
    assert len(found[Info.EXPORT]) == 10
    assert len(found[Info.BLOCK_SIZE]) == 12
    assert found[Info.NAME] == b"disk"


def test_info_items_asked_for_twice_are_told_once(client: Client) -> None:
    client.info("disk", Info.NAME, Info.NAME, Info.BLOCK_SIZE, Info.BLOCK_SIZE, Info.EXPORT)


# --- Baseline, NBD_REP_ERR_UNSUP ---


@pytest.mark.parametrize("option", [0, Opt.PEEK_EXPORT, 12, 0x7FFFFFFF, 0xFFFFFFFF])
def test_options_that_arent_known_are_unsupported_and_the_next_is_parsed(
    client: Client, option: int
) -> None:
    assert client.outcome(option, b"anything") == Rep.ERR_UNSUP
    assert goes_on(client)


def test_options_in_one_packet_are_answered_one_by_one(client: Client) -> None:
    client.send(b"IHAVEOPT" + struct.pack(">II", 99, 3) + b"abc")
    client.send(b"IHAVEOPT" + struct.pack(">II", Opt.LIST, 0))
    client.option(Opt.GO, info_data("disk"))
    assert client.option_reply().kind == Rep.ERR_UNSUP
    assert [client.option_reply().kind for _ in range(3)] == [Rep.SERVER, Rep.SERVER, Rep.ACK]
    assert [client.option_reply().kind for _ in range(2)] == [Rep.INFO, Rep.ACK]
    assert client.alive()
