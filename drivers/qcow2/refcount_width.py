# SPDX-License-Identifier: Apache-2.0
"""Reference counts of 1 to 64 bits in the words of a refcount block slice.

Layout: an entry is `1 << order` bits, big endian; entries narrower than a byte fill it from the
least significant bit up (specification: Host cluster management, refcount block entry). A slice's
words are as wide as an entry, or bytes for the narrow ones.
"""

from __future__ import annotations

from array import array

_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}


class RefcountWidth:
    """Reads and writes entries of one width. Suspends: never."""

    __slots__ = ("_in_byte", "_order", "_value_mask", "typecode")

    def __init__(self, order: int) -> None:
        self._order = order
        self.typecode = _TYPECODES[max(order, 3)]
        self._in_byte = 3 - order if order < 3 else 0
        """log2 of the entries in a word."""
        self._value_mask = (1 << (1 << order)) - 1

    def entries(self, slice_bytes: int) -> int:
        """How many counts a slice of this size holds."""
        return slice_bytes * 8 >> self._order

    def word(self, index: int) -> int:
        """The word that an entry lies in, for marking it dirty."""
        return index >> self._in_byte

    def get(self, words: array[int], index: int) -> int:
        if not self._in_byte:
            return words[index]
        shift = (index & ((1 << self._in_byte) - 1)) << self._order
        return words[index >> self._in_byte] >> shift & self._value_mask

    def count_used(self, words: array[int], stop: int) -> int:
        """How many of the first `stop` entries don't count 0."""
        if not self._in_byte:
            return stop - words[:stop].count(0)
        return sum(bool(self.get(words, index)) for index in range(stop))

    def set(self, words: array[int], index: int, value: int) -> None:
        if not self._in_byte:
            words[index] = value
            return
        shift = (index & ((1 << self._in_byte) - 1)) << self._order
        word = index >> self._in_byte
        words[word] = words[word] & ~(self._value_mask << shift) | value << shift

    def common(self, words: array[int], first: int, stop: int) -> int | None:
        """The count that all entries of `[first, stop)` have. None if they differ, and where they
        are narrower than a byte."""
        run = words[first:stop]
        if self._in_byte or run != array(self.typecode, run[:1]) * len(run):
            return None
        return run[0]

    def fill(self, words: array[int], first: int, stop: int, value: int) -> None:
        """Set all entries of `[first, stop)`; they are a byte or wider."""
        assert not self._in_byte
        words[first:stop] = array(self.typecode, (value,)) * (stop - first)

    def set_ones(self, words: array[int], first: int, count: int) -> None:
        """Count 1 for a run of clusters that are being allocated."""
        if not self._in_byte:
            words[first : first + count] = array(self.typecode, (1,)) * count
            return
        per_word, end = 1 << self._in_byte, first + count
        while first < end and (first % per_word or end - first < per_word):
            self.set(words, first, 1)
            first += 1
        whole = (end - first) >> self._in_byte
        ones = sum(1 << (position << self._order) for position in range(per_word))
        words[first >> self._in_byte : (first >> self._in_byte) + whole] = (
            array(self.typecode, (ones,)) * whole
        )
        for index in range(first + (whole << self._in_byte), end):
            self.set(words, index, 1)

    def find_free(self, words: array[int], start: int, stop: int) -> int:
        """The first entry of `[start, stop)` that counts 0, or -1."""
        if not self._in_byte:
            try:
                return words.index(0, start, stop)
            except ValueError:
                return -1
        full = (1 << self._in_byte) - 1
        index = start
        while index < stop:
            if not index & full and words[index >> self._in_byte] == 0:
                return index
            if not self.get(words, index):
                return index
            index += 1
        return -1

    def free_run(self, words: array[int], start: int, stop: int) -> int:
        """How many entries from `start` on count 0, before `stop`."""
        if not self._in_byte and not any(words[start:stop]):
            return stop - start
        index = start
        while index < stop and not self.get(words, index):
            index += 1
        return index - start
