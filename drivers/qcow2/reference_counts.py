# SPDX-License-Identifier: Apache-2.0
"""How often each host cluster is named, counted in little memory.

One byte a cluster, in pages that exist only where something was counted: a file of 4 TiB with
64 KiB clusters takes 64 MiB, a file that is one large hole takes nothing. Counts of 255 and more,
which take hundreds of snapshots, stand in a dict beside the pages. Runs of clusters are counted by
`bytes.translate`, so that a table of 8192 entries in a row costs one call.

What a hostile image can make us take is bounded by the `Allowance`, which several counts share.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNT_BYTES_MAX = 192 * 1024 * 1024
"""For all counts of one check: a file of 12 TiB at 64 KiB clusters that is used to its last one.
With all else, a check stays below 256 MiB."""

PAGE_BITS = 16
LARGE = 255
"""In a page: the count is in the dict."""
LARGE_BYTES = 128
"""What an entry of the dict takes, about."""


class Allowance:
    """Memory that the counts of one check may take together."""

    def __init__(self, name: str, bytes_max: int = COUNT_BYTES_MAX) -> None:
        self._name = name
        self._bytes_max = bytes_max
        self._taken = 0

    def take(self, length: int) -> None:
        """Raises: ImageError, when that is too much."""
        self._taken += length
        if self._taken > self._bytes_max:
            mib = self._bytes_max >> 20
            raise ImageError(
                self._name, f"checking it takes more than {mib} MiB of memory, which is the limit"
            )


class ReferenceCounts:
    """Counts by cluster number, each at most `count_max`. Suspends: never."""

    def __init__(self, allowance: Allowance, *, count_max: int, page_bits: int = PAGE_BITS) -> None:
        self._allowance = allowance
        self._count_max = count_max
        self._small_max = min(count_max, LARGE - 1)
        self._page_bits = page_bits
        self._pages: dict[int, bytearray] = {}
        self._order: list[int] | None = None
        self._large: dict[int, int] = {}
        self._steps: dict[int, bytes] = {}
        self.end = 0
        """Behind the last cluster that was counted."""

    def add(self, first: int, clusters: int, weight: int = 1) -> int:
        """Count `weight` more for each cluster of a run; returns what doesn't fit `count_max`."""
        size = 1 << self._page_bits
        end = first + clusters
        self.end = max(self.end, end)
        refused = 0
        while first < end:
            page = self._page(first >> self._page_bits)
            start = first & (size - 1)
            stop = min(start + end - first, size)
            if not self._add_small(page, start, stop, weight):
                for position in range(start, stop):
                    refused += self._add_one(page, position, first + position - start, weight)
            first += stop - start
        return refused

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            self._allowance.take(1 << self._page_bits)
            page = self._pages[number] = bytearray(1 << self._page_bits)
            self._order = None
        return page

    def _add_small(self, page: bytearray, start: int, stop: int, weight: int) -> bool:
        """Count a run at once; False where a count would become large, and nothing was done."""
        if weight > self._small_max:
            return False
        if stop - start == 1:
            count = page[start] + weight
            if count <= self._small_max:
                page[start] = count
            return count <= self._small_max
        step = self._steps.get(weight)
        if step is None:
            counts = (count + weight for count in range(256))
            step = bytes(count if count <= self._small_max else LARGE for count in counts)
            self._steps[weight] = step
        counted = page[start:stop].translate(step)
        if LARGE in counted:
            return False
        page[start:stop] = counted
        return True

    def _add_one(self, page: bytearray, position: int, cluster: int, weight: int) -> int:
        count = page[position]
        if count == LARGE:
            count = self._large[cluster]
        wanted = count + weight
        count = min(wanted, self._count_max)
        if count < LARGE:
            page[position] = count
        else:
            if page[position] != LARGE:
                self._allowance.take(LARGE_BYTES)
            page[position] = LARGE
            self._large[cluster] = count
        return wanted - count

    def get(self, cluster: int) -> int:
        page = self._pages.get(cluster >> self._page_bits)
        if page is None:
            return 0
        count = page[cluster & ((1 << self._page_bits) - 1)]
        return count if count < LARGE else self._large[cluster]

    def clipped(self, first: int, clusters: int) -> bytes:
        """The counts of a run, a byte each; LARGE stands for itself and all above."""
        size = 1 << self._page_bits
        end = first + clusters
        parts = []
        while first < end:
            start = first & (size - 1)
            stop = min(start + end - first, size)
            page = self._pages.get(first >> self._page_bits)
            parts.append(bytes(stop - start) if page is None else bytes(page[start:stop]))
            first += stop - start
        return b"".join(parts)

    def has_page(self, first: int, clusters: int) -> bool:
        """Whether anything may be counted in a run."""
        found = self.next_page(first)
        return found is not None and found < first + clusters

    def next_page(self, cluster: int) -> int | None:
        """The first cluster from this one on that may have a count."""
        if self._order is None:
            self._order = sorted(self._pages)
        index = bisect_left(self._order, cluster >> self._page_bits)
        if index == len(self._order):
            return None
        return max(cluster, self._order[index] << self._page_bits)

    def counted(self) -> Iterator[tuple[int, int]]:
        """`(cluster, count)` of all that count anything, in ascending order."""
        for number in sorted(self._pages):
            base = number << self._page_bits
            for position, count in enumerate(self._pages[number]):
                if count:
                    yield base + position, count if count < LARGE else self._large[base + position]
