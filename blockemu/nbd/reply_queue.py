# SPDX-License-Identifier: Apache-2.0
"""Replies on their way out: many leave in one system call, in order, and partly when need be.

A reply is its head (`bytes`) and, for a READ, its data: a `memoryview` of a pool buffer that goes
back to the pool as soon as the kernel has taken the data. So in `parts` every memoryview has its
place in `buffers`, in the same order: the buffer to be given back behind it, None where more of the
buffer follows. That is all the bookkeeping a partial send needs.

The fast path appends to the lists itself (intake.py); `bytes_held` is then its duty, too.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from blockemu.loop.buffers import Buffer, BufferPool

EARLY_REPLY_BYTES = 128 * 1024
"""Queued bytes that are sent without waiting for the end of the round."""

EARLY_REPLY_PARTS = 16
"""The same for replies that end one by one, in heads and payloads: the client sends its next
requests while we answer the rest, and the disk doesn't run dry at the end of each batch."""

PARTS_MAX = min(os.sysconf("SC_IOV_MAX"), 1024)
"""Pieces that one sendmsg may gather. Linux takes 1024."""


class ReplyQueue:
    """Context: home thread of the connection."""

    __slots__ = ("_pool", "_sock", "buffers", "bytes_held", "parts")

    def __init__(self, sock: socket.socket, pool: BufferPool) -> None:
        self._sock = sock
        self._pool = pool
        self.parts: list[bytes | memoryview] = []
        self.buffers: list[Buffer | None] = []
        self.bytes_held = 0

    def add(self, head: bytes) -> None:
        """Queue a reply without data."""
        self.parts.append(head)
        self.bytes_held += len(head)

    def add_data(self, head: bytes, buffer: Buffer, length: int) -> None:
        """Queue a reply with the first `length` bytes of `buffer`, which is ours from now on."""
        assert length > 0
        self.parts.append(head)
        self.parts.append(buffer.view[:length])
        self.buffers.append(buffer)
        self.bytes_held += len(head) + length

    def add_parts(self, parts: Sequence[bytes | memoryview], buffer: Buffer | None) -> None:
        """Queue a reply of several parts. Its memoryviews are of `buffer`, which is ours from now
        on; if there is none of them, it goes back at once."""
        views = sum(isinstance(part, memoryview) for part in parts)
        assert buffer is not None or not views
        self.parts.extend(parts)
        self.bytes_held += sum(map(len, parts))
        if views:
            self.buffers.extend([None] * (views - 1))
            self.buffers.append(buffer)
        elif buffer is not None:
            self._pool.give(buffer)

    def send(self) -> bool:
        """Hand the kernel what it takes. True when nothing is left, False when it is full.

        Raises: OSError, when the peer is gone; the queue is then only good for `clear`.
        """
        parts = self.parts
        while parts:
            try:
                sent = self._sock.sendmsg(parts if len(parts) <= PARTS_MAX else parts[:PARTS_MAX])
            except (BlockingIOError, InterruptedError):
                return False
            if sent == self.bytes_held:
                self.clear()
            else:
                self._drop(sent)
        return True

    def clear(self) -> None:
        """Forget everything; buffers go back to the pool."""
        give = self._pool.give
        for buffer in self.buffers:
            if buffer is not None:
                give(buffer)
        self.buffers.clear()
        self.parts.clear()
        self.bytes_held = 0

    def _drop(self, sent: int) -> None:
        """Take the first `sent` bytes off the front."""
        self.bytes_held -= sent
        gone = buffers_gone = 0
        for part in self.parts:
            if sent < len(part):
                break
            sent -= len(part)
            gone += 1
            buffers_gone += isinstance(part, memoryview)
        del self.parts[:gone]
        if sent:
            self.parts[0] = self.parts[0][sent:]
        for buffer in self.buffers[:buffers_gone]:
            if buffer is not None:
                self._pool.give(buffer)
        del self.buffers[:buffers_gone]
