# SPDX-License-Identifier: Apache-2.0
"""Things that a client might say to an NBD server, mostly sensible and a little off, and a client
that says them.

Pure noise dies at the first magic number, so what hypothesis draws here has a structure: options
with the data that they want, requests with payloads, in each style of replies; then some numbers
are wrong, some bits are flipped, and the stream is cut anywhere. `converse` says it and ends the
connection in one of the ways in which clients end. It reads as it goes, or not at all.
"""

from __future__ import annotations

import select
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from tests.protocol.client import EXTENDED, SIMPLE, STRUCTURED, info_data, name_and_list
from tests.protocol.wire import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    Opt,
    Rep,
)

KIB = 1 << 10
EXPORT, EXPORT_BYTES = "victim", 4 << 20
PAYLOAD_BYTES_SENT_MAX = 200_000
ENDS_S = 20.0

END_OF_STREAM, DISCONNECT, CLOSE = "end of stream", "disconnect", "close"


@dataclass
class Conversation:
    """What a client says, byte by byte, and how it leaves."""

    opening: bytes
    options: list[bytes]
    entry: bytes
    style: str
    requests: list[bytes]
    flips: list[int]
    """Bits of the whole stream that are turned."""
    cut: int
    """Bytes a piece."""
    reads: bool
    """Whether it takes what the server says before it has said everything itself."""
    ending: str

    @property
    def stream(self) -> bytes:
        """All of it."""
        parts = [self.opening, *self.options, self.entry, *self.requests]
        said = bytearray(b"".join(parts))
        for bit in self.flips:
            at = bit % (8 * len(said))
            said[at // 8] ^= 1 << at % 8
        return bytes(said)

    @property
    def by_name(self) -> bool:
        """It enters by EXPORT_NAME, whose answer has no magic."""
        return IHAVEOPT + struct.pack(">I", Opt.EXPORT_NAME) in self.entry

    @property
    def is_proper(self) -> bool:
        """It gets to transmission in the shortest way, and nothing was flipped."""
        return not self.options and not self.flips and self.opening == struct.pack(">I", 3)


def option(kind: int, data: bytes, *, length: int | None = None) -> bytes:
    """An option on the wire; `length` lies."""
    return IHAVEOPT + struct.pack(">II", kind, len(data) if length is None else length) + data


names = st.sampled_from([EXPORT, "good", "", "none", "x" * 4096, "x" * 5000, "a\0b", "ö"])
queries = st.lists(
    st.sampled_from(
        ["base:allocation", "base:", "base:x", "qemu:allocation-depth", "qemu:dirty-bitmap:"]
        + ["qemu:", "x-none:y", "nocolon", ":", "", "base:" + "y" * 5000]
    ),
    max_size=6,
)
wishes = st.lists(st.integers(0, 5) | st.integers(0, 0xFFFF), max_size=5)
lies = st.sampled_from([None] * 30 + [0, 7, 5000, 70_000, (1 << 32) - 1])


@st.composite
def options(draw: st.DrawFn) -> bytes:
    """One option, or something like one."""
    kind = draw(st.sampled_from([*Opt, *Opt, 0, 99]) | st.integers(0, (1 << 32) - 1))
    empty = kind in (Opt.LIST, Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS, Opt.STARTTLS)
    if kind in (Opt.INFO, Opt.GO):
        data = info_data(draw(names), *draw(wishes))
    elif kind in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT):
        data = name_and_list(draw(names), *draw(queries))
    elif kind == Opt.EXPORT_NAME:
        data = draw(names).encode()
    else:
        data = draw(st.just(b"") if empty else st.binary(max_size=60))
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=9))
    return option(kind, data, length=draw(lies))


def entry(style: str, contexts: list[str], *, by_name: bool) -> bytes:
    """The options of a client that wants this style and these contexts, and enters."""
    said = b""
    if style == STRUCTURED:
        said += option(Opt.STRUCTURED_REPLY, b"")
    elif style == EXTENDED:
        said += option(Opt.EXTENDED_HEADERS, b"")
    if contexts:
        said += option(Opt.SET_META_CONTEXT, name_and_list(EXPORT, *contexts))
    if by_name and style != EXTENDED:
        return said + option(Opt.EXPORT_NAME, EXPORT.encode())
    return said + option(Opt.GO, info_data(EXPORT))


places = st.integers(0, EXPORT_BYTES) | st.sampled_from(
    [EXPORT_BYTES - 1, EXPORT_BYTES, 1 << 63, (1 << 64) - 1]
)
lengths = st.integers(0, 100 * KIB) | st.sampled_from(
    [0, 1, 512, 4096, 65536, 65537, 1 << 20, 3 << 20, 1 << 25, (1 << 25) + 1, (1 << 32) - 1]
)
all_flags = st.sampled_from([0] * 8 + [*CmdFlag, 3, 0x12, 0xFFFF])


@st.composite
def requests(draw: st.DrawFn, style: str) -> bytes:
    """One request, or something like one. The payload may be shorter than it says."""
    command = draw(st.sampled_from([0, 0, 0, 1, 1, 1, *Cmd, 9, 0xFFFF]).filter(lambda c: c != 2))
    flags, offset, length = draw(all_flags), draw(places), draw(lengths)
    cookie = draw(st.integers(0, (1 << 64) - 1))
    magic, form = REQUEST_MAGIC, ">IHHQQI"
    if style == EXTENDED:
        magic, form = EXTENDED_REQUEST_MAGIC, ">IHHQQQ"
        if draw(st.integers(0, 9)) == 0:
            length <<= draw(st.integers(1, 31))
        if command == Cmd.WRITE and draw(st.integers(0, 9)):
            flags |= CmdFlag.PAYLOAD_LEN
    has_payload = command == Cmd.WRITE or (style == EXTENDED and flags & CmdFlag.PAYLOAD_LEN)
    payload = b""
    if has_payload and length <= PAYLOAD_BYTES_SENT_MAX:
        payload = (cookie.to_bytes(8, "big") * (length // 8 + 1))[:length]
        if command == Cmd.BLOCK_STATUS and length >= 8:
            payload = struct.pack(">Q", draw(lengths)) + payload[8:]
    if draw(st.integers(0, 40)) == 0:
        magic = draw(st.sampled_from([REQUEST_MAGIC, EXTENDED_REQUEST_MAGIC, 0]))
    return struct.pack(form, magic, flags, command, cookie, offset, length) + payload


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """One client's life."""
    style = draw(st.sampled_from([SIMPLE, STRUCTURED, EXTENDED]))
    contexts = draw(st.just([]) | queries)
    return Conversation(
        opening=struct.pack(">I", draw(st.sampled_from([3] * 20 + [0, 1, 2, 4, 0xFFFFFFFF]))),
        options=draw(st.just([]) | st.lists(options(), max_size=6)),
        entry=draw(st.sampled_from([entry(style, contexts, by_name=b) for b in (False, True)])),
        style=style,
        requests=draw(st.lists(requests(style), max_size=12)),
        flips=draw(st.just([]) | st.lists(st.integers(0, 1 << 30), max_size=4)),
        cut=draw(st.sampled_from([1 << 20, 1 << 16, 1000, 28, 7])),
        reads=draw(st.booleans()),
        ending=draw(st.sampled_from([END_OF_STREAM, END_OF_STREAM, DISCONNECT, CLOSE])),
    )


def converse(path: Path, conversation: Conversation) -> bytes:
    """Say it all; what the server said to that, as far as this client listens.

    Raises: TimeoutError when the server goes on after the client's end of stream.
    """
    said = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ENDS_S)
        sock.connect(str(path))
        stream, ending = conversation.stream, conversation.ending
        try:
            _say(sock, stream, max(conversation.cut, len(stream) // 100), conversation.reads, said)
            if ending == DISCONNECT:
                sock.sendall(goodbye(conversation.style))
            if ending != CLOSE:
                sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # It hung up: its right, where a rule was broken.
        if ending != CLOSE:
            _hear_out(sock, said)
    return bytes(said)


def goodbye(style: str) -> bytes:
    """DISC."""
    if style == EXTENDED:
        return struct.pack(">IHHQQQ", EXTENDED_REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0)
    return struct.pack(">IHHQQI", REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0)


def _hear_out(sock: socket.socket, said: bytearray) -> None:
    """Until the end of the stream. That the server closed with our words unread is told first."""
    while True:
        try:
            piece = sock.recv(1 << 20)
        except ConnectionResetError:
            continue
        if not piece:
            return
        said += piece


def _say(sock: socket.socket, stream: bytes, cut: int, reads: bool, said: bytearray) -> None:
    """In pieces. Gives up where the server doesn't take it, since we don't take its words."""
    rest = memoryview(stream)
    while rest:
        wanted = [sock] if reads else []
        readable, writable, _ = select.select(wanted, [sock], [], 0 if not reads else ENDS_S)
        if not readable and not writable:
            return
        if writable:
            try:
                rest = rest[sock.send(rest[:cut], socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                pass
        if readable:
            piece = sock.recv(1 << 20)
            if not piece:
                return
            said += piece


def check_words(conversation: Conversation, said: bytes) -> None:
    """What the server said to a proper conversation can be taken apart to the last byte.

    Without chunks that can't be told: one has to know the requests.
    """
    if conversation.ending == CLOSE:
        return
    assert said[:16] == b"NBDMAGIC" + IHAVEOPT
    if not conversation.is_proper or conversation.by_name:
        return
    style, rest = _negotiated(memoryview(said)[18:])
    while rest and style == conversation.style != SIMPLE:
        (magic,) = struct.unpack_from(">I", rest)
        if magic == SIMPLE_REPLY_MAGIC:
            assert style == STRUCTURED
            rest = rest[16:]
            continue
        magics = {STRUCTURED: STRUCTURED_REPLY_MAGIC, EXTENDED: EXTENDED_REPLY_MAGIC}
        assert magic == magics[style], hex(magic)
        head = struct.Struct(">24xQ" if style == EXTENDED else ">16xI")
        whole = head.size + head.unpack_from(rest)[0]
        assert len(rest) >= whole, "half a chunk"
        rest = rest[whole:]


def _negotiated(said: memoryview) -> tuple[str | None, memoryview]:
    """The style of the replies behind the answers to options, and those; None without a GO."""
    style, entered = SIMPLE, False
    while said[:8] == struct.pack(">Q", OPTION_REPLY_MAGIC):
        answered, kind, length = struct.unpack_from(">III", said, 8)
        if kind == Rep.ACK:
            entered = answered == Opt.GO
            style = {Opt.STRUCTURED_REPLY: STRUCTURED, Opt.EXTENDED_HEADERS: EXTENDED}.get(
                answered, style
            )
        said = said[20 + length :]
    return style if entered else None, said
