# SPDX-License-Identifier: Apache-2.0
"""The direct map: a soft TLB from guest pages to host offsets, so that plain requests skip layers.

Most requests of a running disk end where the one before them did: a cluster that is allocated,
uncompressed and ours alone. Walking the graph for them is layers of coroutines that find nothing
new. So a driver *publishes* what it found, and a server asks the map first: a hit is one dictionary
look-up and a host I/O; a miss goes to the node, which is always right.

The rules that keep a hit as right as a miss:

1. Who changes what a mapping means (moves or frees a cluster, takes a snapshot, resizes, inserts a
   filter) calls `invalidate` first, and waits in it until the requests that used the old meaning
   are done. Users `pin` the map for as long as a request that they took from it is in flight.
2. A drained section, and a request that must be alone (an unaligned write that reads, modifies and
   writes a block), `hold`s the map: every look-up misses, so that requests queue where the node can
   order them; and waits until the pinned ones are done.
3. An entry is writable only if an in-place write changes nothing else in the image.

Waiting doesn't stop the hot path: pins are counted per *generation*. Invalidation closes the
current generation and waits for that one; new requests pin the next.

A native connection asks the map's twin in C (native_map.py), which is made when the first one
comes. Every change is mirrored there, and waiting covers the requests that were taken from it. The
twin can also be shown slices of an image's own tables, to find in them what was never published;
withdrawing pages hides the slices that have them, and who shows one keeps to rule 1.

Bounds: `pages_max` entries, `PAGE_BYTES` each. A full map is emptied, which costs misses only.

A page is a power of two of bytes: a qcow2 cluster, or the whole device for a raw file (one entry).
Context: everything here runs in the home thread of the node's AioContext.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from blockemu.loop.file_engine import NativeKind
from blockemu.loop.sync import WaitQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockemu.drivers.native_map import NativeEvents, NativeMap
    from blockemu.loop.host_file import HostFile

PAGES_MAX = 128 * 1024
"""Entries kept at most: 8 GiB of guest disk at 64 KiB clusters, in about 24 MiB of memory."""

PAGE_BYTES = 184
"""Memory of an entry, measured: 150 bytes here, 34 in the twin in C."""

WHOLE_DEVICE_BITS = 62
"""`page_bits` of a map whose one page is the whole device."""

_NOTHING: dict[int, int] = {}


class Pin:
    """A generation of in-flight requests: how many there are, and who waits for the last."""

    __slots__ = ("count", "waiters")

    def __init__(self) -> None:
        self.count = 0
        self.waiters: WaitQueue | None = None


class TableWords(NamedTuple):
    """How an image's table says where a page lies, one word of 64 bits for each page.

    A slice of a table has `1 << slice_bits` of them. A word is the host offset of the page under
    `host_mask`, not 0, and may have the bits of `plain_mask` set; one with others says something
    that this isn't for.
    """

    slice_bits: int
    host_mask: int
    plain_mask: int


class DirectMap:
    """Guest range -> offset in `file`. `length` is the mapped size in bytes, from 0.

    `durable`: data that is in the file is all there is, no metadata of an image: native code may
    do FLUSH and FUA by the file alone. `pages_max`: a bound below PAGES_MAX. `words`: of the slices
    that will be shown to the twin.
    """

    __slots__ = (
        "_alignment_mask",
        "_closed",
        "_durable",
        "_entries",
        "_generation",
        "_held",
        "_length",
        "_native",
        "_old",
        "_page_bits",
        "_page_mask",
        "_pages_max",
        "_stored",
        "_words",
        "file",
        "fill",
    )

    def __init__(
        self,
        file: HostFile,
        *,
        page_bits: int,
        length: int,
        durable: bool = False,
        pages_max: int | None = None,
        words: TableWords | None = None,
    ) -> None:
        self.file = file
        self.fill: Callable[[int, int], None] | None = None
        """Publishes what it can of a guest range (offset, length) without suspending."""
        self._words = words
        self._pages_max = PAGES_MAX if pages_max is None else min(pages_max, PAGES_MAX)
        self._page_bits = page_bits
        self._page_mask = (1 << page_bits) - 1
        self._alignment_mask = file.request_alignment - 1
        self._length = length & ~self._alignment_mask
        # An end that isn't aligned is written through the page cache, where a failed flush has to
        # be remembered (group_flush.py), and it is Python that remembers.
        self._durable = durable and length == self._length
        # An entry is host_offset << 1 | writable. `_entries` is what look-ups see: the stored
        # entries, or nothing while the map is held.
        self._stored: dict[int, int] = {}
        self._entries = self._stored
        self._generation = Pin()
        self._old: list[Pin] = []
        self._held = 0
        self._native: NativeMap | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._stored)

    def lookup_read(self, offset: int, length: int) -> int:
        """The host offset of guest bytes `[offset, offset + length)`, or -1 to ask the node.

        `length` > 0. A hit holds until the caller next suspends or returns to the loop; to use it
        longer, `pin`.
        """
        page = offset >> self._page_bits
        entry = self._entries.get(page)
        end = offset + length
        if entry is None or (offset | length) & self._alignment_mask or end > self._length:
            return -1
        if (end - 1) >> self._page_bits != page and not self._contiguous(page, entry, end, 0):
            return -1
        return (entry >> 1) + (offset & self._page_mask)

    def find_read(self, offset: int, length: int) -> int:
        """As `lookup_read`; but a page that isn't known is asked for, if that takes no waiting."""
        host = self.lookup_read(offset, length)
        if host < 0 and self._fill(offset, length):
            host = self.lookup_read(offset, length)
        return host

    def find_write(self, offset: int, length: int) -> int:
        """As `find_read`, for bytes that may be overwritten in place."""
        host = self.lookup_write(offset, length)
        if host < 0 and self._fill(offset, length):
            host = self.lookup_write(offset, length)
        return host

    def _fill(self, offset: int, length: int) -> bool:
        """Whether another look may find more. The range may be anything that a client says."""
        if self.fill is None or self._held or offset + length > self._length:
            return False
        self.fill(offset, length)
        return True

    def lookup_write(self, offset: int, length: int) -> int:
        """As `lookup_read`, for bytes that may be overwritten in place."""
        page = offset >> self._page_bits
        entry = self._entries.get(page, 0)
        end = offset + length
        if not entry & 1 or (offset | length) & self._alignment_mask or end > self._length:
            return -1
        if (end - 1) >> self._page_bits != page and not self._contiguous(page, entry, end, 1):
            return -1
        return (entry >> 1) + (offset & self._page_mask)

    def _contiguous(self, page: int, entry: int, end: int, writable: int) -> bool:
        host = entry >> 1
        last = (end - 1) >> self._page_bits
        get = self._entries.get
        for following in range(page + 1, last + 1):
            host += self._page_mask + 1
            found = get(following)
            if found is None or found >> 1 != host or found & 1 < writable:
                return False
        return True

    def publish(self, offset: int, host_offset: int, *, writable: bool) -> None:
        """Guest page at `offset` lies at `host_offset` now. Overwrites what was published."""
        assert not offset & self._page_mask, (offset, self._page_bits)
        page, entry = offset >> self._page_bits, host_offset << 1 | writable
        if self._stored.get(page) == entry:
            return
        if len(self._stored) >= self._pages_max:
            self._stored.clear()
            if self._native is not None:
                self._native.clear()
        self._stored[page] = entry
        if self._native is not None:
            self._native.publish(page, entry)

    def leads_into(self, host_offset: int, length: int) -> bool:
        """Whether an entry lies in this range of the file. Looks at all entries."""
        low, high = host_offset << 1, (host_offset + length) << 1
        return any(low <= entry < high for entry in self._stored.values())

    def pin(self) -> Pin:
        """A request taken from the map is now in flight. Give the result to `unpin`."""
        generation = self._generation
        generation.count += 1
        return generation

    def unpin(self, pin: Pin) -> None:
        """The request that `pin` stood for is done."""
        pin.count -= 1
        if not pin.count and pin.waiters is not None:
            pin.waiters.wake_all()

    async def invalidate(self, offset: int, length: int) -> None:
        """Withdraw the pages that touch the range, then wait for requests that may use them.

        Suspends: until every request pinned before this call is unpinned. The caller keeps the
        range from being published again meanwhile (by its own lock on it).
        """
        self._withdraw(offset, length)
        await self.wait_idle()

    def _withdraw(self, offset: int, length: int) -> None:
        if not length:
            return
        first, last = offset >> self._page_bits, (offset + length - 1) >> self._page_bits
        if self._native is not None:
            self._native.withdraw(first, last)
        if not self._stored:
            return
        if last - first < len(self._stored):
            for page in range(first, last + 1):
                self._stored.pop(page, None)
        else:
            for page in [page for page in self._stored if first <= page <= last]:
                del self._stored[page]

    async def wait_idle(self) -> None:
        """Wait until the requests that are pinned now are unpinned; later ones don't count."""
        native = self._native
        serial = native.serial if native is not None else 0
        if self._generation.count:
            self._old = [pin for pin in self._old if pin.count]
            self._old.append(self._generation)
            self._generation = Pin()
        for pin in [pin for pin in self._old if pin.count]:
            while pin.count:
                if pin.waiters is None:
                    pin.waiters = WaitQueue()
                await pin.waiters.wait()
        if native is not None:
            await native.wait_until_done(serial)

    def hold(self) -> None:
        """From now on every look-up misses, until as many `release`s. Entries are kept."""
        self._held += 1
        self._entries = _NOTHING
        if self._native is not None:
            self._native.set_held(True)

    def release(self) -> None:
        """End one `hold`."""
        assert self._held > 0
        self._held -= 1
        if not self._held:
            self._entries = self._stored
            if self._native is not None:
                self._native.set_held(False)

    @property
    def native(self) -> NativeMap | None:
        """The twin in C, if there is one."""
        return self._native

    def native_handle(self, poller: NativeEvents) -> NativeMap | None:
        """The twin in C for connections served by `poller`, the native poll of the file's context;
        None where only Python may do the file's I/O. Ask again whenever you ask for the map.

        The caller keeps the result for as long as C code has its address.
        """
        if self._native is not None:
            assert self._native.poller is poller, "a native map serves one context"
            return self._native
        io = self.file.native_io()
        if self._closed or io is None:
            return None
        # Here, since without native connections the extension isn't needed.
        from blockemu.drivers.native_map import NativeMap

        if io.kind is NativeKind.AIO and not poller.enable_aio():
            return None
        self._native = NativeMap(
            poller,
            io,
            page_bits=self._page_bits,
            length=self._length,
            request_alignment=self._alignment_mask + 1,
            durable=self._durable,
            words=self._words,
        )
        self._native.set_held(self._held > 0)
        for page, entry in self._stored.items():
            self._native.publish(page, entry)
        return self._native

    def detach(self) -> None:
        """The file leaves its context: so does the twin. Held, and idle."""
        native, self._native = self._native, None
        if native is not None:
            native.retire()

    async def close(self) -> None:
        """The map is used no more: whoever still has it misses from now on, for ever.

        Suspends: until the requests that were taken from it are done. Cancelled meanwhile, it isn't
        closed.
        """
        self.hold()
        try:
            await self.wait_idle()
        except BaseException:
            self.release()
            raise
        self._closed = True
        self.detach()
