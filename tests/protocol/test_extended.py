# SPDX-License-Identifier: Apache-2.0
"""Extended headers: what they add to structured replies. Source: the document's extension of that
name, section "NBD_OPT_EXTENDED_HEADERS" and what it says elsewhere."""

from __future__ import annotations

import pytest

from tests.protocol.client import EXTENDED, STRUCTURED, Client
from tests.protocol.conftest import CONTENT, DISK_BYTES, MIB, SCRATCH, Connect
from tests.protocol.wire import PAYLOAD_BYTES_PORTABLE, Cmd, CmdFlag, Err, Flag, Opt, Rep

AT = SCRATCH + 3 * MIB


@pytest.fixture
def extended(connect: Connect) -> Client:
    """A connection to "disk" with extended headers."""
    client = connect()
    client.negotiate(EXTENDED)
    client.go("disk")
    return client


def test_extended_headers_are_acknowledged_without_structured_replies(client: Client) -> None:
    assert client.ask(Opt.EXTENDED_HEADERS) == [(Opt.EXTENDED_HEADERS, Rep.ACK, b"")]


def test_extended_headers_take_precedence_over_structured_replies(client: Client) -> None:
    assert client.outcome(Opt.STRUCTURED_REPLY) == Rep.ACK
    client.negotiate(EXTENDED)
    client.go("disk")
    assert client.read(0, 512) == CONTENT[:512]


def test_structured_replies_after_extended_headers_are_refused(client: Client) -> None:
    client.negotiate(EXTENDED)
    assert client.outcome(Opt.STRUCTURED_REPLY) == Rep.ERR_EXT_HEADER_REQD
    client.go("disk")
    assert client.read(0, 512) == CONTENT[:512]


def test_extended_replies_answer_everything_and_name_the_requests_offset(
    extended: Client,
) -> None:
    for command, offset, length in (
        (Cmd.READ, 512, 4096),
        (Cmd.READ, DISK_BYTES, 1),
        (Cmd.FLUSH, 0, 0),
        (Cmd.TRIM, AT, 4096),
        (Cmd.WRITE_ZEROES, AT, 4096),
        (Cmd.CACHE, AT, 4096),
        (Cmd.BLOCK_STATUS, AT, 4096),
        (99, AT, 0),
    ):
        answer = extended.call(command, offset, length)
        assert not answer.was_simple
        assert {chunk.offset for chunk in answer.chunks} == {offset}
    written = extended.call(Cmd.WRITE, AT, payload=b"x" * 512)
    assert not written.was_simple
    assert {chunk.offset for chunk in written.chunks} == {AT}


def test_effect_lengths_may_have_64_bits(extended: Client) -> None:
    for command in (Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.READ):
        error = extended.call(command, 0, 1 << 40).error
        assert error in (Err.EINVAL, Err.ENOSPC, Err.EOVERFLOW)
        # Its low 32 bits alone would have been a good request.
        assert extended.call(command, AT, (1 << 32) + 512).error
    assert extended.alive()


def test_write_needs_its_payload_flag(extended: Client) -> None:
    """Without the flag there is no payload, and nothing to write."""
    cookie = 77
    extended.send(extended.header(Cmd.WRITE, AT, 512, cookie=cookie))
    assert extended.answers(1)[cookie].error == Err.EINVAL
    assert extended.alive()


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.FLUSH, 55])
def test_payload_that_isnt_expected_is_consumed_and_invalid(extended: Client, command: int) -> None:
    for length in (1, 512, 100_000, 5 * MIB):
        payload = (b"\x21\xe4\x1c\x71" * (length // 4 + 1))[:length]
        answer = extended.call(command, 0, flags=CmdFlag.PAYLOAD_LEN, payload=payload)
        assert answer.error == Err.EINVAL
        assert extended.alive()


def test_payload_longer_than_the_maximum_disconnects(extended: Client) -> None:
    """A length of 64 bits is no reason to read for a year."""
    flags = CmdFlag.PAYLOAD_LEN
    extended.send(extended.header(Cmd.WRITE, AT, 1 << 50, flags=flags, cookie=1))
    extended.rest()


def test_block_status_payload_that_isnt_offered_is_consumed_and_invalid(extended: Client) -> None:
    assert not extended.flags & Flag.BLOCK_STATUS_PAYLOAD
    answer = extended.call(
        Cmd.BLOCK_STATUS, 0, flags=CmdFlag.PAYLOAD_LEN, payload=bytes(8) + b"\0\0\0\1"
    )
    assert answer.error == Err.EINVAL
    assert extended.alive()


@pytest.mark.parametrize("style", ["simple", STRUCTURED])
def test_block_status_payload_needs_extended_headers(connect: Connect, style: str) -> None:
    client = connect()
    client.negotiate(style)
    client.go("disk")
    assert not client.flags & Flag.BLOCK_STATUS_PAYLOAD


def test_extended_headers_never_require_more(client: Client) -> None:
    """GO works with them, and without them."""
    client.go("disk")
    assert client.alive()


def test_extended_write_of_the_maximum_payload_is_taken(extended: Client) -> None:
    at = DISK_BYTES - PAYLOAD_BYTES_PORTABLE
    assert not extended.call(Cmd.WRITE, at, payload=b"m" * PAYLOAD_BYTES_PORTABLE).error
    assert extended.read(DISK_BYTES - 512, 512) == b"m" * 512
