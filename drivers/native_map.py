# SPDX-License-Identifier: Apache-2.0
"""The native twin of a direct map: the same entries where the native poll finds them.

The native poll serves requests by this without the GIL. What stands in it is decided in
direct_map.py, which mirrors every change here; the rules are said there. The twin may say less than
the map does: a page without room in its table is a miss. For reads it may know more: where slices
of an image's own tables are *shown* to it (qcow2/shown_slices.py), it looks pages up in them.

Who keeps what alive. A native connection holds the NativeMap for as long as its C half knows
`address`; the memory is given back with the last reference, not before. The poller holds it until
`retire`, after which every look-up misses for ever, since the file may be closed next.

Waiting. Requests under way are in a ring in C, in the order in which they began, each with its
serial. Waiting for those that are under way now is waiting until the oldest is younger than the
newest was. C tells us once when the serial in `watched` is done; waiters look again then, and who
isn't satisfied sets it again.

Context: home thread of the map's AioContext; giving the memory back, any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from blockemu.drivers._direct_map import ffi, lib
from blockemu.loop.file_engine import NativeKind
from blockemu.loop.sync import WaitQueue

if TYPE_CHECKING:
    from blockemu.drivers.direct_map import TableWords
    from blockemu.loop.file_engine import NativeIo

MAP_IDLE: Final = 1
"""`what` of the one event that a map posts: the requests up to `watched` are done."""

assert (lib.MAP_IO_INLINE, lib.MAP_IO_NOWAIT, lib.MAP_IO_AIO) == (
    NativeKind.INLINE,
    NativeKind.NOWAIT,
    NativeKind.AIO,
)


class NativeEvents(Protocol):
    """What a map needs of a context's native poll (loop/native_poller.py)."""

    def add_native(self, callback: Callable[[int, int], None], /) -> int:
        """A token: events posted for it are handed to callback(what, value)."""
        ...

    def remove_native(self, token: int, /) -> None:
        """No event of this token is handed on from now on, not even one that was posted."""
        ...

    def enable_aio(self) -> bool:
        """Has Linux AIO ready. False where there is none to be had."""
        ...


class NativeMap:
    """A direct map in C. `address` is of its struct direct_map, for other C code."""

    __slots__ = ("_poller", "_retired", "_waiters", "address", "cdata")

    def __init__(
        self,
        poller: NativeEvents,
        io: NativeIo,
        *,
        page_bits: int,
        length: int,
        request_alignment: int,
        durable: bool,
        words: TableWords | None = None,
    ) -> None:
        durable = durable and io.durable
        opened = lib.direct_map_open(
            io.fd, io.kind, page_bits, length, request_alignment, io.memory_alignment, int(durable)
        )
        if opened == ffi.NULL:
            raise MemoryError
        self.cdata: Any = ffi.gc(opened, _close)
        self.address = int(ffi.cast("uintptr_t", opened))
        if words is not None:
            lib.direct_map_set_words(opened, words.slice_bits, words.host_mask, words.plain_mask)
        self._waiters = WaitQueue()
        self._poller = poller
        self._retired = False
        self.cdata.token = poller.add_native(self._on_event)

    def __len__(self) -> int:
        return int(self.cdata.pages.count)

    @property
    def poller(self) -> NativeEvents:
        """Whose requests this map is for."""
        return self._poller

    @property
    def serial(self) -> int:
        """Of the request that began last; to be given to `wait_until_done`."""
        return int(self.cdata.serial)

    def publish(self, page: int, entry: int) -> None:
        """Enters or overwrites a page. Without room it stays, or becomes, a miss."""
        lib.direct_map_publish(self.cdata, page, entry)

    def withdraw(self, first: int, last: int) -> None:
        """Takes pages `first` to `last`, included, out, and hides the slices with words of them."""
        lib.direct_map_withdraw(self.cdata, first, last)

    def clear(self) -> None:
        """Takes all pages out."""
        lib.direct_map_clear(self.cdata)

    def show(self, number: int, address: int, *, host_end: int) -> None:
        """Has reads look pages up in slice `number`, whose words are at `address` until `hide`.
        They lead nowhere behind `host_end`, or the largest that was ever given."""
        if not self._retired:
            lib.direct_map_show(self.cdata, number, address, host_end)

    def hide(self, number: int, address: int) -> None:
        """Ends `show`, if it still holds for this address."""
        lib.direct_map_hide(self.cdata, number, address)

    def was_used(self, number: int, address: int) -> bool:
        """Whether the slice that is shown at `address` was of use since this was last asked."""
        return bool(lib.direct_map_was_used(self.cdata, number, address))

    def set_held(self, held: bool) -> None:
        """Has every look-up miss, or no more."""
        self.cdata.held = held or self._retired

    async def wait_until_done(self, serial: int) -> None:
        """Suspends: until the request of this serial, and all that began before, are done."""
        while lib.direct_map_oldest(self.cdata) <= serial:
            watched = self.cdata.watched
            self.cdata.watched = min(watched, serial) if watched else serial
            await self._waiters.wait()

    def retire(self) -> None:
        """Has every look-up miss for ever, and leaves the poller. Nothing may be under way."""
        assert lib.direct_map_oldest(self.cdata) > self.serial, "retired under way"
        if not self._retired:
            self._retired = True
            self.cdata.held = 1
            self.cdata.watched = 0
            self.clear()
            lib.direct_map_hide_all(self.cdata)
            self._poller.remove_native(self.cdata.token)
            self._waiters.wake_all()  # the event that they wait for may never come now

    def _on_event(self, what: int, value: int) -> None:
        assert what == MAP_IDLE, what
        self._waiters.wake_all()


def _close(opened: Any) -> None:
    """Gives the memory back; but lost with requests under way, it is theirs for ever."""
    if lib.direct_map_oldest(opened) > opened.serial:
        lib.direct_map_close(opened)
