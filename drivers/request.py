# SPDX-License-Identifier: Apache-2.0
"""Which requests are in flight on a node, and which of them must wait for each other.

A device has no order between overlapping writes that are in flight at once, with one exception: a
write that isn't aligned to the driver's blocks is carried out as read, modify, write, and must not
write back stale neighbours. It is *serialising*: it waits for every older overlapping request, and
every newer overlapping one waits for it.

Only older requests are waited for, so there is no cycle to wait in. Reads aren't tracked here: next
to a read-modify-write they see old or new bytes as they would beside any write in flight.
"""

from __future__ import annotations

from blockemu.loop.sync import WaitQueue


class TrackedRequest:
    """A write in flight: its range in bytes, widened to whole blocks."""

    __slots__ = ("end", "serial", "serialising", "start", "waiters")

    def __init__(self, start: int, end: int, *, serial: int, serialising: bool) -> None:
        self.start = start
        self.end = end
        self.serial = serial
        self.serialising = serialising
        self.waiters: WaitQueue | None = None


class RequestTracker:
    """The writes in flight on one node. Context: the node's home thread."""

    __slots__ = ("_requests", "_serial", "_serialising")

    def __init__(self) -> None:
        self._requests: set[TrackedRequest] = set()
        self._serial = 0
        self._serialising = 0

    async def begin(self, start: int, end: int, *, serialising: bool = False) -> TrackedRequest:
        """Enter a write of `[start, end)`, and wait for those that it must come after.

        Suspends: until every older overlapping request with which it may not mix has ended.
        """
        self._serial += 1
        request = TrackedRequest(start, end, serial=self._serial, serialising=serialising)
        self._requests.add(request)
        self._serialising += serialising
        try:
            while self._serialising and (older := self._conflict(request)) is not None:
                if older.waiters is None:
                    older.waiters = WaitQueue()
                await older.waiters.wait()
        except BaseException:
            self.end(request)
            raise
        return request

    def end(self, request: TrackedRequest) -> None:
        """The write is over, well or badly; whoever waited for it goes on."""
        self._requests.discard(request)
        self._serialising -= request.serialising
        if request.waiters is not None:
            request.waiters.wake_all()

    def _conflict(self, request: TrackedRequest) -> TrackedRequest | None:
        for other in self._requests:
            if (
                other.serial < request.serial
                and (other.serialising or request.serialising)
                and other.start < request.end
                and request.start < other.end
            ):
                return other
        return None
