# SPDX-License-Identifier: Apache-2.0
"""One connection to the control socket: bytes in, a queue of requests, bytes out.

Requests of one client are carried out one after the other, in order; other clients' go on in
between. A client that sends faster than its commands finish, or doesn't read its responses, isn't
read any more until it has caught up, so what it can make us hold is bounded.
"""

from __future__ import annotations

import json
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from blockemu.loop.aio_context import AioContext
from blockemu.qmp.command import Session
from blockemu.qmp.dispatch import respond
from blockemu.qmp.errors import QmpError
from blockemu.qmp.json_stream import JsonStream

log = logging.getLogger(__name__)

REQUESTS_QUEUED_MAX = 8
"""QEMU's own bound: clients pipeline a few commands, not more."""

OUTPUT_BYTES_MAX = 1 << 20
"""Unread output beyond which the client's requests wait. One response may be larger than that."""

RECEIVE_BYTES = 65536


class Monitor:
    """Context: home thread of `ctx`, for everything."""

    def __init__(
        self,
        ctx: AioContext,
        sock: socket.socket,
        session: Session,
        *,
        greeting: dict[str, Any],
        on_close: Callable[[Monitor], None],
    ) -> None:
        self.session = session
        self._ctx = ctx
        self._sock = sock
        self._on_close = on_close
        self._stream = JsonStream()
        self._requests: deque[bytes | QmpError] = deque()
        self._output = bytearray()
        self._working = False
        self._closed = False
        self._end_of_input = False
        self.send(greeting)

    @property
    def is_open(self) -> bool:
        """The client hasn't hung up, and neither have we."""
        return not self._closed

    def send(self, message: dict[str, Any]) -> None:
        """Queue one message; it leaves as soon as the socket takes it."""
        if self._closed:
            return
        self._output += json.dumps(message).encode() + b"\r\n"
        self._write()

    def close(self) -> None:
        """Drop the connection; what the socket takes at once is still sent."""
        if self._closed:
            return
        self._send_output()
        self._closed = True
        self._ctx.set_fd_handler(self._sock.fileno())
        self._sock.close()
        self._requests.clear()
        self._on_close(self)

    def _update_interest(self) -> None:
        if self._closed:
            return
        reading = not self._end_of_input and not self._is_behind()
        self._ctx.set_fd_handler(
            self._sock.fileno(),
            read=self._read if reading else None,
            write=self._write if self._output else None,
        )

    def _is_behind(self) -> bool:
        return len(self._requests) >= REQUESTS_QUEUED_MAX or len(self._output) > OUTPUT_BYTES_MAX

    def _read(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            log.debug("control connection: %s", error)
            self.close()
            return
        if not data:
            self._end_of_input = True
            if not self._working and not self._requests:
                self.close()
            else:
                self._update_interest()
            return
        self._requests.extend(self._stream.feed(data))
        self._update_interest()
        self._start_working()

    def _write(self) -> None:
        if not self._send_output():
            self.close()
            return
        self._update_interest()
        self._start_working()

    def _send_output(self) -> bool:
        """Send what the socket takes; False when the client is gone."""
        try:
            while self._output:
                sent = self._sock.send(self._output, socket.MSG_NOSIGNAL)
                del self._output[:sent]
        except (BlockingIOError, InterruptedError):
            return True
        except OSError as error:
            log.debug("control connection: %s", error)
            self._output.clear()
            return False
        return True

    def _start_working(self) -> None:
        if self._requests and not self._working and len(self._output) <= OUTPUT_BYTES_MAX:
            self._working = True
            self._ctx.spawn(self._work(), name="control connection")

    async def _work(self) -> None:
        """Carry out requests until there are none, or the client has too much to read."""
        try:
            while self._requests and len(self._output) <= OUTPUT_BYTES_MAX:
                request = self._requests.popleft()
                self.send(await respond(self.session, request))
        finally:
            self._working = False
        if self._end_of_input and not self._requests:
            self.close()
        else:
            self._update_interest()
