# SPDX-License-Identifier: Apache-2.0
"""An NBD client that does what no sane one would: wrong requests, half ones, replies never read.

libnbd refuses to send most of what the error tests need. Nothing here checks anything: the tests
do. Simple replies only. Numbers are those of the NBD protocol document.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN = (1 << 31) + 1, (1 << 31) + 3, (1 << 31) + 6
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FLAG_FUA, FLAG_NO_HOLE = 1, 2

NBD_OK, NBD_EPERM, NBD_EIO, NBD_ENOMEM, NBD_EINVAL, NBD_ENOSPC = 0, 1, 5, 12, 22, 28
NBD_EOVERFLOW, NBD_ENOTSUP, NBD_ESHUTDOWN = 75, 95, 108

TIMEOUT_S = 30.0


class OptionReply(NamedTuple):
    """One reply during negotiation."""

    option: int
    kind: int
    payload: bytes


class Reply(NamedTuple):
    """One simple reply; `data` only after a successful read."""

    cookie: int
    error: int
    data: bytes


class RawNbd:
    """One connection on a unix socket; `go` or `export_name` take it to transmission."""

    def __init__(self, socket_path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(socket_path))
        self.size_bytes = 0
        self.flags = 0
        self._cookie = 0
        self._reads: dict[int, int] = {}
        greeting = self.receive(18)
        assert greeting[:16] == b"NBDMAGIC" + OPTION_MAGIC
        # Fixed newstyle, no zeroes.
        self.sock.sendall(struct.pack(">I", 3))

    @classmethod
    def connected(cls, socket_path: Path, export: str = "") -> Self:
        """A connection in transmission."""
        client = cls(socket_path)
        client.go(export)
        return client

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises: ConnectionError when the server closes before.
        """
        parts = bytearray()
        while len(parts) < length:
            chunk = self.sock.recv(min(1 << 20, length - len(parts)))
            if not chunk:
                raise ConnectionError(f"the server closed after {len(parts)} of {length} bytes")
            parts += chunk
        return bytes(parts)

    def server_closed(self) -> bool:
        """Whether the server ends the connection; what it still sends is thrown away."""
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    def send_option(self, option: int, payload: bytes = b"", *, length: int | None = None) -> None:
        """One option; `length` lies about the payload's."""
        announced = len(payload) if length is None else length
        self.sock.sendall(OPTION_MAGIC + struct.pack(">II", option, announced) + payload)

    def option_reply(self) -> OptionReply:
        """The next reply to an option."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == OPTION_REPLY_MAGIC
        return OptionReply(option, kind, self.receive(length))

    def try_go(self, export: str, *, option: int = OPT_GO) -> OptionReply:
        """GO or INFO; the last reply, size and flags taken from the ones before."""
        name = export.encode()
        self.send_option(option, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        while True:
            reply = self.option_reply()
            if reply.kind != REP_INFO:
                return reply
            if reply.payload[:2] == struct.pack(">H", INFO_EXPORT):
                self.size_bytes, self.flags = struct.unpack(">QH", reply.payload[2:12])

    def go(self, export: str = "") -> None:
        """GO that has to work."""
        reply = self.try_go(export)
        assert reply.kind == REP_ACK, reply

    def export_name(self, export: str = "") -> None:
        """The old way into transmission.

        Raises: ConnectionError for an unknown name: this option knows no error reply.
        """
        self.send_option(OPT_EXPORT_NAME, export.encode())
        self.size_bytes, self.flags = struct.unpack(">QH", self.receive(10))

    def send(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        magic: int = REQUEST_MAGIC,
    ) -> int:
        """Send one request and return its cookie."""
        self._cookie += 1
        if kind == CMD_READ:
            self._reads[self._cookie] = length
        header = struct.pack(">IHHQQI", magic, flags, kind, self._cookie, offset, length)
        self.sock.sendall(header + payload)
        return self._cookie

    def reply(self) -> Reply:
        """The next reply, of whichever request."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == SIMPLE_REPLY_MAGIC, hex(magic)
        length = self._reads.pop(cookie, 0)
        return Reply(cookie, error, self.receive(length) if length and not error else b"")

    def call(
        self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b""
    ) -> Reply:
        """One request and its reply, with nothing else in flight."""
        cookie = self.send(kind, offset, length, flags=flags, payload=payload)
        reply = self.reply()
        assert reply.cookie == cookie
        return reply

    def read(self, offset: int, length: int) -> bytes:
        """A read that has to work."""
        reply = self.call(CMD_READ, offset, length)
        assert reply.error == NBD_OK, reply
        return reply.data

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        """A write; the reply's error."""
        return self.call(CMD_WRITE, offset, len(data), flags=flags, payload=data).error

    def flush(self) -> int:
        """A flush; the reply's error."""
        return self.call(CMD_FLUSH).error

    def close(self) -> None:
        """Hang up, without the courtesy of a disconnect request."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
