# SPDX-License-Identifier: Apache-2.0
"""Whatever a client sends, in whatever pieces: it is answered or hung up on, and nothing is left.

The streams are mostly sensible, since pure noise dies at the first magic number. The fixtures'
standing checks do half the work: no exception may reach the loop, the server must close without a
client left, and no request may stay in flight. Hypothesis prints the failing example, and how to
replay it.
"""

from __future__ import annotations

import socket
import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockemu.drivers.nbd.protocol import (
    EXTENDED_REPLY,
    IHAVEOPT,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_EXTENDED_REQUEST_MAGIC,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    OPTION,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
)
from blockemu.limits import Limits
from tests.unit.nbd.conftest import DISK_BYTES, Serve, StartServer

KIB = 1024
LIMITS = Limits(
    request_length_max=256 * KIB,
    in_flight_bytes_max=256 * KIB,
    status_reply_bytes_max=64 * KIB,
    discard_length_max=300 * KIB,
    in_flight_requests_max=4,
    round_requests_max=3,
    option_length_max=8 * KIB,
    negotiation_bytes_max=64 * KIB,
)

bounded = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

cuts = st.lists(st.integers(min_value=1, max_value=200_000), min_size=1, max_size=4)


def pieces(stream: bytes, sizes: list[int]) -> list[bytes]:
    """`stream` cut into pieces of these sizes, in turn."""
    cut, turn = [], 0
    while stream:
        size = sizes[turn % len(sizes)]
        # Tiny pieces of a long stream would take a minute.
        size = max(size, len(stream) // 50)
        cut.append(stream[:size])
        stream, turn = stream[size:], turn + 1
    return cut


@st.composite
def options(draw: st.DrawFn) -> bytes:
    """One option: sensible, or a little off, or not at all."""
    option = draw(st.sampled_from([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 99]) | st.integers(0, 2**32 - 1))
    name = draw(st.sampled_from([b"disk", b"", b"none", b"\xff", b"x" * 5000]))
    items = draw(st.lists(st.integers(0, 65535), max_size=4))
    count = draw(st.just(len(items)) | st.integers(0, 65535))
    told = draw(st.just(len(name)) | st.integers(0, 2**32 - 1))
    data = draw(
        st.just(b"")
        | st.binary(max_size=40)
        | st.just(name)
        | st.just(struct.pack(f">I{len(name)}sH{len(items)}H", told, name, count, *items))
    )
    magic = draw(st.sampled_from([IHAVEOPT] * 20 + [0]))
    length = draw(st.sampled_from([len(data)] * 20 + [0, 7, 9000, 2**32 - 1]))
    return OPTION.pack(magic, option, length) + data


@st.composite
def requests(draw: st.DrawFn, style: str) -> bytes:
    """One request: sensible, or a little off, or not at all."""
    extended = style == "extended"
    command = draw(st.sampled_from([0, 0, 0, 1, 1, 1, 3, 4, 6, 2, 5, 7, 99, 65535]))
    flags = draw(st.sampled_from([0] * 6 + [1, 2, 3, 4, 16, 32, 65535]))
    if extended and command == 1:
        flags ^= 32 * draw(st.sampled_from([1] * 10 + [0]))
    offset = draw(
        st.integers(0, DISK_BYTES) | st.sampled_from([DISK_BYTES - 1, DISK_BYTES, 2**63, 2**64 - 1])
    )
    longest = 2**64 - 1 if extended else 2**32 - 1
    length = draw(
        st.sampled_from([0, 1, 512, 4096, 65536, 65537, 256 * KIB, 256 * KIB + 1, longest])
        | st.integers(0, 300 * KIB)
    )
    right = NBD_EXTENDED_REQUEST_MAGIC if extended else NBD_REQUEST_MAGIC
    magic = draw(st.sampled_from([right] * 20 + [0]))
    has_payload = flags & 32 if extended else command == 1
    payload = bytes(length) if has_payload and length <= 400 * KIB else b""
    cookie = min(length, 2**32)
    layout = ">IHHQQQ" if extended else ">IHHQQI"
    return struct.pack(layout, magic, flags, command, cookie, offset, length) + payload


@bounded
@given(
    flags=st.sampled_from([0, 1, 2, 3, 4]),
    stream=st.lists(options(), max_size=8).map(b"".join) | st.binary(max_size=100),
    sizes=cuts,
)
def test_any_negotiation_is_answered_or_ended(
    start_server: StartServer, flags: int, stream: bytes, sizes: list[int]
) -> None:
    server = start_server(limits=LIMITS)
    client = server.connect()
    try:
        for piece in pieces(struct.pack(">I", flags) + stream, sizes):
            client.send_some(piece)
            client.rounds(3)
    except (BrokenPipeError, ConnectionResetError):
        pass
    said = client.drain()
    assert said[:16] == b"NBDMAGICIHAVEOPT"
    server.close()


@bounded
@given(
    data=st.data(),
    sizes=cuts,
    mapped=st.booleans(),
    inline=st.booleans(),
    behaviour=st.sampled_from(["inline", "inline", "pending", "error", "short"]),
    held=st.booleans(),
)
def test_any_requests_are_answered_or_the_connection_ended(
    serve: Serve,
    style: str,
    data: st.DataObject,
    sizes: list[int],
    mapped: bool,
    inline: bool,
    behaviour: str,
    held: bool,
) -> None:
    served = serve(mapped=mapped, limits=LIMITS)
    backend, file = served.backend, served.backend.file
    file.behaviour, backend.held = behaviour, held
    file.writes_inline = inline and behaviour != "pending"  # or it would break its promise
    said = b""
    stream = data.draw(
        st.lists(requests(style), max_size=10).map(b"".join) | st.binary(max_size=100)
    )
    try:
        for piece in pieces(stream, sizes):
            served.client.send_some(piece)
            served.client.rounds(2)
            # The last first: replies need not come in order.
            if backend.waiting:
                backend.end(-1)
            if file.pending:
                file.complete(-1)
        served.client.sock.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError, OSError):
        pass
    for _ in range(40):
        while backend.waiting:
            backend.end()
        while file.pending:
            file.complete()
        try:
            said += served.client.sock.recv(1 << 20)
        except (BlockingIOError, ConnectionResetError):
            pass
        served.client.rounds(2)
    assert not backend.waiting
    assert not file.pending
    assert served.closed == [True], "neither answered nor ended"
    if style == "simple":
        check_replies(said)
    else:
        check_chunks(said, style)


def check_replies(said: bytes) -> None:
    """`said` is replies, one after the other; a cookie is the length that was asked for. A write's
    reply has no data, nor has an error's; zeroes are what the disk holds."""
    while said:
        magic, error, cookie = SIMPLE_REPLY.unpack_from(said)
        assert magic == NBD_SIMPLE_REPLY_MAGIC
        said = said[SIMPLE_REPLY.size :]
        length = int.from_bytes(cookie, "big")
        if not error and length and said[:4] != b"\x67\x44\x66\x98" and said:
            assert not any(said[:length])
            said = said[length:]


def check_chunks(said: bytes, style: str) -> None:
    """The same for replies of chunks, which say how long they are; each has its end."""
    unfinished = set()
    while said:
        magic, *_, length = struct.unpack_from(">IIQI", said + bytes(20))
        if style == "structured" and magic == NBD_SIMPLE_REPLY_MAGIC:
            said = said[SIMPLE_REPLY.size :]
            continue
        layout = STRUCTURED_REPLY if style == "structured" else EXTENDED_REPLY
        magic, flags, kind, cookie, *_, length = layout.unpack_from(said)
        right = NBD_STRUCTURED_REPLY_MAGIC if style == "structured" else NBD_EXTENDED_REPLY_MAGIC
        assert magic == right
        assert kind in (0, 1, 2, 32769, 32770)
        payload = said[layout.size : layout.size + length]
        assert len(payload) == length
        if kind == 1:
            assert not any(payload[8:])
            assert len(payload) > 8
        said = said[layout.size + length :]
        if flags:
            unfinished.discard(cookie)
        else:
            unfinished.add(cookie)
    assert not unfinished
