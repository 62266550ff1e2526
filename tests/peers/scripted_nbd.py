# SPDX-License-Identifier: Apache-2.0
"""An NBD server in a thread that says what a test has it say, true or not."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from blockemu.drivers.nbd.protocol import (
    GREETING,
    IHAVEOPT,
    INFO_EXPORT,
    NBD_REP_MAGIC,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    Option,
    Reply,
)

Serve = Callable[["Client"], None]
SIZE = 1 << 20


class Client:
    """One connection, as the server sees it. Blocking; the end of the stream is an EOFError."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def greet(self, flags: int = 3) -> None:
        self.send(GREETING.pack(NBDMAGIC, IHAVEOPT, flags))
        self.receive(4)

    def option(self) -> tuple[int, bytes]:
        _, option, length = OPTION.unpack(self.receive(OPTION.size))
        return option, self.receive(length)

    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(OPTION_REPLY.pack(NBD_REP_MAGIC, option, kind, len(data)) + data)

    def negotiate(
        self,
        *,
        size: int = SIZE,
        flags: int = 0x65,
        structured: bool = False,
        extended: bool = False,
        infos: bytes = b"",
        refusal: int | None = None,
    ) -> None:
        """The whole negotiation, as a good server does it. `infos`: one more NBD_REP_INFO.
        `refusal`: the error with which the export isn't given."""
        self.greet()
        while True:
            option, _ = self.option()
            if (option == Option.NBD_OPT_STRUCTURED_REPLY and structured) or (
                option == Option.NBD_OPT_EXTENDED_HEADERS and extended
            ):
                self.reply(option, Reply.NBD_REP_ACK)
            elif option == Option.NBD_OPT_GO and refusal is not None:
                self.reply(option, refusal)
            elif option == Option.NBD_OPT_SET_META_CONTEXT:
                self.reply(
                    option, Reply.NBD_REP_META_CONTEXT, struct.pack(">I", 1) + b"base:allocation"
                )
                self.reply(option, Reply.NBD_REP_ACK)
            elif option == Option.NBD_OPT_GO:
                self.reply(option, Reply.NBD_REP_INFO, INFO_EXPORT.pack(0, size, flags))
                if infos:
                    self.reply(option, Reply.NBD_REP_INFO, infos)
                self.reply(option, Reply.NBD_REP_ACK)
                return
            elif option == Option.NBD_OPT_EXPORT_NAME:
                self.send(struct.pack(">QH", size, flags))
                return
            else:
                self.reply(option, Reply.NBD_REP_ERR_UNSUP)

    def request(self) -> tuple[int, int, bytes, int, int]:
        """(flags, command, cookie, offset, length) of the next request."""
        _, flags, command, cookie, offset, length = struct.unpack(">IHH8sQI", self.receive(28))
        return flags, command, cookie, offset, length


class ScriptedNbd:
    """Calls `serve` with each client, in a thread of its own, until the block ends."""

    def __init__(self, where: Path | socket.socket, serve: Serve) -> None:
        """`where`: the path of a new unix socket, or a socket that listens."""
        self.clients = 0
        self._serve = serve
        if isinstance(where, Path):
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(str(where))
            self._listener.listen(16)
        else:
            self._listener = where
        self._threads = [threading.Thread(target=self._run, daemon=True)]

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.clients += 1
            thread = threading.Thread(target=self._serve_one, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve_one(self, sock: socket.socket) -> None:
        with sock:
            try:
                self._serve(Client(sock))
            except (EOFError, OSError):
                pass  # the client has gone

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
