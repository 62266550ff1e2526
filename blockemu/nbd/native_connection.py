# SPDX-License-Identifier: Apache-2.0
"""A connection whose data C moves (native/transmission.c), and what is left for Python to do.

Plain requests never come here. What C can't do is a *fault*: a miss in the map, a flag, another
command, host I/O that went wrong. C hands over the request with its payload, or with the memory for
what is to be read; it is judged, served and answered as transmission.py's are, with the same errors
(request.py), and its reply leaves in C's stream of replies.

Reads and writes that C can't do on the spot, such as those that miss the page cache, find the host
file by the direct map here, too: that is how they reach the workers in batches. Only what the map
doesn't know, or what has failed once, walks the graph.

The map. C looks requests up in the twin of the node's direct map, without asking whether that is
still the node's. A map that the node has dropped misses for ever; so whenever a fault has been
served, and when a drained section ends, we look for another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from sys import byteorder
from typing import TYPE_CHECKING, Any

from blockemu.drivers.nbd.protocol import error_of_errno
from blockemu.loop.buffers import Buffer
from blockemu.nbd._transmission import ffi, lib
from blockemu.nbd.commands import PAYLOAD_LEN, READ, WITH_DATA, check
from blockemu.nbd.connection import BaseConnection, State
from blockemu.nbd.reply_style import EXTENDED, SIMPLE, STRUCTURED, Failure, ReplyStyle
from blockemu.nbd.request import Request

if TYPE_CHECKING:
    import socket

    from blockemu.drivers.native_map import NativeMap
    from blockemu.limits import Limits
    from blockemu.loop.native_poller import NativePoller
    from blockemu.nbd._transmission import NativeStatistics
    from blockemu.nbd.session import Session

_POLL = ffi.typeof("struct native_poll *")
_MAP = ffi.typeof("struct direct_map *")
_REQUEST = ffi.typeof("struct nbd_request *")
_BYTES = ffi.typeof("char *")
_NUMBER = ffi.typeof("uintptr_t")

_PART = ffi.typeof("struct nbd_part[]")

_FAULT = lib.NBD_FAULT

_STYLES = {
    SIMPLE.name: lib.NBD_STYLE_SIMPLE,
    STRUCTURED.name: lib.NBD_STYLE_STRUCTURED,
    EXTENDED.name: lib.NBD_STYLE_EXTENDED,
}

_ENDS = {
    # The words for the log, and whether the client has said that it sends no more.
    lib.NBD_END: ("end of stream", True),
    lib.NBD_DISCONNECT: ("the client's wish", True),
    lib.NBD_BAD_MAGIC: ("bad request magic", False),
    lib.NBD_TOO_LONG: ("a refused payload of {} bytes", False),
}
_LOSSES = {lib.NBD_RECEIVE_FAILED: "receive", lib.NBD_SEND_FAILED: "send"}


class BorrowedMemory(Buffer):
    """C's memory of one request. Nobody may use its view once the request is answered."""

    __slots__ = ()

    def __init__(self, address: int, length: int) -> None:
        self.address = address
        self.capacity = length
        self.view = memoryview(ffi.buffer(ffi.cast(_BYTES, address), length))


class NativeRequest(Request):
    """A fault that is being served."""

    __slots__ = ("native",)

    native: Any
    """C's `struct nbd_request`, ours until nbd_finish."""


class NativeConnection(BaseConnection):
    """A connection whose data C moves. `ctx.native` is there."""

    __slots__ = ("_fault", "_handle", "_map", "_native", "_statistics", "_token")

    # What `start` finds.
    _native: NativePoller

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        *,
        limits: Limits,
        on_closed: Callable[[], None],
        peer: str = "",
    ) -> None:
        super().__init__(sock, session, limits=limits, on_closed=on_closed, peer=peer)
        # C's half; None before `start` and after NBD_RELEASED.
        self._handle: Any = None
        self._token = 0
        self._fault = ffi.new("struct nbd_fault *")
        self._map: NativeMap | None = None
        self._statistics: NativeStatistics | None = None

    # --- its part of the life cycle ---

    def _begin_to_serve(self) -> None:
        assert self.ctx.native is not None
        self._native = native = self.ctx.native
        statistics = self.export.statistics
        if statistics.native is None:
            statistics.native = ffi.new("struct nbd_statistics *")
        self._statistics = statistics.native  # C counts there until nbd_free
        self._token = native.add_native(self._on_event)
        handle = lib.nbd_open(
            ffi.cast(_POLL, native.address),
            self._fd,
            self._token,
            native_limits(self.limits, self.style),
            statistics.native,
            _STYLES[self.style.name],
        )
        if handle == ffi.NULL:
            native.remove_native(self._token)
            self.drop("no memory to serve it")
            return
        self._handle = handle
        self._update_map()
        if self.export.quiet:
            lib.nbd_set_quiet(handle, 1)
        lib.nbd_resume(handle)

    def _stop_reading(self) -> None:
        if self._handle is not None:
            lib.nbd_stop(self._handle)

    def _owes(self) -> bool:
        return self._handle is not None and bool(lib.nbd_is_busy(self._handle))

    def _let_go(self) -> None:
        if self._handle is not None:
            lib.nbd_close(self._handle)

    def _is_idle(self) -> bool:
        return self._handle is None

    def _on_event(self, what: int, value: int) -> None:
        """C has something to say: enum nbd_event."""
        if what == _FAULT:
            self._serve_fault(ffi.cast(_REQUEST, value))
        elif what == lib.NBD_RELEASED:
            self._released()
        elif what == lib.NBD_ANSWERED:
            self._leave_if_answered()
        elif what in _ENDS:
            reason, by_client = _ENDS[what]
            self.finish(reason.format(value), by_client=by_client)
        elif self._state is State.OPEN or self._state is State.FINISHING:
            self.drop(f"{_LOSSES[what]} failed: {os.strerror(value)}")

    def _released(self) -> None:
        """C has nothing in flight and never will have: the last of its events."""
        handle, self._handle = self._handle, None
        lib.nbd_free(handle)
        self._native.remove_native(self._token)
        self._map = None
        self._closed_if_idle()

    # --- the map ---

    def pause(self) -> None:
        if self._handle is not None:
            lib.nbd_set_quiet(self._handle, 1)

    def resume(self) -> None:
        if self._handle is not None:
            self._update_map()
            lib.nbd_set_quiet(self._handle, 0)

    def _update_map(self) -> None:
        """Have C look into the map that the node has now."""
        direct_map = self.export.backend.direct_map
        native_map = None if direct_map is None else direct_map.native_handle(self._native)
        if native_map is not self._map:
            address = 0 if native_map is None else native_map.address
            lib.nbd_set_map(self._handle, ffi.cast(_MAP, address), not self.export.read_only)
            self._map = native_map  # which keeps the one that C knows alive

    # --- faults ---

    def _serve_fault(self, native: Any) -> None:
        """Answer a request that C can't, now or later."""
        fault = self._fault
        lib.nbd_describe(native, fault)
        command, flags, offset, length = fault.command, fault.flags, fault.offset, fault.length
        failure = check(self.session, self.limits, command, flags, offset=offset, length=length)
        if fault.error and failure is None:
            failure = Failure(error_of_errno(fault.error), os.strerror(fault.error))
        cookie = fault.cookie.to_bytes(8, byteorder)
        if failure is not None:
            self.count(command, 0, failure.error, 0)
            self._answer(native, [self.style.failure(cookie, offset, failure)])
            return
        assert not fault.dropped, "a payload that check() finds nothing wrong with was dropped"
        request = self.done_with.pop() if self.done_with else NativeRequest(self)
        assert isinstance(request, NativeRequest)
        flags &= ~PAYLOAD_LEN
        request.describe(command, flags, cookie, offset=offset, length=length)
        request.started_ns = self.ctx.now_ns()
        request.native = native
        address = fault.address
        assert address or not length or command not in WITH_DATA, "no memory for its data"
        if address:
            memory = BorrowedMemory(address, length)
            if command in WITH_DATA:
                request.buffer = memory
            else:
                request.payload = bytes(memory.view)
        if flags or fault.retry or not address or not self._start_by_map(request):
            self.ctx.spawn(request.serve())

    def _start_by_map(self, request: Request) -> bool:
        """Read or write the host file by the direct map, if that knows where."""
        direct_map = self.export.backend.direct_map
        buffer = request.buffer
        if direct_map is None or buffer is None or request.command not in WITH_DATA:
            return False
        if request.command == READ:
            host = direct_map.lookup_read(request.offset, request.length)
            start = direct_map.file.start_read
        else:
            host = direct_map.lookup_write(request.offset, request.length)
            start = direct_map.file.start_write
        if host < 0:
            return False
        result = start(host, buffer.view, request.done)
        if result is None:
            request.map, request.pin = direct_map, direct_map.pin()
            return True
        if result != request.length:
            return False
        self.finish_request(request, None)
        self.done_with.append(request)
        return True

    def finish_request(self, request: Request, failure: Failure | None) -> None:
        assert isinstance(request, NativeRequest)
        buffer, request.buffer = request.buffer, None
        native, request.native = request.native, None
        if self._state is not State.CLOSED:
            error = 0 if failure is None else int(failure.error)
            took_ns = self.ctx.now_ns() - request.started_ns
            self.count(request.command, request.length, error, took_ns)
        if failure is not None:
            self._answer(native, [self.style.failure(request.cookie, request.offset, failure)])
        elif request.answer is not None:
            assert buffer is None or isinstance(buffer, BorrowedMemory)
            self._answer(native, request.answer)
        else:
            lib.nbd_finish(native)
        if self._state is State.OPEN:
            self._update_map()

    def _answer(self, native: Any, parts: Sequence[bytes | memoryview]) -> None:
        """Send these parts; those that aren't of the request's own memory are copied."""
        kept = [ffi.from_buffer(part) for part in parts]
        described = [(int(ffi.cast(_NUMBER, part)), len(part)) for part in kept]
        if lib.nbd_answer(native, ffi.new(_PART, described), len(described)) < 0:
            self.drop("no memory for a reply")
            lib.nbd_finish(native)  # it is forgotten now


def native_limits(limits: Limits, style: ReplyStyle) -> Any:
    """A `struct nbd_limits`."""
    return ffi.new(
        "struct nbd_limits *",
        {
            "request_length_max": limits.request_length_max,
            "discard_length_max": limits.payload_dropped_max(extended=style.extended),
            "in_flight_requests_max": limits.in_flight_requests_max,
            "unsent_parts_max": limits.unsent_parts_max,
            "in_flight_bytes_max": limits.in_flight_bytes_max,
            "unsent_bytes_max": limits.unsent_bytes_max,
            "round_requests_max": limits.round_requests_max,
            "round_bytes_max": limits.round_bytes_max,
        },
    )
