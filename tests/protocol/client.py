# SPDX-License-Identifier: Apache-2.0
"""A client that says what a test's script tells it to, word by word, over a blocking socket.

It knows the three ways in which a server may answer (simple, structured, extended) and takes every
message apart, but takes no offence: what is right or wrong about one is for the tests to say. Only
a message that can't be one (a wrong magic, a chunk that doesn't fit its own length) fails here.
"""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from tests.protocol.wire import (
    DONE,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    FIXED_NEWSTYLE,
    IHAVEOPT,
    NBDMAGIC,
    NO_ZEROES,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Info,
    Opt,
    Rep,
)

TIMEOUT_S = 20.0

SIMPLE, STRUCTURED, EXTENDED = "simple", "structured", "extended"


class OptionReply(NamedTuple):
    """One reply to an option."""

    option: int
    kind: int
    data: bytes

    @property
    def is_final(self) -> bool:
        """Nothing more comes for this option."""
        return self.kind == Rep.ACK or self.is_error

    @property
    def is_error(self) -> bool:
        """One of the ERR_ types."""
        return bool(self.kind >> 31)


class ReplyChunk(NamedTuple):
    """One structured (or extended) chunk; `offset` is of its header and only an extended one's."""

    flags: int
    kind: int
    cookie: int
    payload: bytes
    offset: int | None = None

    @property
    def is_error(self) -> bool:
        """One of the error types."""
        return bool(self.kind >> 15)

    @property
    def is_content(self) -> bool:
        """Data or a hole."""
        return self.kind in (Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE)

    def error(self) -> tuple[int, str]:
        """An error chunk's number and message."""
        number, length = struct.unpack_from(">IH", self.payload)
        assert 6 + length <= len(self.payload)
        return number, self.payload[6 : 6 + length].decode()

    def error_offset(self) -> int:
        """Where an ERROR_OFFSET says that it happened."""
        assert self.kind == Chunk.ERROR_OFFSET
        offset: int = struct.unpack(">Q", self.payload[-8:])[0]
        return offset

    def content(self) -> tuple[int, bytes]:
        """A content chunk's offset and data; a hole's are zeroes."""
        (offset,) = struct.unpack_from(">Q", self.payload)
        if self.kind == Chunk.OFFSET_DATA:
            return offset, self.payload[8:]
        (length,) = struct.unpack(">I", self.payload[8:])
        return offset, bytes(length)

    def extents(self) -> tuple[int, list[tuple[int, int]]]:
        """A status chunk's context and its extents, as (length, flags)."""
        if self.kind == Chunk.BLOCK_STATUS:
            (context,) = struct.unpack_from(">I", self.payload)
            return context, list(struct.iter_unpack(">II", self.payload[4:]))
        assert self.kind == Chunk.BLOCK_STATUS_EXT
        context, count = struct.unpack_from(">II", self.payload)
        found = list(struct.iter_unpack(">QQ", self.payload[8:]))
        assert len(found) == count
        return context, found


@dataclass
class Answer:
    """All that was said to one request: a simple reply, or chunks up to the last one."""

    cookie: int
    error: int
    data: bytes = b""
    chunks: list[ReplyChunk] = field(default_factory=list)

    @property
    def was_simple(self) -> bool:
        """It came as a simple reply."""
        return not self.chunks


def name_and_list(name: str, *queries: str) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    parts = [name.encode(), *(query.encode() for query in queries)]
    strings = [struct.pack(">I", len(part)) + part for part in parts]
    return strings[0] + struct.pack(">I", len(queries)) + b"".join(strings[1:])


def info_data(name: str, *items: int) -> bytes:
    """The data of INFO and GO."""
    raw = name.encode()
    return struct.pack(f">I{len(raw)}sH{len(items)}H", len(raw), raw, len(items), *items)


class Client:
    """One connection. `style` is how replies come, once negotiated."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT_S)
        self.sock = sock
        self.style = SIMPLE
        self.size_bytes = 0
        self.flags = 0
        self.contexts: dict[int, str] = {}
        self._cookie = 0x0102030405060700
        self._reads: dict[int, tuple[int, int]] = {}

    @classmethod
    def dial(cls, path: Path) -> Self:
        """A fresh connection; the server hasn't been listened to yet."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(TIMEOUT_S)
            sock.connect(str(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    @classmethod
    def greeted(cls, path: Path, client_flags: int = FIXED_NEWSTYLE | NO_ZEROES) -> Self:
        """A connection that may send options."""
        client = cls.dial(path)
        client.greet(client_flags)
        return client

    @classmethod
    def entered(cls, path: Path, export: str = "", *, style: str = SIMPLE) -> Self:
        """A connection in transmission."""
        client = cls.greeted(path)
        client.negotiate(style)
        client.go(export)
        return client

    # --- bytes ---

    def send(self, data: bytes) -> None:
        """All of `data`."""
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes. Raises: ConnectionError when the server closes before."""
        parts = bytearray()
        while len(parts) < length:
            piece = self.sock.recv(min(1 << 20, length - len(parts)))
            if not piece:
                raise ConnectionError(f"the server closed after {len(parts)} of {length} bytes")
            parts += piece
        return bytes(parts)

    def rest(self) -> bytes:
        """All that the server says until it closes. Raises: TimeoutError when it doesn't."""
        parts = bytearray()
        try:
            while piece := self.sock.recv(1 << 16):
                parts += piece
        except ConnectionResetError:
            pass
        return bytes(parts)

    def closed(self) -> bool:
        """The server says no more, and closes."""
        return self.rest() == b""

    # --- negotiation ---

    def greet(self, client_flags: int = FIXED_NEWSTYLE | NO_ZEROES) -> int:
        """Take the greeting, answer with `client_flags`; the handshake flags."""
        greeting = self.receive(18)
        assert greeting[:16] == NBDMAGIC + IHAVEOPT
        self.send(struct.pack(">I", client_flags))
        flags: int = struct.unpack(">H", greeting[16:])[0]
        return flags

    def option(self, option: int, data: bytes = b"", *, length: int | None = None) -> None:
        """Send an option; `length` lies about its data's."""
        told = len(data) if length is None else length
        self.send(IHAVEOPT + struct.pack(">II", option, told) + data)

    def option_reply(self) -> OptionReply:
        """The next reply to an option."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == OPTION_REPLY_MAGIC, hex(magic)
        return OptionReply(option, kind, self.receive(length))

    def ask(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option, take all its replies up to the final one."""
        self.option(option, data)
        replies = [self.option_reply()]
        while not replies[-1].is_final:
            replies.append(self.option_reply())
        return replies

    def outcome(self, option: int, data: bytes = b"") -> int:
        """Send an option; the type of its final reply."""
        return self.ask(option, data)[-1].kind

    def info(self, name: str, *items: int, option: int = Opt.INFO) -> dict[int, bytes]:
        """INFO (or GO) that must work: the items, without their type."""
        *items_told, final = self.ask(option, info_data(name, *items))
        assert final.kind == Rep.ACK, final
        assert all(reply.kind == Rep.INFO for reply in items_told)
        found = {struct.unpack(">H", one.data[:2])[0]: one.data[2:] for one in items_told}
        assert len(found) == len(items_told), "an item was told twice"
        return found

    def go(self, name: str = "", *items: int) -> dict[int, bytes]:
        """GO that must work."""
        found = self.info(name, *items, option=Opt.GO)
        self.size_bytes, self.flags = struct.unpack(">QH", found[Info.EXPORT])
        return found

    def export_name(self, name: str = "", *, zeroes: bool = False) -> None:
        """The old way into transmission."""
        self.option(Opt.EXPORT_NAME, name.encode())
        self.size_bytes, self.flags = struct.unpack(">QH", self.receive(10))
        if zeroes:
            assert self.receive(124) == bytes(124)

    def negotiate(self, style: str) -> None:
        """Agree on a style of replies."""
        if style == STRUCTURED:
            assert self.outcome(Opt.STRUCTURED_REPLY) == Rep.ACK
        elif style == EXTENDED:
            assert self.outcome(Opt.EXTENDED_HEADERS) == Rep.ACK
        self.style = style

    def start_tls(self, context: ssl.SSLContext) -> None:
        """STARTTLS that must be acknowledged, and the handshake. Raises: ssl.SSLError, OSError."""
        assert self.ask(Opt.STARTTLS) == [(Opt.STARTTLS, Rep.ACK, b"")]
        self.sock = context.wrap_socket(
            self.sock, server_hostname="localhost", suppress_ragged_eofs=False
        )

    def set_contexts(self, name: str, *queries: str) -> dict[int, str]:
        """SET_META_CONTEXT that must work: the contexts by their ids."""
        *chosen, final = self.ask(Opt.SET_META_CONTEXT, name_and_list(name, *queries))
        assert final.kind == Rep.ACK, final
        assert all(reply.kind == Rep.META_CONTEXT for reply in chosen)
        self.contexts = {
            struct.unpack(">I", one.data[:4])[0]: one.data[4:].decode() for one in chosen
        }
        assert len(self.contexts) == len(chosen), "two contexts have one id"
        return self.contexts

    # --- transmission ---

    def header(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 0
    ) -> bytes:
        """A request's header in the negotiated form."""
        magic, form = REQUEST_MAGIC, ">IHHQQI"
        if self.style == EXTENDED:
            magic, form = EXTENDED_REQUEST_MAGIC, ">IHHQQQ"
        return struct.pack(form, magic, flags, command, cookie, offset, length)

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
    ) -> int:
        """Send a request; a payload gives the length. Returns its cookie."""
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        if command == Cmd.WRITE and self.style == EXTENDED:
            flags |= CmdFlag.PAYLOAD_LEN
        length = length or len(payload)
        if command == Cmd.READ:
            self._reads[cookie] = (offset, length)
        self.send(self.header(command, offset, length, flags=flags, cookie=cookie) + payload)
        return cookie

    def reply(self) -> Answer | ReplyChunk:
        """The next message of the server: a simple reply, or a chunk."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == SIMPLE_REPLY_MAGIC:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            _, length = self._reads.pop(cookie, (0, 0))
            return Answer(cookie, error, b"" if error else self.receive(length))
        if magic == STRUCTURED_REPLY_MAGIC:
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            return ReplyChunk(flags, kind, cookie, self.receive(length))
        assert magic == EXTENDED_REPLY_MAGIC, hex(magic)
        flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.receive(28))
        return ReplyChunk(flags, kind, cookie, self.receive(length), offset)

    def answers(self, count: int) -> dict[int, Answer]:
        """The whole answers to `count` requests, however their chunks are mixed."""
        begun: dict[int, Answer] = {}
        whole: dict[int, Answer] = {}
        while len(whole) < count:
            reply = self.reply()
            if isinstance(reply, Answer):
                assert reply.cookie not in begun, "chunks, and then a simple reply"
                whole[reply.cookie] = reply
                continue
            answer = begun.setdefault(reply.cookie, Answer(reply.cookie, 0))
            answer.chunks.append(reply)
            if reply.is_error:
                answer.error = answer.error or reply.error()[0]
            if reply.flags & DONE:
                whole[reply.cookie] = begun.pop(reply.cookie)
                self._join(whole[reply.cookie])
        assert not begun, "an answer lacks its last chunk"
        return whole

    def call(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
    ) -> Answer:
        """One request, and all that is said to it."""
        cookie = self.request(command, offset, length, flags=flags, payload=payload, cookie=cookie)
        answers = self.answers(1)
        assert list(answers) == [cookie]
        return answers[cookie]

    def read(self, offset: int, length: int) -> bytes:
        """A read that must work."""
        answer = self.call(Cmd.READ, offset, length)
        assert answer.error == 0, answer
        return answer.data

    def alive(self) -> bool:
        """The connection still answers."""
        return len(self.read(0, 16)) == 16

    def _join(self, answer: Answer) -> None:
        """The content of a READ's chunks, put together; a hole in it stays zeroes."""
        start, length = self._reads.pop(answer.cookie, (0, 0))
        if answer.error and not any(chunk.is_content for chunk in answer.chunks):
            return  # it may have asked for more than there is memory
        data = bytearray(length)
        for chunk in answer.chunks:
            if chunk.is_content:
                offset, content = chunk.content()
                assert start <= offset, "content before the request's range"
                assert offset + len(content) <= start + length, "content behind it"
                data[offset - start : offset - start + len(content)] = content
        if not answer.error:
            answer.data = bytes(data)

    def close(self) -> None:
        """Hang up without a word."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
