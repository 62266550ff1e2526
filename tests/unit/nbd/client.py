# SPDX-License-Identifier: Apache-2.0
"""The other end of a connection: says what a test tells it to, byte by byte if need be.

It runs in the test's own thread. Whenever it waits for the server it runs the server's loop, one
round at a time and never sleeping; local sockets deliver at once, so when many rounds in a row
bring nothing, nothing will come, and the test fails instead of hanging.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockemu.drivers.nbd.protocol import (
    CLIENT_FLAGS,
    GREETING,
    IHAVEOPT,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_EXTENDED_REQUEST_MAGIC,
    NBD_REP_MAGIC,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    SIMPLE_REPLY,
    ChunkType,
    Command,
    CommandFlag,
    NbdError,
)

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

IDLE_ROUNDS_MAX = 50

DATA_HEAD_BYTES = {"simple": 16, "structured": 28, "extended": 40}
"""What stands before the data of a READ that is answered whole."""


def header(
    command: int,
    *,
    flags: int = 0,
    cookie: int = 0,
    offset: int = 0,
    length: int = 0,
    style: str = "simple",
) -> bytes:
    """A request's header. In the extended style WRITEs get PAYLOAD_LEN."""
    if style != "extended":
        return struct.pack(">IHHQQI", NBD_REQUEST_MAGIC, flags, command, cookie, offset, length)
    if command == Command.NBD_CMD_WRITE:
        flags |= CommandFlag.NBD_CMD_FLAG_PAYLOAD_LEN
    magic = NBD_EXTENDED_REQUEST_MAGIC
    return struct.pack(">IHHQQQ", magic, flags, command, cookie, offset, length)


@dataclass
class Chunk:
    """A chunk of a reply. `offset` is what an extended one repeats of the request."""

    cookie: int
    kind: int
    done: bool
    payload: bytes
    offset: int | None = None

    @property
    def error(self) -> tuple[int, str, int | None]:
        """Of an error chunk: the value, the text, the offset."""
        assert self.kind & 1 << 15
        value, length = struct.unpack_from(">IH", self.payload)
        text, rest = self.payload[6 : 6 + length], self.payload[6 + length :]
        assert len(text) == length
        assert value in list(NbdError)[1:]
        if self.kind == ChunkType.NBD_REPLY_TYPE_ERROR:
            assert not rest
            return value, text.decode(), None
        assert self.kind == ChunkType.NBD_REPLY_TYPE_ERROR_OFFSET
        return value, text.decode(), int.from_bytes(rest, "big")


class Client:
    """One end of a socket pair; the server has the other."""

    def __init__(self, sock: socket.socket, *contexts: AioContext, style: str = "simple") -> None:
        sock.setblocking(False)
        self.sock = sock
        self.style = style
        self.text = ""
        """What the last error said, in a style that says it."""
        self._contexts = contexts

    def rounds(self, count: int = 10) -> None:
        """Run the server's loop `count` times."""
        for _ in range(count):
            for ctx in self._contexts:
                ctx.poll(blocking=False)

    def until(self, condition: Callable[[], bool]) -> None:
        """Run the server's loop until `condition` holds."""
        for _ in range(IDLE_ROUNDS_MAX):
            if condition():
                return
            self.rounds(1)
        assert condition()

    def send(self, data: bytes) -> None:
        """All of `data`, while the server runs."""
        rest = memoryview(data)
        idle = 0
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
                idle = 0
            except BlockingIOError:
                idle += 1
                assert idle < IDLE_ROUNDS_MAX, f"the server doesn't take {len(rest)} bytes"
            self.rounds(1)

    def send_some(self, data: bytes) -> int:
        """As much of `data` as goes without the server's taking any."""
        sent = 0
        while sent < len(data):
            try:
                sent += self.sock.send(data[sent:])
            except BlockingIOError:
                break
        return sent

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes."""
        received = b""
        idle = 0
        while len(received) < length:
            self.rounds(1)
            try:
                data = self.sock.recv(length - len(received))
                assert data, f"hung up after {received!r}"
                received += data
                idle = 0
            except BlockingIOError:
                idle += 1
                assert idle < IDLE_ROUNDS_MAX, f"the server sent {received!r} and no more"
        return received

    def silent(self) -> bool:
        """The server has nothing to say, and hasn't hung up."""
        self.rounds()
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    def drain(self) -> bytes:
        """Whatever the server says until it hangs up or is silent."""
        received = b""
        for _ in range(IDLE_ROUNDS_MAX):
            self.rounds(1)
            try:
                data = self.sock.recv(1 << 20)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return received
            if not data:
                return received
            received += data
        return received

    def drain_some(self) -> None:
        """Drop what the server has said so far."""
        try:
            self.sock.recv(1 << 20)
        except BlockingIOError:
            pass

    def hung_up(self) -> bool:
        """The server closes the connection without another word."""
        for _ in range(IDLE_ROUNDS_MAX):
            self.rounds(1)
            try:
                return self.sock.recv(1) == b""
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return True
        return False

    # --- negotiation ---

    def greet(self, client_flags: int = 3) -> None:
        """Receive the greeting, and answer it."""
        assert GREETING.unpack(self.receive(GREETING.size)) == (NBDMAGIC, IHAVEOPT, 3)
        self.send(CLIENT_FLAGS.pack(client_flags))

    def option(self, option: int, data: bytes = b"") -> None:
        """Send an option."""
        self.send(OPTION.pack(IHAVEOPT, option, len(data)) + data)

    def option_reply(self, option: int) -> tuple[int, bytes]:
        """Receive a reply to it: type and data."""
        magic, answered, reply, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
        assert magic == NBD_REP_MAGIC
        assert answered == option
        return reply, self.receive(length)

    # --- transmission ---

    def request(
        self,
        command: int,
        *,
        flags: int = 0,
        cookie: int = 0,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
    ) -> None:
        """Send a request. A payload gives the length."""
        length = length or len(payload)
        asked = self.header(command, flags=flags, cookie=cookie, offset=offset, length=length)
        self.send(asked + payload)

    def header(self, command: int, **fields: int) -> bytes:
        """A request's header in this client's style."""
        return header(command, style=self.style, **fields)  # type: ignore[arg-type]

    def reply(self, length: int = 0) -> tuple[int, int, bytes]:
        """Receive a reply: cookie, error, and `length` bytes if the error is 0."""
        magic = self.receive(4)
        if int.from_bytes(magic, "big") == NBD_SIMPLE_REPLY_MAGIC:
            assert self.style == "simple" or (self.style == "structured" and not length)
            _, error, cookie = SIMPLE_REPLY.unpack(magic + self.receive(SIMPLE_REPLY.size - 4))
            data = self.receive(length) if length and not error else b""
            return int.from_bytes(cookie, "big"), error, data
        chunk = self._chunk(magic)
        if not chunk.kind & 1 << 15 and not length:
            assert chunk.kind == ChunkType.NBD_REPLY_TYPE_NONE
            assert chunk.done
            return chunk.cookie, 0, b""
        return self._whole(chunk, length)

    def chunk(self) -> Chunk:
        """Receive one chunk."""
        return self._chunk(self.receive(4))

    def _chunk(self, magic: bytes) -> Chunk:
        if self.style == "structured":
            assert int.from_bytes(magic, "big") == NBD_STRUCTURED_REPLY_MAGIC
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            offset = None
        else:
            assert self.style == "extended"
            assert int.from_bytes(magic, "big") == NBD_EXTENDED_REPLY_MAGIC
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.receive(28))
        assert flags in (0, 1)
        return Chunk(cookie, kind, bool(flags), self.receive(length), offset)

    def _whole(self, chunk: Chunk, length: int) -> tuple[int, int, bytes]:
        """The reply that begins with `chunk`: a READ's data, put together, or an error."""
        data, there, first, error = bytearray(length), 0, chunk.offset, 0
        base: int | None = None
        while True:
            assert chunk.offset == first
            if chunk.kind & 1 << 15:
                error, self.text, _ = chunk.error
            elif chunk.kind != ChunkType.NBD_REPLY_TYPE_NONE:
                at = int.from_bytes(chunk.payload[:8], "big")
                base = at if base is None else base
                if chunk.kind == ChunkType.NBD_REPLY_TYPE_OFFSET_DATA:
                    piece = chunk.payload[8:]
                else:
                    assert chunk.kind == ChunkType.NBD_REPLY_TYPE_OFFSET_HOLE
                    piece = bytes(int.from_bytes(chunk.payload[8:], "big"))
                assert piece
                assert at - base == there, "chunks out of order"
                data[there : there + len(piece)] = piece
                there += len(piece)
            if chunk.done:
                break
            chunk = self.chunk()
        if error:
            return chunk.cookie, error, b""
        assert there == len(data) == length
        assert first is None or first == base
        return chunk.cookie, 0, bytes(data)
