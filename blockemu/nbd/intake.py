# SPDX-License-Identifier: Apache-2.0
"""How requests come in: received, parsed, judged, and begun.

`parse` is the hot loop. It does the plain requests on the spot, and hands the others to `_begin`.
The order of its branches is the order of how common they are.

Payloads. One that has arrived whole is written straight from the receive buffer where the host
file takes that, else from a buffer of its own. A small one that hasn't is left until it has; a big
one is received into its own buffer. The payload of a refused WRITE is dropped, so that the
requests behind it are heard; a huge one ends the connection instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockemu.drivers.nbd.protocol import SIMPLE_REPLY_OK
from blockemu.drivers.nbd.receive_buffer import WAIT_BYTES_MAX, ReceiveBuffer
from blockemu.nbd.commands import DISC, PAYLOAD_LEN, READ, WRITE, check, payload_bytes
from blockemu.nbd.reply_queue import EARLY_REPLY_BYTES
from blockemu.nbd.request import Request

if TYPE_CHECKING:
    from blockemu.drivers.direct_map import DirectMap
    from blockemu.loop.buffers import Buffer
    from blockemu.loop.stream_socket import StreamSocket
    from blockemu.nbd.reply_style import Failure
    from blockemu.nbd.transmission import Connection

SHORT_TURN = 32
"""Part of a whole one that a connection gets in a round in which others have taken long."""


class Intake:
    """The receiving half of a connection. Context: as the connection's."""

    __slots__ = (
        "_connection",
        "_payload_request",
        "_received",
        "_received_bytes",
        "_refusal",
        "_sock",
        "_spare",
        "_started_ns",
    )

    def __init__(self, connection: Connection, sock: StreamSocket) -> None:
        self._connection = connection
        self._sock = sock
        self._received = ReceiveBuffer()
        self._received_bytes = 0
        # The WRITE whose payload is on its way, or the answer to one whose payload is dropped.
        self._payload_request: Request | None = None
        self._refusal = b""
        # Lends its callback to host I/O; becomes a request in flight only if that stays pending.
        self._spare = Request(connection)
        # When the batch was begun that is being parsed.
        self._started_ns = 0

    def forget(self) -> None:
        """Nothing more will be read: let go of a payload that is half there."""
        self._received.forget()
        request, self._payload_request = self._payload_request, None
        if request is not None:
            self._connection.forget_request(request)

    def half_sent(self) -> int:
        """Bytes that have come since the start, while a payload that has a buffer is half there;
        else -1."""
        return -1 if self._payload_request is None else self._received_bytes

    def release(self) -> None:
        """The connection is over: also give the memory back."""
        self.forget()
        self._received.release()

    def receive(self) -> bool:
        """Read the socket once. True when there may be something to parse now."""
        received, connection = self._received, self._connection
        try:
            length = received.fill(self._sock)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            connection.drop(f"receive failed: {error.strerror}")
            return False
        if not length:
            connection.finish("end of stream", by_client=True)
            return False
        self._received_bytes += length
        if received.expecting or received.discard_left:
            return False
        if self._refusal:
            connection.replies.add(self._refusal)
            self._refusal = b""
            connection.send_later()
        elif self._payload_request is not None:
            request, self._payload_request = self._payload_request, None
            self._start_write(request)
        return True

    def parse(self) -> bool:
        """Begin requests until a bound stops us: True, or there is no whole one left: False.

        What is used again and again is read into a local variable once: a tenth of the time. The
        direct map stays valid throughout, since nothing here suspends. Replies may be queued that
        nobody has been asked to send yet.
        """
        connection, received = self._connection, self._received
        self._started_ns = started_ns = connection.ctx.now_ns()
        reads = read_bytes = writes = write_bytes = 0
        replies, limits = connection.replies, connection.limits
        data, view, position, end = received.data, received.view, received.start, received.end
        take, give, style = connection.pool.take, connection.pool.give, connection.style
        unpack, header_bytes = style.header.unpack_from, style.header.size
        read_head, success, structured = style.read_head, style.success, style.structured
        extended = style.extended
        add_part, add_buffer = replies.parts.append, replies.buffers.append
        length_max, room, slots = limits.request_length_max, connection.room(), connection.slots()
        budget = limits.round_bytes_max
        request_cost = budget // limits.round_requests_max
        if connection.ctx.is_late(started_ns):
            budget //= SHORT_TURN
        spare_done: Callable[[int], None] = self._spare.done

        direct_map = connection.export.backend.direct_map
        if direct_map is None:
            plain_read = plain_write = -1
        else:
            plain_read, plain_write = style.plain_read, style.plain_write
            lookup_read, lookup_write = direct_map.lookup_read, direct_map.lookup_write
            find_read, find_write = direct_map.find_read, direct_map.find_write
            file = direct_map.file
            start_read, start_write = file.start_read, file.start_write
            in_place = file.writes_inline and file.memory_alignment == 1
            if connection.export.read_only:
                plain_write = -1

        try:
            while end - position >= header_bytes:
                word, cookie, offset, length = unpack(data, position)
                if budget <= 0:
                    received.start = position
                    connection.go_on_later()
                    return True
                if length > room:
                    if connection.must_wait(word & 0xFFFF, length):
                        received.start = position
                        return True
                    room = connection.room()
                if word == plain_read:
                    if 0 < length <= length_max and (
                        (host := lookup_read(offset, length)) >= 0
                        or (host := find_read(offset, length)) >= 0
                    ):
                        buffer = take(length)
                        payload = buffer.view[:length]
                        result = start_read(host, payload, spare_done, buffer.address)
                        if result == length:
                            position += header_bytes
                            budget -= length + request_cost
                            reads += 1
                            read_bytes += length
                            if structured:
                                head = read_head(cookie, offset, length)
                            else:
                                head = SIMPLE_REPLY_OK + cookie
                            add_part(head)
                            add_part(payload)
                            add_buffer(buffer)
                            replies.bytes_held += len(head) + length
                            if replies.bytes_held >= EARLY_REPLY_BYTES:
                                received.start = position
                                connection.send()
                                if connection.stopped:
                                    return True
                            continue
                        if result is None:
                            position += header_bytes
                            budget -= request_cost  # its bytes aren't moved in this round
                            spare = self._spare
                            spare.command, spare.cookie = READ, cookie
                            spare.offset, spare.length = offset, length
                            spare_done = self._pend(spare, buffer, direct_map)
                            slots -= 1
                            room = room - length if slots > 0 else -1
                            continue
                        give(buffer)
                elif word == plain_write:
                    payload_at = position + header_bytes
                    after = payload_at + length
                    if payload_at < after <= end and (
                        (host := lookup_write(offset, length)) >= 0
                        or (host := find_write(offset, length)) >= 0
                    ):
                        payload = view[payload_at:after]
                        if in_place:
                            result = start_write(host, payload, spare_done)
                        else:
                            buffer = take(length)
                            target = buffer.view[:length]
                            target[:] = payload
                            result = start_write(host, target, spare_done, buffer.address)
                        if result is None:
                            assert not in_place, "writes_inline was promised"
                            position = after
                            budget -= length + request_cost
                            spare = self._spare
                            spare.command, spare.cookie = WRITE, cookie
                            spare.offset, spare.length = offset, length
                            spare_done = self._pend(spare, buffer, direct_map)
                            slots -= 1
                            room = room - length if slots > 0 else -1
                            continue
                        if not in_place:
                            give(buffer)
                        if result == length:
                            position = after
                            budget -= length + request_cost
                            writes += 1
                            write_bytes += length
                            head = success(cookie, offset) if extended else SIMPLE_REPLY_OK + cookie
                            add_part(head)
                            replies.bytes_held += len(head)
                            continue
                received.start = position
                if not self._begin(word, cookie, offset, length):
                    break
                if connection.stopped:
                    return True
                position, end = received.start, received.end
                budget -= request_cost
                room, slots = connection.room(), connection.slots()
            else:
                received.start = position
            return False
        finally:
            if reads or writes:
                took_ns = (connection.ctx.now_ns() - started_ns) // (reads + writes)
                statistics = connection.export.statistics
                if reads:
                    statistics.reads.count_batch(reads, read_bytes, reads * took_ns)
                if writes:
                    statistics.writes.count_batch(writes, write_bytes, writes * took_ns)

    def _pend(
        self, request: Request, buffer: Buffer, direct_map: DirectMap | None
    ) -> Callable[[int], None]:
        """The spare request's host I/O is pending: it is in flight from now on. Returns the
        callback of the next spare."""
        assert direct_map is not None
        request.started_ns = self._started_ns
        request.buffer = buffer
        request.map, request.pin = direct_map, direct_map.pin()
        connection = self._connection
        connection.admit_data(request.length)
        done_with = connection.done_with
        self._spare = spare = done_with.pop() if done_with else Request(connection)
        return spare.done

    def _begin(self, word: int, cookie: bytes, offset: int, length: int) -> bool:
        """Begin a request that isn't plain. False when nothing behind it can be parsed yet."""
        connection, received = self._connection, self._received
        session, limits, style = connection.session, connection.limits, connection.style
        command, flags = word & 0xFFFF, word >> 16 & 0xFFFF
        if word >> 32 != style.magic:
            connection.finish("bad request magic")
            return False
        if command == DISC:
            connection.finish("the client's wish", by_client=True)
            return False
        failure = check(session, limits, command, flags, offset=offset, length=length)
        payload = payload_bytes(session, command, flags, length)
        if failure is not None:
            return self._refuse(command, cookie, offset, failure, payload)
        arrived = received.end - received.start - style.header.size
        if arrived < payload <= WAIT_BYTES_MAX:
            return False
        received.start += style.header.size
        request = Request(connection)
        request.describe(command, flags & ~PAYLOAD_LEN, cookie, offset=offset, length=length)
        request.started_ns = self._started_ns
        connection.admit(request)
        if command != WRITE or not payload:
            # A payload that tells what is asked; limits keep it small enough to have arrived.
            request.payload = bytes(received.view[received.start : received.start + payload])
            received.start += payload
            connection.ctx.spawn(request.serve())
            return True
        request.buffer = connection.pool.take(length)
        received.expect(request.buffer.view[:length])
        if received.expecting:
            self._payload_request = request
            return False
        self._start_write(request)
        return True

    def _refuse(
        self, command: int, cookie: bytes, offset: int, failure: Failure, payload: int
    ) -> bool:
        """Answer a request with an error, after its payload has been dropped."""
        connection, received, style = self._connection, self._received, self._connection.style
        if payload > connection.limits.payload_dropped_max(extended=style.extended):
            connection.finish(f"a refused payload of {payload} bytes")
            return False
        connection.count(command, 0, failure.error, connection.ctx.now_ns() - self._started_ns)
        refusal = style.failure(cookie, offset, failure)
        received.start += style.header.size
        received.discard(payload)
        if received.discard_left:
            self._refusal = refusal
            return False
        connection.replies.add(refusal)
        connection.send_later()
        return True

    def _start_write(self, request: Request) -> None:
        """Write a payload that has a buffer of its own: by the direct map, else by the graph."""
        connection = self._connection
        direct_map = connection.export.backend.direct_map
        if not request.flags and direct_map is not None:
            host = direct_map.lookup_write(request.offset, request.length)
            if host >= 0:
                assert request.buffer is not None
                view = request.buffer.view[: request.length]
                result = direct_map.file.start_write(host, view, request.done)
                if result is None:
                    request.map, request.pin = direct_map, direct_map.pin()
                    return
                if result == request.length:
                    connection.finish_request(request, None)
                    return
        connection.ctx.spawn(request.serve())
