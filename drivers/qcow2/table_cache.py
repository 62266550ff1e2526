# SPDX-License-Identifier: Apache-2.0
"""A write-back cache of table slices, for L2 tables and for refcount blocks.

A table is one cluster, up to 2 MiB; a look-up needs eight bytes of it. So the cache holds *slices*
(4 KiB, or a cluster where that is less), in native byte order in an `array`, where an entry costs
30 ns to read and a run of equal entries is found by C code. Its size is a bound in bytes.

Dirty state is kept per *granule* (a sector, or the file's block), because most updates touch one or
two entries, and a granule is written whole or not at all.

Writing back is the business of metadata_writer.py, which knows what must be on disk before what.
It works from a *capture*: the bytes of all that is dirty at one moment, taken without suspending. A
slice that is changed again while its capture is on the way to the disk is simply dirty again. So
no update can slip out in the wake of an older one with its own conditions unmet.

While the cache has room, a miss in an L2 table reads what lies around the slice, too, up to 64 KiB:
that costs little more than the slice, and a disk that is being read for the first time meets 15
misses less. A full cache reads slices, since what it would throw out for them is wanted.

Eviction takes the least recently used clean slice. If there is none among the oldest, it asks for
a write-back first, in the proper order. Slices that are shown to C (shown_slices.py) are used there
without our noticing, so one that was is given another turn.

Context: home thread of the node's AioContext. A slice that `load` returned is good until the caller
next suspends; then it must be asked for again.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blockemu.loop.coroutine import Future

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image_file import ImageFile

SLICE_BYTES = 4096
"""Default slice: one page, 512 L2 entries."""

SLICES_MIN = 4
"""Slices that any cache may hold: fewer, and two tables in turn would evict each other."""

EVICT_SCAN_MAX = 64
"""Oldest slices looked at for a clean one, before a write-back is asked for."""

MERGE_MAX = 1024 * 1024
"""Bytes of neighbouring slices that go out in one write."""

_SWAP = sys.byteorder == "little"


class Shown(Protocol):
    """That somebody else reads a slice's words where they are."""

    def was_used(self) -> bool:
        """Since this was last asked."""
        ...

    def hide(self) -> None:
        """Nobody does, from now on."""
        ...


class Slice:
    """Part of a table. `words` in native byte order, which stay where they are; `dirty` has a bit
    for each granule. `shown`: to be hidden before the slice goes. `was_met`: shown_slices.py's."""

    __slots__ = ("dirty", "offset", "shown", "was_met", "words", "writing")

    def __init__(self, offset: int, words: array[int]) -> None:
        self.offset = offset
        self.words = words
        self.dirty = 0
        self.writing = 0
        self.shown: Shown | None = None
        self.was_met = False


class Capture(NamedTuple):
    """What was dirty at one moment: the writes to make, and how to undo the taking."""

    writes: list[tuple[int, bytes]]
    slices: list[tuple[Slice, int]]


def disk_bytes(words: array[int]) -> bytes:
    """Table entries in the format's byte order."""
    if _SWAP and words.itemsize > 1:
        words = words[:]
        words.byteswap()
    return words.tobytes()


def words_from(typecode: str, data: bytes | bytearray) -> array[int]:
    """Table entries in native byte order."""
    words = array(typecode)
    words.frombytes(data)
    if _SWAP and words.itemsize > 1:
        words.byteswap()
    return words


def merge(writes: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Neighbouring writes in one, in ascending order."""
    merged: list[tuple[int, list[bytes], int]] = []
    for offset, data in sorted(writes):
        if merged:
            start, parts, length = merged[-1]
            if start + length == offset and length + len(data) <= MERGE_MAX:
                parts.append(data)
                merged[-1] = (start, parts, length + len(data))
                continue
        merged.append((offset, [data], len(data)))
    return [(start, b"".join(parts)) for start, parts, _ in merged]


class TableCache:
    """Slices by host offset. `write_back` is called when only dirty slices could be evicted."""

    def __init__(
        self,
        file: ImageFile,
        *,
        typecode: str,
        slice_bytes: int,
        bytes_max: int,
        write_back: Callable[[], Awaitable[None]],
        ahead_bytes: int = 0,
    ) -> None:
        """`ahead_bytes`: while there is room, a miss loads all slices of an aligned range of so
        many bytes, no longer than a table, instead of one slice."""
        self.slice_bytes = slice_bytes
        self._ahead_bytes = max(ahead_bytes, slice_bytes)
        self.slices: OrderedDict[int, Slice] = OrderedDict()
        """For look-ups that must not suspend; whoever uses it calls `touch` on a hit."""
        self._file = file
        self._typecode = typecode
        self._item_bytes = self._entry_bytes()
        self._granule = min(file.granule, slice_bytes)
        self._granule_words = self._granule // self._item_bytes
        self._slices_max = max(bytes_max // slice_bytes, SLICES_MIN)
        self._write_back = write_back
        self._dirty: dict[int, Slice] = {}
        self._loading: dict[int, Future[None]] = {}
        self._stale: set[int] = set()

    @property
    def bytes_used(self) -> int:
        return (len(self.slices) + len(self._loading)) * self.slice_bytes

    @property
    def bytes_max(self) -> int:
        return self._slices_max * self.slice_bytes

    @property
    def has_room(self) -> bool:
        """Whether another slice can be loaded without another going."""
        return len(self.slices) + len(self._loading) < self._slices_max

    @property
    def is_dirty(self) -> bool:
        return bool(self._dirty)

    def touch(self, offset: int) -> None:
        """The slice was used just now."""
        self.slices.move_to_end(offset)

    def cached(self, offset: int) -> Slice | None:
        """The slice at `offset`, if it is in memory. Suspends: never."""
        found = self.slices.get(offset)
        if found is not None:
            self.slices.move_to_end(offset)
        return found

    async def load(self, offset: int) -> Slice:
        """The slice at `offset`, from memory or the file.

        Suspends: if it isn't in memory. Raises: OSError of the read, or of a write-back.
        """
        while True:
            found = self.slices.get(offset)
            if found is not None:
                self.slices.move_to_end(offset)
                return found
            under_way = self._loading.get(offset)
            if under_way is None:
                break
            await under_way
        loaded = self._alone_or_ahead(offset)
        done: Future[None] = Future()
        self._loading.update(dict.fromkeys(loaded, done))
        try:
            if len(loaded) == 1:
                await self._make_room()
            await self._read(loaded, offset)
            self.slices.move_to_end(offset)
            return self.slices[offset]
        finally:
            for start in loaded:
                del self._loading[start]
                self._stale.discard(start)
            done.set_result(None)

    def load_at_once(self, offset: int) -> Slice | None:
        """As `load`, for a slice that isn't in memory, if nothing need be waited for; else None.
        Suspends: never."""
        if offset in self._loading:
            return None
        has_room = self.has_room
        if has_room and self._ahead_bytes > self.slice_bytes:
            return None  # `load` reads ahead
        data = bytearray(self.slice_bytes)
        if not self._file.try_read(offset, memoryview(data)):
            return None
        if not has_room and not self._evict_one():
            return None
        found = self.slices[offset] = self._slice_from(offset, data)
        return found

    def around(self, offset: int) -> range:
        """The places of slices that a miss at `offset` loads at most."""
        first = offset - offset % self._ahead_bytes
        return range(first, first + self._ahead_bytes, self.slice_bytes)

    def _alone_or_ahead(self, offset: int) -> range:
        """The slices to load when that at `offset` is wanted: it and those around it that aren't
        here, as far as they fit into the cache as it is; else it alone."""
        step = self.slice_bytes
        start, end = offset, offset + step
        around = self.around(offset)
        first, last = around.start, around.stop
        room = self._slices_max - len(self.slices) - len(self._loading) - 1
        while end < last and room > 0 and not self._is_here(end):
            end, room = end + step, room - 1
        while start > first and room > 0 and not self._is_here(start - step):
            start, room = start - step, room - 1
        return range(start, end, step)

    def _is_here(self, offset: int) -> bool:
        return offset in self.slices or offset in self._loading

    async def _read(self, offsets: range, wanted: int) -> None:
        """Load neighbouring slices by one read. One that is dropped meanwhile isn't entered; the
        one that is `wanted` is read again."""
        step = self.slice_bytes
        data = bytearray(len(offsets) * step)
        await self._file.read(offsets[0], memoryview(data))
        for start in offsets:
            if start not in self._stale:
                at = start - offsets[0]
                self.slices[start] = self._slice_from(start, data[at : at + step])
        while wanted not in self.slices:
            self._stale.discard(wanted)
            data = bytearray(step)
            await self._file.read(wanted, memoryview(data))
            if wanted not in self._stale:
                self.slices[wanted] = self._slice_from(wanted, data)

    async def insert_zeroed(self, offset: int) -> Slice:
        """The slice at `offset` of a table that is known to hold zeroes; nothing is read.

        Suspends: when something must be written back to make room.
        """
        assert offset not in self.slices
        assert offset not in self._loading
        done = self._loading[offset] = Future()
        try:
            await self._make_room()
            found = self.slices[offset] = self._slice_from(offset, bytes(self.slice_bytes))
            return found
        finally:
            del self._loading[offset]
            done.set_result(None)

    async def insert_copy(self, offset: int, *, source: int) -> None:
        """As `insert_zeroed`, with what the slice at `source` holds; all of it is dirty.

        Suspends: as `load`. Raises: OSError.
        """
        entries = self.slice_bytes // self._item_bytes
        data = self._bytes_of(await self.load(source), 0, entries)
        await self.insert_zeroed(offset)
        made = self.slices[offset] = self._slice_from(offset, data)
        self.mark_dirty(made, 0, entries)

    def mark_dirty(self, found: Slice, first: int, count: int = 1) -> None:
        """Entries `first` to `first + count` of a slice were changed."""
        assert self.slices.get(found.offset) is found, "changed a slice that was evicted"
        low = first // self._granule_words
        high = (first + count - 1) // self._granule_words
        found.dirty |= (1 << (high + 1)) - (1 << low)
        self._dirty[found.offset] = found

    def drop(self, offset: int, length: int) -> None:
        """Forget the slices in a host range: the cluster is a table no longer."""
        for start in range(offset, offset + length, self.slice_bytes):
            found = self.slices.pop(start, None)
            if found is not None:
                self._dirty.pop(start, None)
                _hide(found)
            if start in self._loading:
                self._stale.add(start)

    def forget_all(self) -> None:
        """Forget every slice, changes included. Nothing is being loaded or written."""
        assert not self._loading
        for found in self.slices.values():
            _hide(found)
        self.slices.clear()
        self._dirty = {}

    # --- the form of an entry: one word, or as a subclass has it ---

    def _entry_bytes(self) -> int:
        return array(self._typecode).itemsize

    def _slice_from(self, offset: int, data: bytes | bytearray) -> Slice:
        return Slice(offset, words_from(self._typecode, data))

    def _bytes_of(self, found: Slice, start: int, stop: int) -> bytes:
        """Entries `[start, stop)` of a slice, as the file has them."""
        return disk_bytes(found.words[start:stop])

    # --- write-back: called by metadata_writer.py ---

    def capture(self) -> Capture:
        """Take all that is dirty now. Suspends: never. Give the result to `settle`."""
        writes: list[tuple[int, bytes]] = []
        taken: list[tuple[Slice, int]] = []
        for found in self._dirty.values():
            taken.append((found, found.dirty))
            writes.extend(self._runs(found))
            found.dirty = 0
            found.writing += 1
        self._dirty = {}
        return Capture(merge(writes), taken)

    def settle(self, capture: Capture, *, failed: bool) -> None:
        """The captured writes were made, or weren't: then everything in it is dirty again."""
        for found, mask in capture.slices:
            found.writing -= 1
            if failed and self.slices.get(found.offset) is found:
                found.dirty |= mask
                self._dirty[found.offset] = found

    def _runs(self, found: Slice) -> list[tuple[int, bytes]]:
        runs: list[tuple[int, bytes]] = []
        mask, position, step = found.dirty, 0, self._granule_words
        while mask:
            skip = (mask & -mask).bit_length() - 1
            mask >>= skip
            position += skip
            length = (~mask & (mask + 1)).bit_length() - 1
            mask >>= length
            data = self._bytes_of(found, position * step, (position + length) * step)
            runs.append((found.offset + position * self._granule, data))
            position += length
        return runs

    async def _make_room(self) -> None:
        while len(self.slices) + len(self._loading) > self._slices_max:
            if not self._evict_one():
                await self._write_back()
                if not self._evict_one():
                    return  # all is being read, or changed again: too small a cache for the load

    def _evict_one(self) -> bool:
        victim: Slice | None = None
        spared: list[Slice] = []
        for scanned, found in enumerate(self.slices.values()):
            if not found.dirty and not found.writing:
                if found.shown is None or not found.shown.was_used():
                    victim = found
                    break
                spared.append(found)
            if scanned >= EVICT_SCAN_MAX:
                break
        for found in spared:
            self.slices.move_to_end(found.offset)
        if victim is None:
            if not spared:
                return False
            victim = spared[0]
        del self.slices[victim.offset]
        _hide(victim)
        return True


def _hide(found: Slice) -> None:
    if found.shown is not None:
        found.shown.hide()
