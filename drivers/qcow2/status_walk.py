# SPDX-License-Identifier: Apache-2.0
"""Block status in bulk: a walk through L2 slices that turns entries into runs (status_runs.py).

Most entries are plain: unallocated, or data in whole clusters. Of those a loop makes runs, a slice
at a time, without a call for any. Others (compressed, zeroes, extended entries, those of an
external data file, damaged ones) are resolved one by one, as a read would.

An image that looks preallocated names clusters which its file may never have been given
(preallocation.py). Then the file is asked, too; also in bulk: what it says of a stretch of many
clusters is kept for as long as one walk lasts.

The answer is what the tables say while the walk is there: writes that are under way may or may not
be in it.

Context: home thread of the AioContext.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from blockemu.drivers.qcow2.cluster_map import ClusterMap, Extent, Kind
from blockemu.drivers.qcow2.layout import COMPRESSED, L2_RESERVED, OFFSET_MASK, ZERO
from blockemu.drivers.qcow2.preallocation import looks_preallocated
from blockemu.drivers.status_runs import ALLOCATED, DATA, StatusRuns
from blockemu.drivers.status_runs import ZERO as READS_ZERO

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image import Image
    from blockemu.drivers.qcow2.table_cache import Slice

SLICES_MAX: Final = 8
"""Looked through in one walk: 4096 entries, under a millisecond, then others get their turn."""

LOOK_BELOW_BYTES: Final = 1 << 30
"""Of the file that are asked for at once, when it has to be asked."""

LOOK_BELOW_RUNS: Final = 256
"""The same, if it is in pieces."""

_IS_DATA: Final = ALLOCATED | DATA
_STATES: Final = {
    Kind.DATA: _IS_DATA,
    Kind.COMPRESSED: _IS_DATA,
    Kind.ZERO: ALLOCATED | READS_ZERO,
    Kind.ZERO_ALLOCATED: ALLOCATED | READS_ZERO,
}


async def status_runs(image: Image, offset: int, length: int, *, runs_max: int) -> StatusRuns:
    """What the guest's bytes from `offset` are in this layer, as far as one walk comes.

    Suspends: for metadata that isn't in memory. Raises: OSError, if already the first entry is
    damaged; an answer ends before one that comes later.
    """
    backing = image.reader.backing
    absent = READS_ZERO
    if backing is not None and offset < backing.length_bytes:
        length = min(length, backing.length_bytes - offset)  # behind it, unallocated means zero
        absent = 0
    walk = _Walk(image, absent, runs_max)
    if image.encryption is None:
        if image.preallocated is None:
            image.preallocated = await looks_preallocated(image)
        if image.preallocated:
            walk.below = _Below(image)
    try:
        await walk.go(offset, offset + length)
    except OSError:
        if not walk.runs:
            raise
    return walk.runs


class _Walk:
    """One walk. `absent`: the state of what isn't allocated."""

    def __init__(self, image: Image, absent: int, runs_max: int) -> None:
        layout = image.layout
        self.runs = StatusRuns()
        self.below: _Below | None = None
        self._clusters = image.clusters
        self._bits = layout.cluster_bits
        self._absent = absent
        self._runs_max = runs_max
        self._file = image.file
        self._is_plain = type(image.clusters) is ClusterMap
        """Entries are single words, and name clusters of the image's own file."""
        self._odd = COMPRESSED | L2_RESERVED | ZERO | OFFSET_MASK & (layout.cluster_size - 1)
        """An entry without any of these bits is unallocated or data."""

    async def go(self, position: int, end: int) -> None:
        """Walk from `position` on, as far as the bounds let us. Raises: OSError."""
        clusters, runs = self._clusters, self.runs
        for _ in range(SLICES_MAX):
            if position >= end or len(runs) >= self._runs_max:
                return
            cluster = position >> self._bits
            if not clusters.has_table(cluster):
                extent = await clusters.resolve(position, end - position)
                runs.add(extent.length, self._absent)
                position += extent.length
                continue
            found = await clusters.load(cluster)
            last = (cluster // clusters.slice_entries + 1) * clusters.slice_entries
            stop = min(end, last << self._bits)
            position = self._walk_slice(found, position, stop)
            if self.below is not None and self.below.wanted is not None:
                await self.below.look()

    def _walk_slice(self, found: Slice, position: int, stop: int) -> int:
        """Up to `stop`, which is in the slice or at its end. Returns where it came to; before
        `stop`, it was at a bound, or `below` wants to look. Suspends: never. Raises: OSError."""
        mask = (1 << self._bits) - 1
        if self._is_plain and not position & mask and stop - position > mask:
            position = self._walk_plain(found, position, stop & ~mask)
        clusters, runs = self._clusters, self.runs
        while position < stop and len(runs) < self._runs_max:
            extent = clusters.peek(position, stop - position)
            assert extent is not None, "a slice is gone that was here just now"
            length = self._add(extent)
            position += length
            if length < extent.length:
                break
            if self._is_plain and not position & mask and stop - position > mask:
                position = self._walk_plain(found, position, stop & ~mask)
        return position

    def _walk_plain(self, found: Slice, position: int, stop: int) -> int:
        """Whole clusters, as long as their entries are plain."""
        first = (position >> self._bits) % self._clusters.slice_entries
        behind = first + (stop - position >> self._bits)
        room = self._runs_max - len(self.runs)
        lengths, states = self.runs.lengths, self.runs.states
        last = states[-1] if states else -1
        size, odd, absent, file_end = 1 << self._bits, self._odd, self._absent, self._file.length
        below = self.below
        seen_start, seen_end, seen = (0, file_end, _IS_DATA) if below is None else below.window
        for word in found.words[first:behind]:
            if word & odd:
                break
            host = word & OFFSET_MASK
            if not host:
                state = absent
            elif seen_start <= host and host + size <= seen_end:
                state = seen
            else:
                break
            if state == last:
                lengths[-1] += size
            else:
                if not room:
                    break
                room -= 1
                lengths.append(size)
                states.append(state)
                last = state
            position += size
        return position

    def _add(self, extent: Extent) -> int:
        """Enter an extent, and return how much of it; less than all if `below` wants to look."""
        state = _STATES.get(extent.kind, self._absent)
        if self.below is None or extent.kind is not Kind.DATA:
            self.runs.add(extent.length, state)
            return extent.length
        done = 0
        while done < extent.length and len(self.runs) <= self._runs_max:
            seen = self.below.at(extent.host + done)
            if seen is None:
                break
            length = min(seen[0], extent.length - done)
            self.runs.add(length, seen[1])
            done += length
        return done


class _Below:
    """What the file says of the clusters in it, for one walk."""

    def __init__(self, image: Image) -> None:
        self._child = image.data.file.child
        self._starts: list[int] = []
        self._states: list[int] = []
        self._end = 0
        self.window = (0, 0, _IS_DATA)
        """The stretch that was looked up last: its start, its end, its state."""
        self.wanted: int | None = None
        """The host offset that `at` knew nothing of."""

    def at(self, host: int) -> tuple[int, int] | None:
        """(bytes that are alike from `host` on, their state), or None: `look` first."""
        index = bisect_right(self._starts, host) - 1
        if index < 0 or host >= self._end:
            self.wanted = host
            return None
        stop = self._starts[index + 1] if index + 1 < len(self._starts) else self._end
        self.window = (self._starts[index], stop, self._states[index])
        return stop - host, self._states[index]

    async def look(self) -> None:
        """Ask the file what is at `wanted` and behind it. Raises: OSError."""
        host, self.wanted = self.wanted, None
        assert host is not None
        found = await self._child.status_runs(host, LOOK_BELOW_BYTES, runs_max=LOOK_BELOW_RUNS)
        *self._starts, self._end = accumulate(found.lengths, initial=host)
        self._states = [_IS_DATA | state & READS_ZERO for state in found.states]
        self.window = (0, 0, _IS_DATA)
