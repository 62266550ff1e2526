# SPDX-License-Identifier: Apache-2.0
"""A power cut at any point: which images it may leave, and what must be in them.

The disk below keeps what it was told in a log. A cut after `n` operations leaves the operations
that a completed flush covers (those that had taken effect when it *began*), and of the later ones
any subset, a write torn into sectors. The guest side keeps a history for each sector: what was
written since, and including, the last value that a flush promised. After a cut the sector must hold
one of these.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from blockemu.loop.memory_file import MemoryImage, Operation

SECTOR = 512


class Event(NamedTuple):
    """Something on the guest's side, after `at` operations of the host's."""

    at: int
    kind: str
    """start, end, flush-start, flush-end"""
    number: int
    first: int = 0
    sectors: int = 0
    value: bytes = b""


class GuestHistory:
    """What each sector may hold, as the events are played."""

    def __init__(self, sectors: int) -> None:
        self.values: list[list[tuple[int, bytes]]] = [[(-1, bytes(SECTOR))] for _ in range(sectors)]
        self._settled: list[int | None] = [-1] * sectors
        self._in_flight: list[set[int]] = [set() for _ in range(sectors)]
        self._alone: dict[tuple[int, int], bool] = {}
        self._promises: dict[int, list[int | None]] = {}
        self._ranges: dict[int, tuple[int, int]] = {}

    def play(self, event: Event) -> None:
        if event.kind == "start":
            self._start(event)
        elif event.kind == "end":
            self._end(event.number)
        elif event.kind == "flush-start":
            self._promises[event.number] = list(self._settled)
        else:
            for sector, number in enumerate(self._promises.pop(event.number)):
                if number is not None:
                    found = self.values[sector]
                    found[:] = [item for item in found if item[0] >= number]

    def _start(self, event: Event) -> None:
        self._ranges[event.number] = (event.first, event.sectors)
        for sector in range(event.first, event.first + event.sectors):
            self.values[sector].append((event.number, event.value))
            flying = self._in_flight[sector]
            for other in flying:
                self._alone[other, sector] = False
            self._alone[event.number, sector] = not flying
            flying.add(event.number)
            self._settled[sector] = None

    def _end(self, number: int) -> None:
        first, count = self._ranges.pop(number)
        for sector in range(first, first + count):
            self._in_flight[sector].discard(number)
            alone = self._alone.pop((number, sector))
            if alone and not self._in_flight[sector]:
                self._settled[sector] = number


class CutDisk:
    """Plays the log of a MemoryImage up to cuts, in ascending order."""

    def __init__(self, content: bytes, log: list[Operation], flush_starts: list[int]) -> None:
        self._log = log
        self._durable = bytearray(content)
        self._done = 0
        ends = [index for index, operation in enumerate(log) if operation.kind == "flush"]
        self._flushes = list(zip(ends, flush_starts, strict=False))

    def after_cut(self, cut: int, rng: random.Random) -> bytearray:
        """One of the images that a cut after `cut` operations may leave."""
        while self._flushes and self._flushes[0][0] < cut:
            _, start = self._flushes.pop(0)
            while self._done < start:
                apply(self._durable, self._log[self._done])
                self._done += 1
        image = bytearray(self._durable)
        keep = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        for operation in self._log[self._done : cut]:
            if operation.kind == "truncate" or rng.random() < keep:
                apply(image, operation, torn=rng)
        return image


def apply(image: bytearray, operation: Operation, *, torn: random.Random | None = None) -> None:
    """Do to `image` what an operation did; with `torn`, perhaps only some sectors of it."""
    kind, offset, length, data = operation
    if kind == "truncate":
        if length < len(image):
            del image[length:]
        image.extend(bytes(length - len(image)))
    elif kind in ("write", "zero", "discard"):
        if kind != "write":
            data = bytes(length)
        end = offset + length
        image.extend(bytes(max(end - len(image), 0)))
        if torn is None or torn.random() < 0.5:
            image[offset:end] = data
            return
        for start in range(offset // SECTOR * SECTOR, end, SECTOR):
            if torn.random() < 0.5:
                low, high = max(start, offset), min(start + SECTOR, end)
                image[low:high] = data[low - offset : high - offset]


class Recorder:
    """Hooks a MemoryImage up: random latencies, and where in the log each flush began."""

    def __init__(self, image: MemoryImage, rng: random.Random) -> None:
        self.image = image
        self.content = bytes(image.content)
        self.flush_starts: list[int] = []
        self.events: list[Event] = []
        self._rng = rng
        self._number = 0
        image.log.clear()
        image.latency_ns = self._latency

    def _latency(self, kind: str, offset: int, length: int) -> int:
        if kind == "flush":
            self.flush_starts.append(len(self.operations))
        return self._rng.randrange(1, 1000)

    @property
    def operations(self) -> list[Operation]:
        return self.image.log

    def note(self, kind: str, number: int = -1, *, first: int = 0, count: int = 0,
             value: bytes = b"") -> int:  # fmt: skip
        if number < 0:
            number = self._number
            self._number += 1
        self.events.append(Event(len(self.operations), kind, number, first, count, value))
        return number
