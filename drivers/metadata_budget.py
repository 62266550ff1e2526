# SPDX-License-Identifier: Apache-2.0
"""What the metadata of all images of one daemon may take of its memory, together.

An image that is opened asks for what would serve it best: caches that cover the disk, a direct map
with room for every cluster. It gets that as long as the budget lasts, and the least that it can
work with after that. So a daemon with hundreds of images stays within its bound, but for those
minima, and its first images are as fast as ever. What is granted is a bound, filled on demand.

Weighed against: shares that move between images by use. Caches would have to shrink under load, for
a case (hundreds of large images in one process) that a larger bound serves as well.

Context: main, but for `Part.used`, a number that any thread may read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

METADATA_BYTES_MAX = 1 << 30
"""Covers twenty images that are each used over 8 GiB or more at 64 KiB clusters."""


def _nothing() -> int:
    return 0


@dataclass(slots=True)
class Part:
    """One cache or table of an image. Bytes."""

    bytes_max: int
    used: Callable[[], int] = _nothing
    """How many it takes now."""


@dataclass(slots=True)
class Share:
    """What one image has been granted, by part."""

    budget: MetadataBudget
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def bytes_max(self) -> int:
        """Of all its parts."""
        return sum(part.bytes_max for part in self.parts.values())

    def reserve(self, name: str, wanted_bytes: int, *, least_bytes: int = 0) -> int:
        """Bytes for a part: what is wanted, or what is left, but at least `least_bytes`."""
        assert name not in self.parts, name
        left_bytes = self.budget.bytes_max - self.budget.granted_bytes
        granted = max(min(wanted_bytes, left_bytes), min(wanted_bytes, least_bytes))
        self.parts[name] = Part(granted)
        return granted

    def release(self) -> None:
        """The image is closed. A second call does nothing."""
        self.budget.shares.pop(id(self), None)


class MetadataBudget:
    """The bound of one daemon, and who has what of it."""

    def __init__(self, bytes_max: int = METADATA_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.shares: dict[int, Share] = {}

    @property
    def granted_bytes(self) -> int:
        """The sum of all shares."""
        return sum(share.bytes_max for share in self.shares.values())

    def new_share(self) -> Share:
        """For an image that is being opened; to be released when it is closed."""
        share = Share(self)
        self.shares[id(share)] = share
        return share
