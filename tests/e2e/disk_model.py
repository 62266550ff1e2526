# SPDX-License-Identifier: Apache-2.0
"""What a disk must hold that several owners write at the same time.

The disk is divided into *lots*, some with ragged borders; each lot has one owner, a client or
whoever changes the graph meanwhile, who alone writes it. So everybody knows what their reads must
find (`DiskModel`), though neighbours share blocks and clusters.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

MIB = 1 << 20
BLOCK_BYTES = 4096
SECTOR_BYTES = 512
NOISE_BYTES = 4 * MIB
HISTORY = 4000


class Wrong(AssertionError):
    """The server did what it must not do."""


@dataclass(frozen=True, slots=True)
class Lot:
    """A piece of the disk that has one owner."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.offset + self.length

    def some(self, rng: random.Random) -> tuple[int, int]:
        """Offset and length of a part of it: mostly whole blocks, often whole sectors, or any."""
        shape = rng.random()
        if shape < 0.1:
            return self.offset, self.length
        unit = BLOCK_BYTES if shape < 0.8 else SECTOR_BYTES if shape < 0.9 else 1
        first, last = -(-self.offset // unit), self.end // unit
        if first >= last:
            unit, first, last = 1, self.offset, self.end
        start = rng.randrange(first, last)
        count = min(last - start, rng.choice([1, 1, 1, 2, 3, 8, 16]) if unit > 1 else 5000)
        return start * unit, rng.randint(1, count) * unit


def divide(length: int, owners: int, rng: random.Random) -> list[list[Lot]]:
    """Give `owners` the bytes `[0, length)` in lots, most of them of whole blocks."""
    lots: list[list[Lot]] = [[] for _ in range(owners)]
    start = 0
    while start < length:
        end = start // BLOCK_BYTES * BLOCK_BYTES + rng.choice([1, 2, 4, 8, 16, 48]) * BLOCK_BYTES
        border = rng.random()
        if border < 0.15:
            end += rng.randrange(1, 8) * SECTOR_BYTES
        elif border < 0.3:
            end += rng.randrange(1, BLOCK_BYTES)
        end = min(end, length)
        rng.choice(lots).append(Lot(start, end - start))
        start = end
    for number, mine in enumerate(lots):
        assert mine, f"owner {number} got nothing: the disk is too small"
    return lots


class DiskModel:
    """What each byte of the disk must read as; trimmed ones as before or as zero.

    Owners of lots share it: each touches its own bytes only. Context: any thread.
    """

    def __init__(self, content: bytes, rng: random.Random) -> None:
        self.content = bytearray(content)
        self._trimmed = bytearray(len(content))
        self._noise = rng.randbytes(NOISE_BYTES)
        self._history: deque[str] = deque(maxlen=HISTORY)

    def noise(self, length: int, rng: random.Random) -> bytes:
        """Bytes to be written: different for each block and each write."""
        start = rng.randrange(NOISE_BYTES - length + 1)
        return self._noise[start : start + length]

    def note(self, offset: int, length: int, what: str) -> None:
        """Remember what was done to a range, for the report of a failure."""
        self._history.append(f"{offset:>9}+{length:<7} {what}")

    def write(self, offset: int, data: bytes) -> None:
        """A write was answered."""
        self.content[offset : offset + len(data)] = data
        self._trimmed[offset : offset + len(data)] = bytes(len(data))

    def trim(self, offset: int, length: int) -> None:
        """A trim was answered."""
        self._trimmed[offset : offset + length] = b"\1" * length

    def state(self, offset: int, length: int) -> tuple[bytes, bytes]:
        """The bytes of a range, and which of them are trimmed."""
        end = offset + length
        return bytes(self.content[offset:end]), bytes(self._trimmed[offset:end])

    def check(self, offset: int, found: bytes) -> None:
        """Raises: Wrong, unless a read may find these bytes now. Learns what trimming did."""
        end = offset + len(found)
        for start in range(0, len(found), SECTOR_BYTES):
            part = found[start : start + SECTOR_BYTES]
            place = offset + start
            stop = place + len(part)
            if part == self.content[place:stop]:
                continue
            if any(part) or self._trimmed.find(0, place, stop) >= 0:
                for at in differences(part, self.content[place:stop]):
                    if part[at] or not self._trimmed[place + at]:
                        self.complain(offset, found, start + at)
            self.content[place:stop] = part
        if self._trimmed.find(1, offset, end) >= 0:
            self._trimmed[offset:end] = bytes(len(found))

    def may_be_zero(self, offset: int, length: int) -> bool:
        """Whether all of a range may read as zeroes."""
        content, trimmed = self.state(offset, length)
        return all(mark or not byte for byte, mark in zip(content, trimmed, strict=True))

    def complain(self, offset: int, found: bytes, at: int) -> None:
        """Raises: Wrong, with what is known of the byte at index `at` of what was read."""
        place = offset + at
        sample = found[at : at + 24]
        known = self._noise.find(sample)
        if not any(sample):
            kind = "zeroes"
        else:
            kind = f"noise from {known}" if known >= 0 else "bytes that nobody wrote"
        wrong = differences(found, self.content[offset : offset + len(found)])
        near = [line for line in self._history if _touches(line, place)]
        raise Wrong(
            f"read of {len(found)} at {offset}: byte {place} (and {len(wrong) - 1} more, up to "
            f"{offset + wrong[-1]}) holds {sample.hex()}: {kind}; expected "
            f"{bytes(self.content[place : place + 24]).hex()}. What was done there, oldest "
            "first:\n  " + "\n  ".join(near[-12:])
        )


def _touches(line: str, place: int) -> bool:
    offset, length = line.split(maxsplit=1)[0].split("+")
    return int(offset) <= place < int(offset) + int(length)


def differences(one: bytes, other: bytes | bytearray) -> list[int]:
    """The indices at which two strings of one length differ."""
    found: list[int] = []
    for start in range(0, len(one), 256):
        if one[start : start + 256] != other[start : start + 256]:
            end = min(start + 256, len(one))
            found += [at for at in range(start, end) if one[at] != other[at]]
    return found
