# SPDX-License-Identifier: Apache-2.0
"""Bytes from a peer: headers and small payloads in one buffer, big payloads where they belong.

`data[start:end]` is what has arrived and isn't parsed yet. A message whose payload is small is left
here until it is whole, and is then written straight from here. A big payload gets a buffer of its
own as soon as its header is parsed; what is missing is received right into it (`expect`), with no
more than a header's worth of look-ahead, so that big payloads are not copied twice. A payload that
nobody wants (`discard`) is dropped as it arrives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.loop.buffers import untouched_memory

if TYPE_CHECKING:
    from blockemu.loop.stream_socket import StreamSocket

CAPACITY_BYTES = 512 * 1024
"""Holds a batch of 128 writes of 4 KiB, or one of 32 with room to spare. Nothing of the memory is
there until a peer makes it use a page."""

WAIT_BYTES_MAX = 64 * 1024
"""Payloads up to this size wait here until they are whole; they always fit after `_make_room`."""

LOOK_AHEAD_BYTES = 4 * 1024
"""Received beyond the end of a big payload, in the same call: the next header or a few."""


class ReceiveBuffer:
    """Context: home thread of the connection."""

    __slots__ = ("_expected", "data", "discard_left", "end", "start", "view")

    def __init__(self) -> None:
        self.view = untouched_memory(CAPACITY_BYTES)
        self.data = self.view
        self.start = 0
        self.end = 0
        self.discard_left = 0
        self._expected: memoryview | None = None

    @property
    def expecting(self) -> bool:
        """A payload is still on its way into a buffer of its own."""
        return self._expected is not None

    def expect(self, target: memoryview) -> None:
        """What comes next belongs into `target`. First moves there what has arrived already;
        `expecting` says whether that was all of it."""
        arrived = min(len(target), self.end - self.start)
        target[:arrived] = self.view[self.start : self.start + arrived]
        self.start += arrived
        if arrived < len(target):
            self._expected = target[arrived:]

    def discard(self, length: int) -> None:
        """Drop the next `length` bytes; `discard_left` says how many have yet to arrive."""
        arrived = min(length, self.end - self.start)
        self.start += arrived
        self.discard_left = length - arrived

    def stop_expecting(self) -> None:
        """Nobody wants the payload any more that is on its way: drop the rest of it."""
        if self._expected is not None:
            self.discard_left = len(self._expected)
            self._expected = None

    def forget(self) -> None:
        """Nothing more is to be parsed: no payload is expected any more."""
        self._expected = None
        self.discard_left = 0

    def release(self) -> None:
        """The connection is over: give the memory back now. Who is in the middle of parsing keeps
        it until then; whatever refers to the connection in circles would keep it for minutes."""
        self.forget()
        self.view = memoryview(b"")
        self.data = self.view
        self.start = self.end = 0

    def fill(self, sock: StreamSocket) -> int:
        """Receive once. The number of bytes, 0 at the end of the stream.

        Raises: BlockingIOError when there is nothing; OSError when the peer is gone.
        """
        if self.start == self.end:
            self.start = self.end = 0
        elif CAPACITY_BYTES - self.end < 2 * WAIT_BYTES_MAX:
            self._make_room()
        if self._expected is not None:
            return self._fill_expected(sock, self._expected)
        received = sock.recv_into(self.view[self.end :])
        self.end += received
        if self.discard_left:
            self.discard(self.discard_left)
        return received

    def _fill_expected(self, sock: StreamSocket, expected: memoryview) -> int:
        assert self.start == self.end == 0
        received = sock.recvmsg_into([expected, self.view[:LOOK_AHEAD_BYTES]])[0]
        if received < len(expected):
            self._expected = expected[received:]
        else:
            self._expected = None
            self.end = received - len(expected)
        return received

    def _make_room(self) -> None:
        """Move what isn't parsed to the front."""
        length = self.end - self.start
        self.view[:length] = self.view[self.start : self.end]
        self.start, self.end = 0, length
