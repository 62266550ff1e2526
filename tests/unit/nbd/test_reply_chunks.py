# SPDX-License-Identifier: Apache-2.0
"""Replies in chunks: what a client of structured replies or extended headers gets that one of
simple replies doesn't. Sections of the protocol's document are named in brackets."""

from __future__ import annotations

import errno
import os
import random

import pytest

from blockemu.drivers.nbd.protocol import ChunkType, Command, CommandFlag, NbdError
from blockemu.limits import Limits
from blockemu.nbd.sparse_read import HOLE_BYTES_MIN, HOLES_MAX, SPARSE_BYTES_MIN
from tests.unit.nbd.client import Chunk
from tests.unit.nbd.conftest import DISK_BYTES, Serve, Served

READ = Command.NBD_CMD_READ
WRITE = Command.NBD_CMD_WRITE
FLUSH = Command.NBD_CMD_FLUSH
TRIM = Command.NBD_CMD_TRIM
CACHE = Command.NBD_CMD_CACHE
WRITE_ZEROES = Command.NBD_CMD_WRITE_ZEROES
DF = CommandFlag.NBD_CMD_FLAG_DF
PAYLOAD_LEN = CommandFlag.NBD_CMD_FLAG_PAYLOAD_LEN
NONE = ChunkType.NBD_REPLY_TYPE_NONE
DATA = ChunkType.NBD_REPLY_TYPE_OFFSET_DATA
HOLE = ChunkType.NBD_REPLY_TYPE_OFFSET_HOLE
ERROR = ChunkType.NBD_REPLY_TYPE_ERROR
ERROR_OFFSET = ChunkType.NBD_REPLY_TYPE_ERROR_OFFSET
KIB = 1024
MIB = 1 << 20

in_chunks = pytest.mark.style_only("structured", "extended")
extended_only = pytest.mark.style_only("extended")
both_paths = pytest.mark.parametrize("mapped", [False, True], ids=["graph", "map"])


def chunks(served: Served, command: int, **fields: int) -> list[Chunk]:
    """The reply to a request without payload, by the chunk."""
    served.client.request(command, cookie=0xABCD, **fields)
    found = [served.client.chunk()]
    while not found[-1].done:
        found.append(served.client.chunk())
    for chunk in found:
        assert chunk.cookie == 0xABCD
        if served.client.style == "extended":
            assert chunk.offset == fields.get("offset", 0)
    return found


def kinds(found: list[Chunk]) -> list[int]:
    return [chunk.kind for chunk in found]


def hole(found: Chunk) -> tuple[int, int]:
    """Where a hole is, and how long."""
    assert found.kind == HOLE
    assert len(found.payload) == 12
    return int.from_bytes(found.payload[:8], "big"), int.from_bytes(found.payload[8:], "big")


def alive(served: Served) -> bool:
    """The connection still answers."""
    served.client.request(READ, cookie=9, offset=0, length=1)
    return served.client.reply(1)[:2] == (9, 0)


# --- READ without holes ["NBD_CMD_READ"] ---


@in_chunks
@both_paths
@pytest.mark.parametrize("flags", [0, DF])
def test_read_is_one_chunk(serve: Serve, mapped: bool, flags: int) -> None:
    served = serve(mapped=mapped)
    served.backend.disk[:] = content = random.Random(1).randbytes(DISK_BYTES)
    (chunk,) = chunks(served, READ, flags=flags, offset=4096, length=MIB)
    assert chunk.kind == DATA
    assert int.from_bytes(chunk.payload[:8], "big") == 4096
    assert chunk.payload[8:] == content[4096 : 4096 + MIB]


@in_chunks
def test_read_of_no_bytes_is_no_content_chunk(serve: Serve) -> None:
    """Which would have to describe at least one byte; and a simple reply to a READ is forbidden."""
    served = serve()
    (chunk,) = chunks(served, READ, offset=4096)
    assert (chunk.kind, chunk.payload) == (NONE, b"")


@pytest.mark.style_only("simple")
def test_df_without_chunks_is_refused(serve: Serve) -> None:
    served = serve()
    served.client.request(READ, flags=DF, length=512)
    assert served.client.reply()[1] == NbdError.NBD_EINVAL


@in_chunks
@pytest.mark.parametrize("command", [FLUSH, TRIM, WRITE_ZEROES, CACHE])
def test_df_is_for_reads(serve: Serve, command: int) -> None:
    served = serve()
    (chunk,) = chunks(served, command, flags=DF)
    assert chunk.error[0] == NbdError.NBD_EINVAL


# --- errors ["NBD_REPLY_TYPE_ERROR", "Error values"] ---


@in_chunks
@pytest.mark.parametrize(
    ("command", "fields", "error", "words"),
    [
        (READ, {"flags": 1 << 9}, NbdError.NBD_EINVAL, "flags 0x200 don't go with READ"),
        (99, {}, NbdError.NBD_EINVAL, "no command 99"),
        (FLUSH, {"length": 1}, NbdError.NBD_EINVAL, "FLUSH has neither"),
        (READ, {"length": 33 * MIB}, NbdError.NBD_EOVERFLOW, "at most 33554432"),
    ],
)
def test_error_names_its_reason(
    serve: Serve, command: int, fields: dict[str, int], error: int, words: str
) -> None:
    served = serve()
    (chunk,) = chunks(served, command, **fields)
    value, text, at = chunk.error
    assert value == error
    assert words in text
    assert at is None


@in_chunks
def test_error_of_a_read_only_export_names_it(serve: Serve) -> None:
    served = serve(read_only=True)
    (chunk,) = chunks(served, TRIM, length=512)
    assert chunk.error == (NbdError.NBD_EPERM, "export 'disk' is read-only", None)


@in_chunks
@pytest.mark.parametrize("command", [READ, TRIM, CACHE, WRITE_ZEROES])
@pytest.mark.parametrize("offset", [DISK_BYTES - 100, DISK_BYTES, DISK_BYTES + 512])
def test_error_past_the_end_says_where_in_the_request(
    serve: Serve, command: int, offset: int
) -> None:
    served = serve()
    (chunk,) = chunks(served, command, offset=offset, length=512)
    value, text, at = chunk.error
    zeroes = command == WRITE_ZEROES
    assert value == (NbdError.NBD_ENOSPC if zeroes else NbdError.NBD_EINVAL)
    assert "past the end" in text
    assert at == max(offset, DISK_BYTES)


@in_chunks
@both_paths
def test_error_of_the_graph_travels_with_its_text(serve: Serve, mapped: bool) -> None:
    served = serve(mapped=mapped)
    served.backend.file.behaviour = "error"
    served.backend.errors["preadv"] = OSError(errno.EIO, "the head crashed (sector 7)")
    (chunk,) = chunks(served, READ, length=512)
    assert chunk.error == (NbdError.NBD_EIO, "the head crashed (sector 7)", None)


@in_chunks
def test_error_text_is_a_string_that_the_document_allows(serve: Serve) -> None:
    """At most 4096 bytes of UTF-8, no NUL ["Conventions"]."""
    served = serve()
    served.backend.errors["flush"] = OSError(errno.EIO, "a\0b" + "ä" * 5000)
    (chunk,) = chunks(served, FLUSH)
    text = chunk.error[1]
    assert "\0" not in text
    assert 4090 < len(text.encode()) <= 4096


@pytest.mark.parametrize("command", [READ, TRIM, WRITE_ZEROES, FLUSH])
@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EOVERFLOW])
def test_errors_with_a_meaning_of_their_own_dont_come_from_the_graph(
    serve: Serve, command: int, code: int
) -> None:
    """ENOTSUP and EOVERFLOW say something about FAST_ZERO and about lengths ["Error values"]."""
    served = serve()
    for call in ("preadv", "pdiscard", "pwrite_zeroes", "flush"):
        served.backend.fail(call, code)
    served.client.request(command, length=0 if command == FLUSH else 512)
    assert served.client.reply()[1] == NbdError.NBD_EINVAL


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EOPNOTSUPP])
def test_zeroes_that_arent_fast_are_not_supported(serve: Serve, code: int) -> None:
    """Only a client that asked for fast ones hears of it ["NBD_CMD_WRITE_ZEROES"]."""
    served = serve()
    served.backend.fail("pwrite_zeroes", code)
    served.client.request(WRITE_ZEROES, flags=CommandFlag.NBD_CMD_FLAG_FAST_ZERO, length=512)
    assert served.client.reply()[1] == NbdError.NBD_ENOTSUP


# --- READs around holes ["NBD_REPLY_TYPE_OFFSET_HOLE"] ---


@in_chunks
def test_hole_in_the_middle_of_a_read_is_a_chunk(serve: Serve) -> None:
    served = serve()
    content = random.Random(2).randbytes(MIB)
    served.backend.disk[:MIB] = content
    served.backend.zeroes = [(256 * KIB, 512 * KIB)]
    first, middle, last = chunks(served, READ, offset=512, length=MIB - 1024)
    assert [first.kind, middle.kind, last.kind] == [DATA, HOLE, DATA]
    assert first.payload == (512).to_bytes(8, "big") + content[512 : 256 * KIB]
    assert hole(middle) == (256 * KIB, 512 * KIB)
    assert last.payload == (768 * KIB).to_bytes(8, "big") + content[768 * KIB : MIB - 512]
    read = [call for call in served.backend.calls if call[0] == "preadv"]
    assert read == [("preadv", 512, 256 * KIB - 512), ("preadv", 768 * KIB, 256 * KIB - 512)]


@in_chunks
def test_read_of_nothing_but_a_hole_is_one_chunk_and_no_io(serve: Serve) -> None:
    served = serve()
    served.backend.zeroes = [(0, DISK_BYTES)]
    (chunk,) = chunks(served, READ, offset=4096, length=MIB)
    assert hole(chunk) == (4096, MIB)
    assert [call[0] for call in served.backend.calls] == ["known_zeroes"]
    served.client.request(READ, cookie=1, length=MIB)
    assert served.client.reply(MIB) == (1, 0, bytes(MIB))


@pytest.mark.parametrize("flags", [0, DF])
def test_a_client_that_cant_have_holes_gets_none(serve: Serve, style: str, flags: int) -> None:
    served = serve()
    served.backend.zeroes = [(0, DISK_BYTES)]
    if style == "simple":
        served.client.request(READ, cookie=1, length=MIB)
        assert served.client.reply(MIB) == (1, 0, bytes(MIB))
    else:
        found = chunks(served, READ, flags=flags, length=MIB)
        assert kinds(found) == [DATA if flags else HOLE]


@in_chunks
def test_small_reads_arent_looked_at_for_holes(serve: Serve) -> None:
    served = serve()
    served.backend.zeroes = [(0, DISK_BYTES)]
    (chunk,) = chunks(served, READ, length=SPARSE_BYTES_MIN - 1)
    assert chunk.kind == DATA
    assert [call[0] for call in served.backend.calls] == ["preadv"]


@in_chunks
def test_what_the_graph_doesnt_know_for_free_isnt_asked(serve: Serve) -> None:
    served = serve()
    (chunk,) = chunks(served, READ, length=MIB)
    assert chunk.kind == DATA
    assert [call[0] for call in served.backend.calls] == ["preadv"]


@in_chunks
def test_number_of_chunks_is_bounded(serve: Serve) -> None:
    length = 2 * (HOLES_MAX + 10) * HOLE_BYTES_MIN
    served = serve(length_bytes=length)
    served.backend.disk[:] = b"x" * length
    served.backend.zeroes = [(at, HOLE_BYTES_MIN) for at in range(0, length, 2 * HOLE_BYTES_MIN)]
    for at, size in served.backend.zeroes:
        served.backend.disk[at : at + size] = bytes(size)
    served.client.request(READ, cookie=3, length=length)
    assert served.client.reply(length) == (3, 0, bytes(served.backend.disk))
    found = chunks(served, READ, length=length)
    assert kinds(found).count(HOLE) == HOLES_MAX
    assert kinds(found).count(DATA) == HOLES_MAX


@in_chunks
def test_piece_that_fails_says_where(serve: Serve) -> None:
    served = serve()
    served.backend.zeroes = [(0, 256 * KIB)]
    served.backend.fail("preadv", errno.EIO)
    (chunk,) = chunks(served, READ, length=MIB)
    assert chunk.error == (NbdError.NBD_EIO, os.strerror(errno.EIO), 256 * KIB)
    assert alive(served) is False  # the disk still fails
    served.backend.errors.clear()
    assert alive(served)


@in_chunks
def test_replies_of_several_chunks_survive_a_client_that_is_slow(serve: Serve) -> None:
    """Partial sends in the middle of pieces of one buffer, with others behind them."""
    served = serve(limits=Limits(unsent_bytes_max=64 * MIB, in_flight_bytes_max=64 * MIB))
    content = random.Random(3).randbytes(DISK_BYTES)
    served.backend.disk[:] = content
    served.backend.zeroes = [(at, 64 * KIB) for at in range(64 * KIB, DISK_BYTES, 192 * KIB)]
    for at, size in served.backend.zeroes:
        served.backend.disk[at : at + size] = bytes(size)
    asked = b"".join(
        served.client.header(READ, cookie=i, offset=i * 4096, length=MIB) for i in range(12)
    )
    served.client.send(asked)
    served.client.rounds()
    for _ in range(12):
        served.client.rounds(1)
        cookie, error, data = served.client.reply(MIB)
        assert not error
        assert data == served.backend.disk[cookie * 4096 : cookie * 4096 + MIB]


# --- extended headers ["Request message"] ---


@extended_only
def test_write_without_payload_len_is_refused_and_has_no_payload(serve: Serve) -> None:
    served = serve()
    served.client.send(
        served.client.header(WRITE, length=4096).replace(b"\0\x20\0\x01", b"\0\0\0\x01", 1)
    )
    assert served.client.reply()[1] == NbdError.NBD_EINVAL
    assert "PAYLOAD_LEN" in served.client.text
    assert alive(served)


@extended_only
@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 7, 99])
@pytest.mark.parametrize("length", [1, 64 * KIB, 64 * KIB + 1, MIB])
def test_payload_that_nobody_asked_for_is_dropped(serve: Serve, command: int, length: int) -> None:
    served = serve()
    served.client.request(
        command, flags=PAYLOAD_LEN, payload=b"\x25\x60\x95\x13" * (length // 4 + 1)
    )
    assert served.client.reply()[1] == NbdError.NBD_EINVAL
    assert alive(served)
    assert not served.backend.calls or served.backend.calls == [("preadv", 0, 1)]


@pytest.mark.style_only("simple", "structured")
def test_payload_len_without_extended_headers_is_a_flag_like_any_other(serve: Serve) -> None:
    served = serve()
    served.client.request(TRIM, flags=PAYLOAD_LEN, length=4096)
    assert served.client.reply()[1] == NbdError.NBD_EINVAL
    served.client.request(WRITE, flags=PAYLOAD_LEN, payload=b"x" * 4096)
    assert served.client.reply()[1] == NbdError.NBD_EINVAL
    assert alive(served)


@extended_only
@pytest.mark.parametrize("command", [READ, TRIM, WRITE_ZEROES, CACHE])
@pytest.mark.parametrize("length", [2**32, 2**63, 2**64 - 1])
def test_length_of_64_bits_is_read_whole(serve: Serve, command: int, length: int) -> None:
    served = serve()
    served.client.request(command, offset=1, length=length)
    error = served.client.reply()[1]
    if command == READ:
        assert error == NbdError.NBD_EOVERFLOW
    else:
        assert error in (NbdError.NBD_EINVAL, NbdError.NBD_ENOSPC)
        assert f"{length} bytes at 1" in served.client.text
    assert alive(served)


@extended_only
def test_header_of_the_other_style_ends_the_connection(serve: Serve) -> None:
    served = serve()
    served.client.style = "simple"
    served.client.send(served.client.header(READ, length=1) + bytes(4))
    assert served.client.hung_up()
    served.until_closed()
