# SPDX-License-Identifier: Apache-2.0
"""Linux AIO on an AioContext: requests leave in batches, completions come back in batches.

A request is staged with one struct.pack_into. What a dispatch round has staged leaves in one
io_submit at its end, or `AIO_MAX_BATCH` at a time where there is much. Completions wake the context
by an eventfd and are copied out of the kernel's ring in one call; what has finished by the time
io_submit returns is taken at once, without the detour.

Slots number the requests that are staged or in the kernel; they are reused last in, first out, so a
short queue keeps touching the same few cache lines. A request that finds no slot waits in a queue
of our own, in order. The kernel may also say that it has no room (EAGAIN from io_submit): those
stay staged, and leave when completions have made room. EAGAIN is never an I/O error here.

Alternatives not taken: io_uring (often switched off in containers; the engine seam in host_file.py
leaves room for it), one C call per request (270 ns and a release of the GIL each), POSIX aio (glibc
runs threads behind it).
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from blockemu.loop._libaio import ffi, lib
from blockemu.loop.event_notifier import EventNotifier

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

IO_CMD_PREAD: Final = 0
IO_CMD_PWRITE: Final = 1

# Requests in the kernel at once. NVMe takes 1023 a queue, and more than a few hundred only adds
# latency; the host allows 65536 in all (fs.aio-max-nr).
DEPTH: Final = 256
# Requests in one io_submit, QEMU's aio-max-batch: a full batch leaves before the round ends, and
# the disk begins while the next is staged. With all 32 of a deep queue in one, the disk idles while
# they are staged: a fifth of the IOPS. With 4, the calls cost more than that gains.
AIO_MAX_BATCH: Final = 8
# Reaps in one go of the completion handler: other handlers get their turn after depth * this.
REAPS_PER_ROUND_MAX: Final = 4
# Nothing in the kernel, and yet it has no room: look again so much later.
NO_ROOM_RETRY_NS: Final = 1_000_000

Done = Callable[[int], None]
# What a request that moved less than asked is handed to: (offset, view, result, done).
Short = Callable[[int, memoryview, int, Done], None]

_REQUEST: Final = struct.Struct("@QQqiiiI")
_REQUEST_BYTES: Final = _REQUEST.size
assert ffi.sizeof("struct aio_request") == _REQUEST_BYTES


class LinuxAio:
    """One io_context of the kernel, served by one AioContext.

    Context: home thread of ctx, for all methods.
    """

    def __init__(self, ctx: AioContext, *, depth: int = DEPTH, user_ring: bool = True) -> None:
        """Sets up the kernel's side. `user_ring=False` reaps by io_getevents only.

        Raises: OSError, where the kernel has no AIO or its fs.aio-max-nr is used up.
        """
        assert depth > 0
        self._ctx = ctx
        self.depth = depth
        self._notifier = EventNotifier()
        holder = ffi.new("struct aio_queue **")
        error = lib.aio_queue_open(holder, depth, self._notifier.fd, int(user_ring))
        if error < 0:
            self._notifier.close()
            raise OSError(-error, f"io_setup: {os.strerror(-error)}")
        self._queue = holder[0]
        self._staged = ffi.buffer(self._queue.staged, depth * _REQUEST_BYTES)
        self._slots = _int64_view(self._queue.finished_slots, depth)
        self._results = _int64_view(self._queue.finished_results, depth)
        # What queue.staged_count is to be: fields of C structures cost ten times as much.
        self._staged_count = 0
        self._free = list(range(depth - 1, -1, -1))
        # By slot: done, length, view or None, short, offset. The view keeps the memory alive.
        self._requests: list[Any] = [None] * depth
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._finished: deque[tuple[int, int]] = deque()
        self._deferred = False
        self._closed = False
        self._finish_bh = ctx.new_bh(self._finish, name="linux-aio")
        self._retry = ctx.new_timer(self._defer)
        ctx.set_fd_handler(self._notifier.fd, read=self._on_event)

    def queue_read(
        self, fd: int, address: int, length: int, offset: int, done: Done, rw_flags: int = 0
    ) -> None:
        """Reads into memory at `address`, which the caller keeps alive until `done`.

        `done` gets the kernel's result, bytes (maybe fewer than asked) or -errno, from a later
        round, never from within this call.
        """
        self.queue(IO_CMD_PREAD, fd, address, length, offset, done, rw_flags=rw_flags)

    def queue_write(
        self, fd: int, address: int, length: int, offset: int, done: Done, rw_flags: int = 0
    ) -> None:
        """Writes from memory at `address`; otherwise as queue_read."""
        self.queue(IO_CMD_PWRITE, fd, address, length, offset, done, rw_flags=rw_flags)

    def queue(
        self,
        opcode: int,
        fd: int,
        address: int,
        length: int,
        offset: int,
        done: Done,
        view: Any = None,
        short: Short | None = None,
        rw_flags: int = 0,
    ) -> None:
        """The hot path of both, called by position since keywords cost. `view`, where given, is
        kept until the request is done.

        With `short`, a result other than `length` goes there, with the request and `done`, and not
        to `done`: so the plain case needs no closure.
        """
        if self._free and not self._waiting:
            slot = self._free.pop()
            self._requests[slot] = (done, length, short, offset, view)
            count = self._staged_count
            _REQUEST.pack_into(
                self._staged,
                count * _REQUEST_BYTES,
                address,
                length,
                offset,
                fd,
                rw_flags,
                opcode,
                slot,
            )
            self._staged_count = count = count + 1
            if not self._deferred:
                self._deferred = True
                self._ctx.defer(self._submit)
            if not count % AIO_MAX_BATCH:
                self._push()
        else:
            self._waiting.append((opcode, fd, address, length, offset, done, view, short, rw_flags))

    @property
    def requests_in_flight(self) -> int:
        """Requests whose `done` hasn't run: waiting for a slot, staged, or in the kernel."""
        return self.depth - len(self._free) + len(self._waiting)

    def close(self) -> None:
        """Gives the kernel's side back. Nothing may be in flight."""
        if self._closed:
            return
        assert self.requests_in_flight == 0, "Linux AIO closed with requests in flight"
        self._closed = True
        self._ctx.set_fd_handler(self._notifier.fd)
        self._finish_bh.delete()
        self._retry.cancel()
        self._slots.release()
        self._results.release()
        lib.aio_queue_close(self._queue)
        self._notifier.close()

    def _defer(self) -> None:
        if not self._deferred:
            self._deferred = True
            self._ctx.defer(self._submit)

    def _submit(self) -> None:
        """End of the round: all that is staged leaves."""
        self._deferred = False
        if self._closed:
            return
        if self._staged_count:
            self._push()
        if self._finished:
            self._finish()
        elif self._staged_count and not self._queue.in_kernel:
            self._retry.arm(self._ctx.now_ns() + NO_ROOM_RETRY_NS)

    def _push(self) -> None:
        """Hands the kernel what is staged. What has finished meanwhile waits for `_finish`."""
        queue = self._queue
        queue.staged_count = self._staged_count
        count = lib.aio_queue_submit(queue)
        self._staged_count = queue.staged_count
        if count:
            self._take(count)

    def _on_event(self) -> None:
        # Cleared before reaping: what finishes from here on sets it again.
        self._notifier.test_and_clear()
        for _ in range(REAPS_PER_ROUND_MAX):
            count = lib.aio_queue_reap(self._queue)
            self._take(count)
            self._finish()
            if count < self.depth or self._closed:
                return  # the ring was empty; what came later has set the notifier again
        self._notifier.set()  # more may be there: come back in the next round

    def _take(self, count: int) -> None:
        """Copies `count` results out of the C arrays, which the next call into C overwrites."""
        self._finished.extend(
            zip(self._slots[:count].tolist(), self._results[:count].tolist(), strict=True)
        )

    def _finish(self) -> None:
        """Runs `done` of all finished requests.

        A `done` that polls the context or raises leaves the others to the bottom half.
        """
        finished = self._finished
        has_more = len(finished) > 1
        if has_more:
            self._finish_bh.schedule()
        try:
            while finished:
                slot, result = finished.popleft()
                done, length, short, offset, view = self._requests[slot]
                self._requests[slot] = None
                self._free.append(slot)
                if result == length or short is None:
                    done(result)
                else:
                    short(offset, view, result, done)
        finally:
            if has_more and not finished:
                self._finish_bh.cancel()
            if self._waiting:
                self._admit()
            if self._staged_count and not self._deferred:
                self._defer()

    def _admit(self) -> None:
        """Moves requests that waited for a slot into the slots that are free now."""
        waiting, self._waiting = self._waiting, deque()
        while waiting and self._free:
            opcode, fd, address, length, offset, done, view, short, rw_flags = waiting.popleft()
            self.queue(opcode, fd, address, length, offset, done, view, short, rw_flags)
        self._waiting = waiting


def _int64_view(array: Any, count: int) -> memoryview:
    return memoryview(ffi.buffer(array, count * 8)).cast("B").cast("q")
