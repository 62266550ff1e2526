# SPDX-License-Identifier: Apache-2.0
"""A power cut over two files: an image and its external data file, on one disk or on two.

Their operations have one order, in which the cut is a point; a flush is of one file only. What each
may hold after the cut is as in crash.py, independently of the other.
"""

from __future__ import annotations

import random

from blockemu.loop.memory_file import MemoryImage, Operation
from tests.unit.drivers.qcow2.crash import CutDisk, Recorder


class _Log(list[Operation]):
    """One file's operations; `order` gets the file's number for each."""

    def __init__(self, number: int, order: list[int]) -> None:
        super().__init__()
        self._number = number
        self._order = order

    def append(self, operation: Operation) -> None:
        super().append(operation)
        self._order.append(self._number)


class _Side(Recorder):
    """What is recorded of one file."""


class TwoFileRecorder(Recorder):
    """Records both; `note` counts the operations of both together."""

    def __init__(self, metadata: MemoryImage, data: MemoryImage, rng: random.Random) -> None:
        self.order: list[int] = []
        for number, image in enumerate((metadata, data)):
            image.log = _Log(number, self.order)
        super().__init__(metadata, rng)
        self.sides = (_Side(metadata, rng), _Side(data, rng))

    def __len__(self) -> int:
        return len(self.order)

    def note(self, kind: str, number: int = -1, *, first: int = 0, count: int = 0,
             value: bytes = b"") -> int:  # fmt: skip
        number = super().note(kind, number, first=first, count=count, value=value)
        self.events[-1] = self.events[-1]._replace(at=len(self.order))
        return number


class TwoFileDisk:
    """Plays both logs up to cuts, in ascending order."""

    def __init__(self, recorder: TwoFileRecorder) -> None:
        self._order = recorder.order
        self._disks = [
            CutDisk(side.content, side.operations, side.flush_starts) for side in recorder.sides
        ]
        self._counts = [0, 0]
        self._at = 0

    def after_cut(self, cut: int, rng: random.Random) -> tuple[bytearray, bytearray]:
        """The image and the data file that a cut after `cut` operations may leave."""
        while self._at < cut:
            self._counts[self._order[self._at]] += 1
            self._at += 1
        image, data = (
            disk.after_cut(count, rng)
            for disk, count in zip(self._disks, self._counts, strict=True)
        )
        return image, data
