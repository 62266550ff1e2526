# SPDX-License-Identifier: Apache-2.0
"""Structured replies, and extended ones where they are alike: each rule about chunks.

Sections "Structured reply chunk message", "Structured reply flags", "Structured reply types",
"NBD_CMD_READ", "NBD_OPT_STRUCTURED_REPLY".
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.protocol.client import EXTENDED, STRUCTURED, Answer, Client, info_data
from tests.protocol.conftest import (
    CONTENT,
    DISK_BYTES,
    SCRATCH,
    SPARSE_BYTES,
    SPARSE_STEP,
    Connect,
    ProtocolServer,
)
from tests.protocol.wire import (
    DONE,
    PAYLOAD_BYTES_PORTABLE,
    STRING_BYTES_MAX,
    Chunk,
    Cmd,
    CmdFlag,
    Err,
    Flag,
    Opt,
    Rep,
)

CHUNKED = [STRUCTURED, EXTENDED]


@pytest.fixture(params=CHUNKED)
def chunked(request: pytest.FixtureRequest, server: ProtocolServer) -> Iterator[Client]:
    """A connection to "disk" whose replies come in chunks."""
    with Client.entered(server.socket_path, "disk", style=request.param) as client:
        yield client


@pytest.fixture(params=CHUNKED)
def sparse(request: pytest.FixtureRequest, server: ProtocolServer) -> Iterator[Client]:
    """The same to "sparse"."""
    with Client.entered(server.socket_path, "sparse", style=request.param) as client:
        yield client


def sparse_content(offset: int, length: int) -> bytes:
    """What "sparse" holds."""
    whole = (b"\1" * SPARSE_STEP + bytes(SPARSE_STEP)) * (SPARSE_BYTES // (2 * SPARSE_STEP))
    return whole[offset : offset + length]


def check_chunks(answer: Answer, offset: int, length: int) -> None:
    """The rules for every answer in chunks to a request for this range."""
    assert answer.chunks, answer
    assert [chunk.flags for chunk in answer.chunks[:-1]] == [0] * (len(answer.chunks) - 1)
    assert answer.chunks[-1].flags == DONE
    covered: list[tuple[int, int]] = []
    for chunk in answer.chunks:
        if chunk.kind == Chunk.NONE:
            assert not chunk.payload
            assert chunk.flags == DONE
        elif chunk.is_content:
            if chunk.kind == Chunk.OFFSET_HOLE:
                assert len(chunk.payload) == 12
            start, data = chunk.content()
            assert data, "a chunk of nothing"
            assert offset <= start < start + len(data) <= offset + length
            assert all(start >= b or start + len(data) <= a for a, b in covered), "they overlap"
            covered.append((start, start + len(data)))
        elif chunk.is_error:
            check_error(chunk.payload, chunk.kind)
            if chunk.kind == Chunk.ERROR_OFFSET:
                assert offset <= chunk.error_offset() < offset + length
        else:
            pytest.fail(f"{chunk} isn't an answer to this")
    errors = [chunk for chunk in answer.chunks if chunk.is_error]
    assert sum(chunk.kind == Chunk.ERROR for chunk in errors) <= 1
    if not errors and length and covered:
        assert sum(end - start for start, end in covered) == length


def check_error(payload: bytes, kind: int) -> None:
    """An error chunk's payload."""
    tail = 8 if kind == Chunk.ERROR_OFFSET else 0
    assert len(payload) >= 6 + tail
    assert int.from_bytes(payload[:4], "big") in set(Err) - {Err.OK}
    length = int.from_bytes(payload[4:6], "big")
    assert length == len(payload) - 6 - tail
    assert length <= STRING_BYTES_MAX
    assert "\0" not in payload[6 : 6 + length].decode()


# --- NBD_OPT_STRUCTURED_REPLY ---


@pytest.mark.parametrize("option", [Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS])
@pytest.mark.parametrize("data", [b"\0", b"please", bytes(9000)])
def test_asking_for_chunks_with_data_is_invalid(client: Client, option: int, data: bytes) -> None:
    assert client.outcome(option, data) == Rep.ERR_INVALID
    client.go("disk")
    assert client.call(Cmd.READ, 0, 512).was_simple


def test_structured_replies_are_acknowledged_and_used(connect: Connect) -> None:
    client = connect()
    assert client.ask(Opt.STRUCTURED_REPLY) == [(Opt.STRUCTURED_REPLY, Rep.ACK, b"")]
    client.style = STRUCTURED
    client.go("disk")
    assert not client.call(Cmd.READ, 0, 512).was_simple


def test_structured_replies_work_after_export_name(connect: Connect) -> None:
    client = connect()
    client.negotiate(STRUCTURED)
    client.export_name("disk")
    assert client.flags & Flag.SEND_DF
    assert not client.call(Cmd.READ, 0, 512).was_simple


def test_structured_replies_agreed_on_after_info_are_in_the_flags_of_go(client: Client) -> None:
    client.info("disk")
    client.negotiate(STRUCTURED)
    client.go("disk")
    assert client.flags & Flag.SEND_DF


@pytest.mark.parametrize("style", CHUNKED)
def test_flag_df_is_set_where_df_is_supported(connect: Connect, style: str) -> None:
    client = connect()
    client.negotiate(style)
    client.go("disk")
    supported = not client.call(Cmd.READ, 0, 512, flags=CmdFlag.DF).error
    assert bool(client.flags & Flag.SEND_DF) == supported


# --- Structured reply chunk message, flags, types ---


def test_chunks_answer_a_read_even_if_it_fails_early(chunked: Client) -> None:
    for offset, length, flags in (
        (0, 512, 0),
        (DISK_BYTES, 512, 0),
        (0, 512, 0x8000),
        (0, PAYLOAD_BYTES_PORTABLE + 1, 0),
        (0, 0, 0),
    ):
        assert not chunked.call(Cmd.READ, offset, length, flags=flags).was_simple


def test_chunks_carry_errors_with_a_text(chunked: Client) -> None:
    for command, offset, length, flags in (
        (Cmd.READ, DISK_BYTES, 512, 0),
        (Cmd.READ, 0, 512, 0x8000),
        (Cmd.TRIM, DISK_BYTES, 512, 0),
        (Cmd.WRITE_ZEROES, DISK_BYTES, 512, 0),
        (77, 0, 0, 0),
    ):
        answer = chunked.call(command, offset, length, flags=flags)
        assert not answer.was_simple
        check_chunks(answer, offset, length)
        [error] = [chunk for chunk in answer.chunks if chunk.is_error]
        assert error.error()[1], "no text"


def test_chunks_of_any_request_keep_the_rules(chunked: Client) -> None:
    rng = random.Random(4)
    for _ in range(150):
        command = rng.choice([Cmd.READ, Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES, 50])
        offset = rng.choice([rng.randrange(DISK_BYTES), DISK_BYTES - 512]) | SCRATCH
        length = rng.randrange(100_000)
        payload = bytes(length) if command == Cmd.WRITE else b""
        answer = chunked.call(command, offset, length, payload=payload)
        if not answer.was_simple:
            check_chunks(answer, offset, length)


def test_chunks_of_plain_data_are_few(chunked: Client) -> None:
    for length in (1, 4096, 64 << 10, 256 << 10):
        answer = chunked.call(Cmd.READ, 0, length)
        check_chunks(answer, 0, length)
        assert len(answer.chunks) <= 2
        assert answer.data == CONTENT[:length]


def test_chunks_interleaved_with_other_replies_stay_whole(chunked: Client) -> None:
    wanted = {}
    for number in range(60):
        offset, length = number * 1000, 30_000 if number % 3 else DISK_BYTES
        wanted[chunked.request(Cmd.READ, offset, length)] = (offset, length)
    for cookie, answer in chunked.answers(len(wanted)).items():
        offset, length = wanted[cookie]
        check_chunks(answer, offset, length)
        expected = b"" if length == DISK_BYTES else CONTENT[offset : offset + length]
        assert answer.data == expected


def test_chunks_have_no_more_data_than_the_maximum_payload(chunked: Client) -> None:
    answer = chunked.call(Cmd.READ, 0, PAYLOAD_BYTES_PORTABLE)
    check_chunks(answer, 0, PAYLOAD_BYTES_PORTABLE)
    assert all(len(chunk.payload) <= PAYLOAD_BYTES_PORTABLE + 8 for chunk in answer.chunks)
    assert answer.data[: len(CONTENT)] == CONTENT


# --- NBD_CMD_READ: holes, DF ---


def test_read_of_data_and_holes_covers_all_of_it(sparse: Client) -> None:
    for offset, length in (
        (0, SPARSE_BYTES),
        (SPARSE_STEP, SPARSE_STEP),
        (SPARSE_STEP - 512, 1024),
        (SPARSE_STEP - 7, 9),
        (3, 3 * SPARSE_STEP + 1),
    ):
        answer = sparse.call(Cmd.READ, offset, length)
        check_chunks(answer, offset, length)
        assert answer.data == sparse_content(offset, length)


def test_read_is_cut_at_multiples_of_512(sparse: Client) -> None:
    answer = sparse.call(Cmd.READ, 0, SPARSE_BYTES)
    for chunk in answer.chunks:
        if chunk.is_content:
            start, data = chunk.content()
            assert start % 512 == len(data) % 512 == 0


def test_read_with_df_is_in_one_chunk_of_data(sparse: Client) -> None:
    for offset, length in ((0, 65536), (SPARSE_STEP - 512, 1024), (SPARSE_STEP, 512), (5, 65536)):
        answer = sparse.call(Cmd.READ, offset, length, flags=CmdFlag.DF)
        check_chunks(answer, offset, length)
        content = [chunk for chunk in answer.chunks if chunk.is_content]
        assert len(content) == 1
        if len(set(sparse_content(offset, length))) > 1:
            assert content[0].kind == Chunk.OFFSET_DATA
        assert answer.data == sparse_content(offset, length)


def test_read_with_df_too_long_for_one_chunk_has_no_content(sparse: Client) -> None:
    answer = sparse.call(Cmd.READ, 0, SPARSE_BYTES, flags=CmdFlag.DF)
    content = [chunk for chunk in answer.chunks if chunk.is_content]
    assert len(content) == (0 if answer.error else 1)
    assert answer.error in (Err.OK, Err.EOVERFLOW)


def test_read_behind_the_acknowledgement_is_heard(connect: Connect) -> None:
    """A client needn't wait for the answer to GO before its first request."""
    client = connect()
    client.negotiate(STRUCTURED)
    client.option(Opt.GO, info_data("disk"))
    cookie = client.request(Cmd.READ, 0, 512)
    while not client.option_reply().is_final:
        pass
    assert client.answers(1)[cookie].data == CONTENT[:512]
