# SPDX-License-Identifier: Apache-2.0
"""What a server sends in the transmission phase, taken apart: bytes in, finished requests out.

Nothing here does I/O but the one `fill` of the receive buffer, and nothing is believed: a reply
must answer a request that is in flight, with chunks that its command and the negotiation allow, of
lengths that fit, each byte of a read exactly once. What breaks a rule raises ProtocolViolation; the
stream can't be followed any further then.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect
from itertools import islice
from typing import TYPE_CHECKING, Final

from blockemu.drivers.errors import io_error
from blockemu.drivers.nbd.protocol import (
    EXTENDED_REPLY,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_REPLY_FLAG_DONE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    STRUCTURED_REPLY,
    ChunkType,
    Command,
    errno_of_error,
)
from blockemu.drivers.nbd.receive_buffer import WAIT_BYTES_MAX, ReceiveBuffer
from blockemu.drivers.zeroes import fill_zeroes
from blockemu.loop.coroutine import Future

if TYPE_CHECKING:
    from blockemu.loop.stream_socket import StreamSocket

CHUNKS_MAX: Final = 65536
"""Chunks of one reply: a read of 32 MiB in sectors that alternate between data and holes."""

_SIMPLE: Final = struct.Struct(">IIQ")
_OFFSET: Final = struct.Struct(">Q")
_HOLE: Final = struct.Struct(">QI")
_ERROR: Final = struct.Struct(">IH")
_EXTENT: Final = struct.Struct(">II")
_EXTENT_EXT: Final = struct.Struct(">QQ")
_ERROR_TYPES: Final = 1 << 15
U32_MAX: Final = 2**32 - 1


STATUS_BYTES_MAX: Final = 16 * ((1 << 20) + 1)
"""Of a block status: the document has servers send no more than 2^20 extents."""

EXTENTS_MAX: Final = 16384
"""Of those, what a request without REQ_ONE takes; who wants more asks again."""


class ProtocolViolation(Exception):
    """The server broke a rule of the protocol: `str()` says which."""


class InFlight:
    """A request that awaits its reply. `extents`: what BLOCK_STATUS brought, (length, state)."""

    __slots__ = (
        "chunks", "command", "cookie", "done", "error", "extents", "extents_max", "length",
        "offset", "pieces", "view",
    )  # fmt: skip

    def __init__(
        self, cookie: int, command: int, *, offset: int, length: int, view: memoryview | None
    ) -> None:
        self.cookie = cookie
        self.command = command
        self.offset = offset
        self.length = length
        self.view = view
        """Where a READ's data belongs; None when nobody wants it any more."""
        self.error: OSError | None = None
        self.extents: list[tuple[int, int]] = []
        self.extents_max = EXTENTS_MAX
        self.chunks = 0
        self.pieces: list[tuple[int, int]] = []
        """What of a READ has arrived: (start, end) in the request, sorted, none touching."""
        self.done: Future[None] = Future()

    def __repr__(self) -> str:
        name = Command(self.command).name.removeprefix("NBD_CMD_")
        return f"{name} of {self.length} bytes at {self.offset}"

    def cover(self, start: int, length: int) -> bool:
        """Take note that these bytes of a READ are there; False when some were there already."""
        end, pieces = start + length, self.pieces
        if not pieces:
            pieces.append((start, end))
            return True
        index = bisect(pieces, (start, end))
        if index and pieces[index - 1][1] > start:
            return False
        if index < len(pieces) and pieces[index][0] < end:
            return False
        if index < len(pieces) and pieces[index][0] == end:
            end = pieces.pop(index)[1]
        if index and pieces[index - 1][1] == start:
            start = pieces.pop(index - 1)[0]
            index -= 1
        pieces.insert(index, (start, end))
        return True

    def is_whole(self) -> bool:
        """Whether all bytes of a READ are there."""
        pieces = self.pieces
        return len(pieces) == 1 and pieces[0] == (0, self.length)


class ReplyParser:
    """Context: home thread of the connection.

    `in_flight` belongs to the connection, which adds to it; finished requests are taken out of it
    here, and their `done` is set.
    """

    def __init__(
        self,
        in_flight: dict[int, InFlight],
        *,
        structured: bool,
        context: int | None,
        extended: bool = False,
    ) -> None:
        self.received = ReceiveBuffer()
        self._in_flight = in_flight
        self._structured = structured
        self._extended = extended
        self._context = context
        self._status_kind = (
            ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS_EXT
            if extended
            else ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS
        )
        self._arriving: InFlight | None = None
        self._ends_with_payload = False
        self._status: bytearray | None = None

    def fill(self, sock: StreamSocket) -> bool:
        """Receive once; False at the end of the stream. Raises: OSError, BlockingIOError."""
        return self.received.fill(sock) > 0

    def parse(self) -> None:
        """Take apart what has arrived. Raises: ProtocolViolation."""
        while self._step():
            pass

    def give_up(self, request: InFlight) -> None:
        """Nobody waits for `request` any more, and its view is somebody else's."""
        request.view = None
        if self._arriving is request and self._status is None:
            self.received.stop_expecting()

    def release(self) -> None:
        """The connection is over."""
        self._arriving = None
        self._status = None
        self.received.release()

    # --- one message ---

    def _step(self) -> bool:
        """Take one message off the buffer; False when the next isn't there yet."""
        received = self.received
        if self._arriving is not None:
            if received.expecting or received.discard_left:
                return False
            request, self._arriving = self._arriving, None
            if self._status is not None:
                payload, self._status = bytes(self._status), None
                self._status_chunk(request, payload)
            if self._ends_with_payload:
                self._finish(request)
        available = received.end - received.start
        if available < 4:
            return False
        magic = int.from_bytes(received.data[received.start : received.start + 4], "big")
        if self._extended:
            if magic == NBD_EXTENDED_REPLY_MAGIC:
                return available >= EXTENDED_REPLY.size and self._extended_chunk(available)
        elif magic == NBD_SIMPLE_REPLY_MAGIC:
            return available >= _SIMPLE.size and self._simple_reply()
        elif magic == NBD_STRUCTURED_REPLY_MAGIC and self._structured:
            return available >= STRUCTURED_REPLY.size and self._structured_chunk(available)
        raise ProtocolViolation(f"sent a reply with a bad magic number, {magic:#x}")

    def _request(self, cookie: int) -> InFlight:
        request = self._in_flight.get(cookie)
        if request is None:
            raise ProtocolViolation(f"answered a request that it wasn't sent (cookie {cookie:#x})")
        return request

    def _simple_reply(self) -> bool:
        received = self.received
        _, error, cookie = _SIMPLE.unpack_from(received.data, received.start)
        request = self._request(cookie)
        if self._structured and request.command == Command.NBD_CMD_READ:
            raise ProtocolViolation(f"sent a simple reply to a {request}, against the agreement")
        if request.chunks:
            raise ProtocolViolation(f"sent a simple reply in the middle of the chunks of {request}")
        received.start += _SIMPLE.size
        if error:
            request.error = _server_error(error, "")
        elif request.command == Command.NBD_CMD_READ:
            request.cover(0, request.length)
            self._expect(request, 0, request.length, last=True)
            return True
        self._finish(request)
        return True

    def _expect(self, request: InFlight, start: int, length: int, *, last: bool) -> None:
        """The next `length` bytes are data of a READ."""
        self._arriving, self._ends_with_payload = request, last
        if request.view is None:
            self.received.discard(length)
        else:
            self.received.expect(request.view[start : start + length])

    def _finish(self, request: InFlight) -> None:
        if request.error is None:
            if request.command == Command.NBD_CMD_READ and not request.is_whole():
                raise ProtocolViolation(f"ended its reply to a {request} before all data was sent")
            if request.command == Command.NBD_CMD_BLOCK_STATUS and not request.extents:
                raise ProtocolViolation(f"ended its reply to a {request} without a status")
        del self._in_flight[request.cookie]
        if not request.done.done():
            request.done.set_result(None)

    # --- structured and extended replies ---

    def _structured_chunk(self, available: int) -> bool:
        received = self.received
        _, flags, kind, cookie, length = STRUCTURED_REPLY.unpack_from(received.data, received.start)
        request = self._request(cookie)
        return self._chunk(request, flags, kind, length, STRUCTURED_REPLY.size, available)

    def _extended_chunk(self, available: int) -> bool:
        received = self.received
        head = EXTENDED_REPLY.unpack_from(received.data, received.start)
        _, flags, kind, cookie, offset, length = head
        request = self._request(cookie)
        if offset != request.offset:
            raise ProtocolViolation(f"sent a chunk with offset {offset} for a {request}")
        return self._chunk(request, flags, kind, length, EXTENDED_REPLY.size, available)

    def _chunk(
        self, request: InFlight, flags: int, kind: int, length: int, head: int, available: int
    ) -> bool:
        """`head`: the size of the chunk's header; the next `length` bytes are its payload."""
        received = self.received
        last = bool(flags & NBD_REPLY_FLAG_DONE)
        is_data = kind == ChunkType.NBD_REPLY_TYPE_OFFSET_DATA
        is_long = length > WAIT_BYTES_MAX and not is_data
        if is_long and (kind != self._status_kind or length > STATUS_BYTES_MAX):
            raise ProtocolViolation(f"sent a chunk of type {kind} with {length} bytes")
        if is_data and not _OFFSET.size < length <= _OFFSET.size + request.length:
            raise ProtocolViolation(f"sent {length} bytes in a data chunk for a {request}")
        if available < head + (_OFFSET.size if is_data else 0 if is_long else length):
            return False
        request.chunks += 1
        if request.chunks > CHUNKS_MAX:
            raise ProtocolViolation(f"sent more than {CHUNKS_MAX} chunks for a {request}")
        received.start += head
        if is_data:
            self._data_chunk(request, length - _OFFSET.size, last=last)
            return True
        if is_long:
            self._long_status(request, length, last=last)
            return True
        payload = bytes(received.data[received.start : received.start + length])
        received.start += length
        self._small_chunk(request, kind, payload, last=last)
        if last:
            self._finish(request)
        return True

    def _long_status(self, request: InFlight, length: int, *, last: bool) -> None:
        """The next `length` bytes are a block status, and too many to wait for them here."""
        if request.command != Command.NBD_CMD_BLOCK_STATUS:
            raise ProtocolViolation(f"sent a block status for a {request}")
        self._arriving, self._ends_with_payload = request, last
        self._status = bytearray(length)
        self.received.expect(memoryview(self._status))

    def _data_chunk(self, request: InFlight, length: int, *, last: bool) -> None:
        (offset,) = _OFFSET.unpack_from(self.received.data, self.received.start)
        self.received.start += _OFFSET.size
        start = self._cover(request, offset, length)
        self._expect(request, start, length, last=last)

    def _cover(self, request: InFlight, offset: int, length: int) -> int:
        """Where in the request these bytes lie, which weren't there before."""
        if request.command != Command.NBD_CMD_READ:
            raise ProtocolViolation(f"sent data for a {request}")
        start = offset - request.offset
        if start < 0 or not length or start + length > request.length:
            raise ProtocolViolation(f"sent {length} bytes at {offset} for a {request}")
        if not request.cover(start, length):
            raise ProtocolViolation(f"sent the bytes at {offset} twice for a {request}")
        return start

    def _small_chunk(self, request: InFlight, kind: int, payload: bytes, *, last: bool) -> None:
        if kind == ChunkType.NBD_REPLY_TYPE_NONE:
            if payload or not last:
                raise ProtocolViolation("sent an empty chunk that isn't empty or isn't the last")
        elif kind == ChunkType.NBD_REPLY_TYPE_OFFSET_HOLE:
            self._hole_chunk(request, payload)
        elif kind == self._status_kind:
            self._status_chunk(request, payload)
        elif kind & _ERROR_TYPES:
            _error_chunk(request, payload)
        else:
            raise ProtocolViolation(f"sent a chunk of type {kind}, which wasn't agreed on")

    def _hole_chunk(self, request: InFlight, payload: bytes) -> None:
        if len(payload) != _HOLE.size:
            raise ProtocolViolation(f"sent a hole in {len(payload)} bytes, not {_HOLE.size}")
        offset, length = _HOLE.unpack(payload)
        start = self._cover(request, offset, length)
        if request.view is not None:
            fill_zeroes(request.view[start : start + length])

    def _status_chunk(self, request: InFlight, payload: bytes) -> None:
        if request.command != Command.NBD_CMD_BLOCK_STATUS:
            raise ProtocolViolation(f"sent a block status for a {request}")
        head, extent = (8, _EXTENT_EXT) if self._extended else (4, _EXTENT)
        count, rest = divmod(len(payload) - head, extent.size)
        if count < 1 or rest:
            raise ProtocolViolation(f"sent a block status of {len(payload)} bytes")
        if self._extended and int.from_bytes(payload[4:8], "big") != count:
            raise ProtocolViolation(f"sent {count} extents of block status, and another count")
        context = int.from_bytes(payload[:4], "big")
        if context != self._context or request.extents:
            raise ProtocolViolation(f"sent a block status of context {context}, not asked for")
        taken = islice(extent.iter_unpack(memoryview(payload)[head:]), request.extents_max)
        request.extents = list(taken)
        if not all(length for length, _ in request.extents):
            raise ProtocolViolation("sent a block status of no bytes")
        if any(state > U32_MAX for _, state in request.extents):
            raise ProtocolViolation("sent a block status with a state of more than 32 bits")


def _error_chunk(request: InFlight, payload: bytes) -> None:
    if len(payload) < _ERROR.size:
        raise ProtocolViolation(f"sent an error in {len(payload)} bytes")
    error, length = _ERROR.unpack_from(payload)
    if not error or length > len(payload) - _ERROR.size:
        raise ProtocolViolation(f"sent error {error} with a message of {length} bytes")
    if request.error is None:
        message = payload[_ERROR.size : _ERROR.size + length]
        request.error = _server_error(error, message.decode(errors="replace").strip())


def _server_error(error: int, message: str) -> OSError:
    code = errno_of_error(error)
    if message:
        return io_error(code, f"the NBD server says '{message}'")
    if code == errno.EINVAL and error != errno.EINVAL:
        return io_error(code, f"the NBD server answers with error {error}")
    return io_error(code, "the NBD server's answer")
