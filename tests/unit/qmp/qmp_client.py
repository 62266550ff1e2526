# SPDX-License-Identifier: Apache-2.0
"""A QMP client that lives on the loop under test: no thread, no waiting."""

from __future__ import annotations

import json
import socket
from collections import deque
from typing import Any

from blockemu.loop.aio_context import AioContext


class LoopClient:
    """The client's end of a connection to a monitor on the same AioContext."""

    def __init__(self, ctx: AioContext, sock: socket.socket) -> None:
        self._ctx = ctx
        self.sock = sock
        self._buffer = b""
        self._lines: deque[bytes] = deque()
        self.ended = False
        sock.setblocking(False)
        self.listen()

    def listen(self) -> None:
        """Read whatever comes."""
        self._ctx.set_fd_handler(self.sock.fileno(), read=self._read)

    def stall(self) -> None:
        """Read nothing any more."""
        self._ctx.set_fd_handler(self.sock.fileno())

    def _read(self) -> None:
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self.ended = True
            self.stall()
            return
        *lines, self._buffer = (self._buffer + data).split(b"\r\n")
        self._lines.extend(lines)

    def receive(self) -> dict[str, Any]:
        """The next message; polls the loop until it is there."""
        while not self._lines:
            assert not self.ended, "the server hung up"
            self._ctx.poll(blocking=True)
        message: dict[str, Any] = json.loads(self._lines.popleft())
        return message

    def wait_for_end(self) -> None:
        """Polls the loop until the server has hung up."""
        while not self.ended:
            self._ctx.poll(blocking=True)

    def send(self, text: str | bytes) -> None:
        """Send raw text."""
        self.sock.sendall(text.encode() if isinstance(text, str) else text)

    def ask(self, text: str) -> dict[str, Any]:
        """Send raw text, and take the next message."""
        self.send(text)
        return self.receive()

    def execute(self, name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send one command, and take its response."""
        command: dict[str, Any] = {"execute": name}
        if arguments is not None:
            command["arguments"] = arguments
        return self.ask(json.dumps(command))

    def close(self) -> None:
        """Hang up."""
        if self.sock.fileno() >= 0:
            self.stall()
            self.sock.close()
