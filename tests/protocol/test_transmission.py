# SPDX-License-Identifier: Apache-2.0
"""What holds for every request: form of replies, cookies, sizes, errors, and how it all ends.

Sections "Transmission", "Size constraints", "Command flags", "Error values". What is the same in
all styles of replies is tested in all.
"""

from __future__ import annotations

import random
import struct

import pytest

from tests.protocol.client import Answer, Client
from tests.protocol.conftest import (
    CONTENT,
    CONTENT_BYTES,
    DISK_BYTES,
    MIB,
    SCRATCH,
    Connect,
    ProtocolServer,
)
from tests.protocol.wire import (
    PAYLOAD_BYTES_PORTABLE,
    SIMPLE_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    Err,
    Flag,
    Info,
)

WRITING = [Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES]
RANGED = [Cmd.READ, *WRITING]


def try_command(client: Client, command: int, offset: int, length: int, flags: int = 0) -> Answer:
    """The command, with a payload where it takes one."""
    payload = bytes(length) if command == Cmd.WRITE else b""
    return client.call(command, offset, length, flags=flags, payload=payload)


# --- Transmission ---


def test_replies_are_simple_where_nothing_else_was_negotiated(plain: Client) -> None:
    for command, offset, length in (
        (Cmd.READ, 0, 512),
        (Cmd.READ, DISK_BYTES, 512),
        (Cmd.WRITE, SCRATCH, 512),
        (Cmd.FLUSH, 0, 0),
        (Cmd.TRIM, SCRATCH, 512),
        (Cmd.WRITE_ZEROES, SCRATCH, 512),
        (Cmd.BLOCK_STATUS, 0, 512),
        (Cmd.CACHE, 0, 512),
        (99, 0, 0),
    ):
        answer = try_command(plain, command, offset, length)
        assert answer.was_simple, (command, answer)


def test_replies_carry_the_requests_cookie_whatever_it_is(disk: Client) -> None:
    for cookie in (0, 1, 2**63, 2**64 - 1, SIMPLE_REPLY_MAGIC << 32, 0x2560951300000000):
        assert disk.call(Cmd.READ, 0, 512, cookie=cookie).cookie == cookie
        assert disk.call(Cmd.READ, DISK_BYTES, 512, cookie=cookie).cookie == cookie
        assert disk.call(Cmd.FLUSH, cookie=cookie).cookie == cookie


def test_replies_of_many_requests_go_to_their_own_cookies(disk: Client) -> None:
    rng = random.Random(3)
    wanted = {}
    for _ in range(100):
        offset = rng.randrange(CONTENT_BYTES - 4096)
        length = rng.randrange(1, 4096)
        wanted[disk.request(Cmd.READ, offset, length)] = CONTENT[offset : offset + length]
    found = disk.answers(len(wanted))
    assert {cookie: answer.data for cookie, answer in found.items()} == wanted


# --- Ordering of messages and writes ---


def test_ordering_a_flush_and_fua_are_accepted_and_what_they_cover_is_there(
    disk: Client, connect: Connect
) -> None:
    assert disk.flags & Flag.SEND_FLUSH
    assert disk.flags & Flag.SEND_FUA
    at = SCRATCH + 4096
    assert not disk.call(Cmd.WRITE, at, payload=b"first".ljust(512)).error
    assert not disk.call(Cmd.FLUSH).error
    assert not disk.call(Cmd.WRITE, at + 512, flags=CmdFlag.FUA, payload=b"next".ljust(512)).error
    other = connect()
    other.go("disk")
    assert other.read(at, 1024) == b"first".ljust(512) + b"next".ljust(512)


# --- Simple reply message ---


def test_simple_reply_with_an_error_has_no_data(plain: Client) -> None:
    refused = plain.request(Cmd.READ, DISK_BYTES, 4096)
    read = plain.request(Cmd.READ, 0, 16)
    answers = plain.answers(2)
    assert (answers[refused].error, answers[refused].data) == (Err.EINVAL, b"")
    assert answers[read].data == CONTENT[:16]


# --- Terminating the transmission phase, NBD_CMD_DISC ---


def test_disc_closes_without_a_reply(disk: Client) -> None:
    disk.request(Cmd.DISC)
    assert disk.closed()


def test_disc_comes_after_what_is_outstanding(disk: Client) -> None:
    cookies = [disk.request(Cmd.READ, 0, 64 << 10) for _ in range(20)]
    disk.request(Cmd.DISC)
    answers = disk.answers(len(cookies))
    assert sorted(answers) == cookies
    assert all(answer.data == CONTENT[: 64 << 10] for answer in answers.values())
    assert disk.closed()


def test_disc_ends_what_comes_behind_it_unheard(disk: Client, connect: Connect) -> None:
    at = SCRATCH + 8192
    probe = connect()
    probe.go("disk")
    assert not probe.call(Cmd.WRITE_ZEROES, at, 512).error
    late = disk.header(Cmd.WRITE, at, 512) + b"x" * 512
    disk.send(disk.header(Cmd.DISC) + late)
    assert disk.closed()
    assert probe.read(at, 512) == bytes(512)


def test_errors_never_end_transmission(disk: Client) -> None:
    for _ in range(20):
        assert disk.call(Cmd.READ, DISK_BYTES, 1).error
        assert disk.call(1234).error
        assert try_command(disk, Cmd.WRITE, DISK_BYTES, 512).error
        assert disk.call(Cmd.READ, 0, 512, flags=0x8000).error
        assert disk.call(Cmd.READ, 0, PAYLOAD_BYTES_PORTABLE + 1).error
    assert disk.alive()


def test_a_violated_magic_ends_that_connection_alone(disk: Client, connect: Connect) -> None:
    other = connect()
    other.go("disk")
    disk.send(b"\0" * len(disk.header(Cmd.READ)))
    assert disk.closed()
    assert other.alive()


# --- Size constraints ---


def block_sizes(client: Client) -> tuple[int, int, int]:
    """Minimum, preferred, maximum payload."""
    sizes: tuple[int, int, int] = struct.unpack(
        ">III", client.info("disk", Info.BLOCK_SIZE)[Info.BLOCK_SIZE]
    )
    return sizes


def test_sizes_that_are_advertised_make_sense(client: Client) -> None:
    minimum, preferred, maximum = block_sizes(client)
    assert minimum & (minimum - 1) == 0 < minimum <= 1 << 16
    assert preferred & (preferred - 1) == 0
    assert preferred >= max(minimum, 512)
    assert maximum >= max(preferred, MIB)
    assert DISK_BYTES % minimum == 0


def test_sizes_by_default_are_any_byte_and_32_mib(disk: Client) -> None:
    assert disk.read(3, 1) == CONTENT[3:4]
    assert disk.read(511, 2) == CONTENT[511:513]
    assert not disk.call(Cmd.WRITE, SCRATCH + 1, payload=b"odd").error
    assert disk.read(SCRATCH + 1, 3) == b"odd"
    assert len(disk.read(1, PAYLOAD_BYTES_PORTABLE)) == PAYLOAD_BYTES_PORTABLE


@pytest.mark.slow
def test_sizes_up_to_32_mib_are_no_attack(disk: Client) -> None:
    at = DISK_BYTES - PAYLOAD_BYTES_PORTABLE
    payload = random.Random(9).randbytes(4096) * (PAYLOAD_BYTES_PORTABLE // 4096)
    assert not disk.call(Cmd.WRITE, at, payload=payload).error
    assert disk.read(at, PAYLOAD_BYTES_PORTABLE) == payload
    assert not disk.call(Cmd.WRITE_ZEROES, at, PAYLOAD_BYTES_PORTABLE).error


@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.WRITE_ZEROES])
def test_sizes_of_commands_without_payload_may_be_larger(disk: Client, command: int) -> None:
    length = PAYLOAD_BYTES_PORTABLE + 4096
    answer = disk.call(command, DISK_BYTES - length, length)
    assert answer.error in (Err.OK, Err.EOVERFLOW, Err.EINVAL)
    assert disk.alive()


@pytest.mark.parametrize("command", RANGED)
def test_ranges_past_the_end_are_refused_by_their_own_error(disk: Client, command: int) -> None:
    expected = Err.ENOSPC if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Err.EINVAL
    last = DISK_BYTES - 512
    for offset, length in ((DISK_BYTES, 512), (last, 1024), (2**64 - 512, 1024), (2**63, 1)):
        assert try_command(disk, command, offset, length).error == expected
    assert disk.alive()


# --- Command flags ---


def test_flag_fua_is_accepted_with_all_commands(disk: Client) -> None:
    assert not disk.call(Cmd.FLUSH, flags=CmdFlag.FUA).error
    for command in RANGED:
        assert not try_command(disk, command, SCRATCH, 512, CmdFlag.FUA).error


def test_flag_no_hole_is_supported(disk: Client) -> None:
    assert disk.flags & Flag.SEND_WRITE_ZEROES
    at = SCRATCH + 65536
    assert not disk.call(Cmd.WRITE, at, payload=b"x" * 4096).error
    assert not disk.call(Cmd.WRITE_ZEROES, at, 4096, flags=CmdFlag.NO_HOLE).error
    assert disk.read(at, 4096) == bytes(4096)


KNOWN = {
    Cmd.READ: CmdFlag.FUA | CmdFlag.DF,
    Cmd.WRITE: CmdFlag.FUA | CmdFlag.PAYLOAD_LEN,
    Cmd.TRIM: CmdFlag.FUA,
    Cmd.FLUSH: CmdFlag.FUA,
    Cmd.WRITE_ZEROES: CmdFlag.FUA | CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
    Cmd.CACHE: CmdFlag.FUA,
    Cmd.BLOCK_STATUS: CmdFlag.FUA | CmdFlag.REQ_ONE | CmdFlag.PAYLOAD_LEN,
}


def test_flags_that_a_command_doesnt_know_are_invalid(disk: Client) -> None:
    for command, known in KNOWN.items():
        offset, length = (0, 0) if command == Cmd.FLUSH else (SCRATCH, 512)
        for flag in (1 << bit for bit in range(16)):
            # With a payload announced it is another kind of request; test_extended.py has those.
            if not flag & (known | CmdFlag.PAYLOAD_LEN):
                answer = try_command(disk, command, offset, length, flag)
                assert answer.error == Err.EINVAL, (command, flag)
    assert disk.alive()


@pytest.mark.parametrize("flag", [CmdFlag.DF, CmdFlag.PAYLOAD_LEN])
def test_flags_that_werent_negotiated_are_invalid(plain: Client, flag: int) -> None:
    assert plain.call(Cmd.READ, 0, 512, flags=flag).error == Err.EINVAL
    assert plain.alive()


# --- Error values ---


def test_unknown_commands_are_invalid(disk: Client) -> None:
    for command in (9, 10, 100, 0x7FFF, 0xFFFF):
        assert disk.call(command, 0, 512).error == Err.EINVAL
    assert disk.alive()


def test_writing_to_a_read_only_export_is_not_permitted(locked: Client) -> None:
    assert locked.flags & Flag.READ_ONLY
    for command in WRITING:
        assert try_command(locked, command, 0, 512).error == Err.EPERM
    assert locked.read(0, 512) == CONTENT[:512]


def test_error_values_are_those_of_the_document(disk: Client, locked: Client) -> None:
    known = set(Err)
    for client in (disk, locked):
        for command in range(12):
            for offset, length, flags in ((0, 512, 0), (DISK_BYTES, 1, 0), (0, 512, 0xF800)):
                if command == Cmd.DISC:
                    continue
                answer = try_command(client, command, offset + SCRATCH, length, flags)
                assert answer.error in known
                assert answer.error not in (Err.ENOMEM, Err.EOVERFLOW, Err.ENOTSUP)


def test_block_status_without_a_context_is_invalid(disk: Client) -> None:
    assert disk.call(Cmd.BLOCK_STATUS, 0, 4096).error == Err.EINVAL
    assert disk.alive()


def test_the_server_is_well(server: ProtocolServer) -> None:
    server.assert_well()
