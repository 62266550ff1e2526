# SPDX-License-Identifier: Apache-2.0
"""The reply parser alone: what servers may send, in any pieces, and what they may not."""

from __future__ import annotations

import errno
import itertools
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.nbd.protocol import (
    EXTENDED_REPLY,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    STRUCTURED_REPLY,
    ChunkType,
    Command,
)
from blockemu.drivers.nbd.replies import (
    CHUNKS_MAX,
    EXTENTS_MAX,
    STATUS_BYTES_MAX,
    InFlight,
    ProtocolViolation,
    ReplyParser,
)

CONTEXT = 7
READ, WRITE, STATUS = Command.NBD_CMD_READ, Command.NBD_CMD_WRITE, Command.NBD_CMD_BLOCK_STATUS
DATA = ChunkType.NBD_REPLY_TYPE_OFFSET_DATA
HOLE = ChunkType.NBD_REPLY_TYPE_OFFSET_HOLE
NONE = ChunkType.NBD_REPLY_TYPE_NONE
ERROR = ChunkType.NBD_REPLY_TYPE_ERROR
ERROR_OFFSET = ChunkType.NBD_REPLY_TYPE_ERROR_OFFSET
EXTENTS = ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS
EXTENTS_EXT = ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS_EXT


class Pieces:
    """A socket that hands out `data` in pieces; then its end."""

    def __init__(self, data: bytes, next_size: Callable[[], int]) -> None:
        self.data = data
        self.next_size = next_size

    def recv_into(self, view: memoryview) -> int:
        return self.recvmsg_into([view])[0]

    def recvmsg_into(self, views: list[memoryview]) -> tuple[int]:
        piece = self.data[: self.next_size()]
        total = 0
        for view in views:
            part = piece[total : total + len(view)]
            view[: len(part)] = part
            total += len(part)
        self.data = self.data[total:]
        return (total,)


class Server:
    """One side's requests in flight, and what is sent in answer."""

    def __init__(self, *, structured: bool = True, extended: bool = False) -> None:
        self.requests: dict[int, InFlight] = {}
        self.extended = extended
        self.parser = ReplyParser(
            self.requests,
            structured=structured,
            context=CONTEXT if structured else None,
            extended=extended,
        )
        self.sent = b""

    def asked(self, command: Command, offset: int, length: int) -> InFlight:
        view = memoryview(bytearray(b"?" * length)) if command is READ else None
        cookie = len(self.requests) + 1
        request = InFlight(cookie, command, offset=offset, length=length, view=view)
        self.requests[cookie] = request
        return request

    def simple(self, request: InFlight, error: int = 0, data: bytes = b"") -> Server:
        self.sent += struct.pack(">IIQ", NBD_SIMPLE_REPLY_MAGIC, error, request.cookie) + data
        return self

    def chunk(self, request: InFlight, kind: int, payload: bytes = b"", *, done: bool) -> Server:
        if self.extended:
            self.sent += EXTENDED_REPLY.pack(
                NBD_EXTENDED_REPLY_MAGIC, int(done), kind, request.cookie, request.offset,
                len(payload),
            )  # fmt: skip
        else:
            self.sent += STRUCTURED_REPLY.pack(
                NBD_STRUCTURED_REPLY_MAGIC, int(done), kind, request.cookie, len(payload)
            )
        self.sent += payload
        return self

    def parse(self, next_size: Callable[[], int] = lambda: 1 << 20) -> None:
        pieces = Pieces(self.sent, next_size)
        while self.parser.fill(pieces):  # type: ignore[arg-type]
            self.parser.parse()


def data_at(offset: int, data: bytes) -> bytes:
    return struct.pack(">Q", offset) + data


def content(request: InFlight) -> bytes:
    assert request.view is not None
    return bytes(request.view)


@given(st.data())
def test_replies_in_any_order_and_pieces_are_put_together(data: st.DataObject) -> None:
    """Reads in chunks that are shuffled among each other, cut anywhere: all bytes arrive."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    server = Server(extended=rng.random() < 0.5)
    expected, chunks = [], []
    for _ in range(rng.randrange(1, 5)):
        length = rng.choice((1, 7, 512, 5000, 70_000))
        request = server.asked(READ, rng.randrange(1 << 40), length)
        content_bytes = bytearray(rng.randbytes(length))
        expected.append((request, content_bytes))
        cuts = sorted({0, length, *(rng.randrange(length) for _ in range(rng.randrange(4)))})
        parts = []
        for start, end in itertools.pairwise(cuts):
            if rng.random() < 0.3:
                content_bytes[start:end] = bytes(end - start)
                payload = struct.pack(">QI", request.offset + start, end - start)
                parts.append([request, HOLE, payload, False])
            else:
                payload = data_at(request.offset + start, content_bytes[start:end])
                parts.append([request, DATA, payload, False])
        rng.shuffle(parts)
        if rng.random() < 0.5:
            parts.append([request, NONE, b"", True])
        else:
            parts[-1][3] = True
        chunks.append(parts)
    while chunks:
        parts = rng.choice(chunks)
        request, kind, payload, done = parts.pop(0)
        server.chunk(request, kind, payload, done=done)
        if not parts:
            chunks.remove(parts)
    server.parse(lambda: rng.choice((1, 5, 16, 20, 28, 1000, 100_000)))
    assert not server.requests
    for request, content_bytes in expected:
        assert request.done.done()
        assert request.error is None
        assert content(request) == content_bytes


def test_simple_replies_are_read() -> None:
    server = Server(structured=False)
    read, write, failed = (server.asked(c, 512, 512) for c in (READ, WRITE, READ))
    server.simple(write).simple(failed, errno.ENOSPC).simple(read, 0, b"x" * 512).parse()
    assert content(read) == b"x" * 512
    assert write.error is None
    assert failed.error is not None
    assert failed.error.errno == errno.ENOSPC


def test_an_error_chunk_fails_its_request_alone() -> None:
    server = Server()
    read, other = server.asked(READ, 0, 1000), server.asked(READ, 0, 4)
    server.chunk(read, DATA, data_at(0, b"a" * 500), done=False)
    message = struct.pack(">IH", errno.EIO, 4) + b"soon" + struct.pack(">Q", 500)
    server.chunk(read, ERROR_OFFSET, message, done=False)
    server.chunk(other, DATA, data_at(0, b"good"), done=True)
    server.chunk(read, NONE, done=True).parse()
    assert content(other) == b"good"
    assert other.error is None
    assert read.error is not None
    assert read.error.errno == errno.EIO
    assert "the NBD server says 'soon'" in str(read.error)


def test_an_error_that_isnt_known_is_einval() -> None:
    server = Server()
    write = server.asked(WRITE, 0, 1)
    server.simple(write, 9999).parse()
    assert write.error is not None
    assert write.error.errno == errno.EINVAL
    assert "9999" in str(write.error)


def test_block_status_is_read() -> None:
    server = Server()
    status = server.asked(STATUS, 0, 4096)
    server.chunk(status, EXTENTS, struct.pack(">IIIII", CONTEXT, 512, 3, 8, 0), done=True).parse()
    assert status.extents == [(512, 3), (8, 0)]


@pytest.mark.parametrize("is_extended", [False, True])
def test_a_long_block_status_is_read_as_far_as_it_is_wanted(is_extended: bool) -> None:
    """Of a hundred thousand extents, those that there is room for; what follows is still found."""
    server = Server(extended=is_extended)
    many, one, other = (server.asked(STATUS, 0, 1 << 30) for _ in range(3))
    one.extents_max = 1
    head = struct.pack(">I", CONTEXT) + (struct.pack(">I", 100_000) if is_extended else b"")
    extents = struct.pack(">QQQQ" if is_extended else ">IIII", 512, 3, 1024, 0) * 50_000
    kind = EXTENTS_EXT if is_extended else EXTENTS
    for request in (many, one, other):
        server.chunk(request, kind, head + extents, done=request is not many)
    server.chunk(many, NONE, done=True)
    server.parse(lambda: 50_001)
    assert many.extents == [(512, 3), (1024, 0)] * (EXTENTS_MAX // 2)
    assert one.extents == [(512, 3)]
    assert not server.requests


def test_block_status_of_64_bits_is_read() -> None:
    server = Server(extended=True)
    status = server.asked(STATUS, 0, 1 << 40)
    payload = struct.pack(">IIQQQQ", CONTEXT, 2, 5 << 33, 3, 8, 0)
    server.chunk(status, EXTENTS_EXT, payload, done=True).parse()
    assert status.extents == [(5 << 33, 3), (8, 0)]


@pytest.mark.parametrize("arrived", [0, 27, 28, 40, 1027])
def test_data_that_nobody_wants_any_more_is_dropped(arrived: int) -> None:
    """The view belongs to somebody else from `give_up` on, and what follows is still found."""
    server = Server()
    read, other = server.asked(READ, 0, 1000), server.asked(READ, 0, 4)
    server.chunk(read, DATA, data_at(0, b"a" * 1000), done=True)
    server.chunk(other, DATA, data_at(0, b"good"), done=True)
    view, rest = read.view, server.sent[arrived:]
    server.sent = server.sent[:arrived]
    server.parse()
    server.parser.give_up(read)
    assert view is not None
    view[:] = b"z" * 1000
    server.sent = rest
    server.parse(lambda: 100)
    assert bytes(view) == b"z" * 1000
    assert content(other) == b"good"
    assert not server.requests


def chunk_of(command: Command, kind: int, payload: bytes, *, done: bool = True) -> Server:
    server = Server()
    return server.chunk(server.asked(command, 1024, 512), kind, payload, done=done)


def extended(command: Command, kind: int, payload: bytes) -> Server:
    server = Server(extended=True)
    return server.chunk(server.asked(command, 1024, 512), kind, payload, done=True)


def extended_length(length: int) -> Server:
    server = extended(READ, DATA, b"")
    server.sent = server.sent[:-8] + struct.pack(">Q", length + 8)
    return server


def extended_elsewhere() -> Server:
    server = extended(WRITE, NONE, b"")
    server.requests[1].offset += 1
    return server


def not_extended(*, simple: bool) -> Server:
    server = Server(extended=True)
    request = server.asked(WRITE, 0, 1)
    if simple:
        return server.simple(request)
    server.extended = False
    return server.chunk(request, NONE, done=True)


def twice() -> Server:
    server = chunk_of(READ, DATA, data_at(1024, b"x" * 100), done=False)
    return server.chunk(server.requests[1], DATA, data_at(1123, b"x"), done=False)


def simple_after_chunk() -> Server:
    server = chunk_of(WRITE, 99 | 1 << 15, struct.pack(">IH", 5, 0), done=False)
    return server.simple(server.requests[1])


def structured_without_agreement() -> Server:
    server = Server(structured=False)
    return server.chunk(server.asked(WRITE, 0, 1), NONE, done=True)


def many_chunks() -> Server:
    server = Server()
    request = server.asked(WRITE, 0, 1)
    server.chunk(request, ERROR, struct.pack(">IH", 5, 0), done=False)
    server.sent *= CHUNKS_MAX + 1
    return server


def unknown_cookie() -> Server:
    return Server().simple(InFlight(9, WRITE, offset=0, length=1, view=None))


def bad_magic() -> Server:
    server = Server()
    server.sent = b"HTTP/1.1 400 Bad Request"
    return server


LIES: dict[str, tuple[str, Callable[[], Server]]] = {
    "magic": ("bad magic number, 0x48545450", bad_magic),
    "cookie": ("wasn't sent", unknown_cookie),
    "simple-read": (
        "against the agreement",
        lambda: (server := Server()).simple(server.asked(READ, 0, 1)),
    ),
    "simple-after-chunk": ("in the middle", simple_after_chunk),
    "structured": ("bad magic number", structured_without_agreement),
    "data-before": ("at 1023", lambda: chunk_of(READ, DATA, data_at(1023, b"x"))),
    "data-behind": ("at 1535", lambda: chunk_of(READ, DATA, data_at(1535, b"xx"))),
    "data-none": ("8 bytes in a data", lambda: chunk_of(READ, DATA, data_at(1024, b""))),
    "data-huge": ("521 bytes in a data", lambda: chunk_of(READ, DATA, data_at(1024, b"x" * 513))),
    "data-for-write": ("sent data for a WRITE", lambda: chunk_of(WRITE, DATA, data_at(1024, b"x"))),
    "data-twice": ("at 1123 twice", twice),
    "data-missing": ("before all data", lambda: chunk_of(READ, DATA, data_at(1024, b"x" * 511))),
    "nothing": ("before all data", lambda: chunk_of(READ, NONE, b"")),
    "none-full": ("isn't empty", lambda: chunk_of(WRITE, NONE, b"x")),
    "none-not-last": ("isn't the last", lambda: chunk_of(WRITE, NONE, b"", done=False)),
    "hole-short": ("a hole in 11 bytes", lambda: chunk_of(READ, HOLE, bytes(11))),
    "hole-empty": ("sent 0 bytes", lambda: chunk_of(READ, HOLE, struct.pack(">QI", 1024, 0))),
    "hole-behind": ("at 1024", lambda: chunk_of(READ, HOLE, struct.pack(">QI", 1024, 513))),
    "status-for-read": ("block status for a READ", lambda: chunk_of(READ, EXTENTS, bytes(12))),
    "status-context": (
        "context 8",
        lambda: chunk_of(STATUS, EXTENTS, struct.pack(">III", 8, 512, 0)),
    ),
    "status-empty": (
        "of no bytes",
        lambda: chunk_of(STATUS, EXTENTS, struct.pack(">III", 7, 0, 0)),
    ),
    "status-none": ("of 4 bytes", lambda: chunk_of(STATUS, EXTENTS, struct.pack(">I", 7))),
    "status-ragged": ("of 13 bytes", lambda: chunk_of(STATUS, EXTENTS, bytes(13))),
    "status-missing": ("without a status", lambda: chunk_of(STATUS, NONE, b"")),
    "ext-simple": ("bad magic number", lambda: not_extended(simple=True)),
    "ext-structured": ("bad magic number", lambda: not_extended(simple=False)),
    "ext-offset": ("with offset 1024 for a WRITE", extended_elsewhere),
    "ext-status-old": ("type 5", lambda: extended(STATUS, EXTENTS, bytes(12))),
    "status-ext": ("type 6", lambda: chunk_of(STATUS, EXTENTS_EXT, bytes(24))),
    "ext-status-count": (
        "1 extents",
        lambda: extended(STATUS, EXTENTS_EXT, struct.pack(">IIQQ", CONTEXT, 2, 512, 0)),
    ),
    "ext-status-none": ("of 8 bytes", lambda: extended(STATUS, EXTENTS_EXT, bytes(8))),
    "ext-status-empty": (
        "of no bytes",
        lambda: extended(STATUS, EXTENTS_EXT, struct.pack(">IIQQ", CONTEXT, 1, 0, 0)),
    ),
    "ext-status-bits": (
        "a state of more than 32 bits",
        lambda: extended(STATUS, EXTENTS_EXT, struct.pack(">IIQQ", CONTEXT, 1, 512, 1 << 32)),
    ),
    "ext-huge": ("9223372036854775816 bytes", lambda: extended_length(1 << 63)),
    "error-short": ("an error in 5 bytes", lambda: chunk_of(READ, ERROR, bytes(5))),
    "error-zero": ("error 0", lambda: chunk_of(READ, ERROR, bytes(6))),
    "error-long": (
        "message of 9 bytes",
        lambda: chunk_of(READ, ERROR, struct.pack(">IH", 5, 9) + b"short"),
    ),
    "type": ("type 77", lambda: chunk_of(READ, 77, b"")),
    "type-huge": ("65537 bytes", lambda: chunk_of(READ, ERROR, bytes(65537))),
    "status-huge": (
        "type 5 with 16777233 bytes",
        lambda: chunk_of(STATUS, EXTENTS, bytes(STATUS_BYTES_MAX + 1)),
    ),
    "status-long": ("block status for a READ", lambda: chunk_of(READ, EXTENTS, bytes(70_000))),
    "many-chunks": ("more than 65536 chunks", many_chunks),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_a_violation_that_says_which(lie: str) -> None:
    said, make = LIES[lie]
    with pytest.raises(ProtocolViolation, match=said):
        make().parse()


@given(st.data())
def test_any_bytes_are_replies_or_a_violation(data: st.DataObject) -> None:
    """Mutated streams: nothing but ProtocolViolation is raised, and views keep their length."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    server = Server(structured=rng.random() < 0.8, extended=rng.random() < 0.3)
    requests = [
        server.asked(command, 4096 * index, 512)
        for index, command in enumerate(rng.choices((READ, WRITE, STATUS), k=4))
    ]
    for request in requests:
        kind = rng.choice((DATA, HOLE, NONE, ERROR, EXTENTS, EXTENTS_EXT, rng.randrange(1 << 16)))
        payload = rng.choice(
            (
                data_at(request.offset, bytes(rng.choice((1, 512)))),
                struct.pack(">QI", request.offset, 512),
                struct.pack(">III", CONTEXT, 512, 0),
                struct.pack(">IIQQ", CONTEXT, 1, 512, 0),
                rng.randbytes(rng.randrange(30)),
            )
        )
        if rng.random() < 0.3:
            server.simple(request, rng.choice((0, 5)), bytes(512))
        else:
            server.chunk(request, kind, payload, done=rng.random() < 0.7)
    mutated = bytearray(server.sent)
    for _ in range(rng.randrange(3)):
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
    server.sent = bytes(mutated)
    try:
        server.parse(lambda: rng.choice((1, 3, 30, 1000)))
    except ProtocolViolation:
        pass
    assert all(request.view is None or len(request.view) == 512 for request in requests)
