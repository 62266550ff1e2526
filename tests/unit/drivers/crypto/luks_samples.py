# SPDX-License-Identifier: Apache-2.0
"""LUKS volumes that take no time to make: a clock by which PBKDF2 is slow."""

from __future__ import annotations

import random
from functools import partial
from itertools import count

from blockemu.drivers.crypto import luks_volume
from blockemu.drivers.crypto.cipher_spec import CipherSpec
from blockemu.drivers.crypto.luks_header import LuksHeader
from blockemu.drivers.crypto.luks_volume import NewVolume

SECRET = b"correct horse"
NAME = "disk.luks"


def slow_clock() -> luks_volume.Clock:
    """A second at each look: the fewest iterations are enough."""
    return partial(next, count(0, 10**9))


def sample(
    algorithm: str = "aes-256", mode: str = "xts", *, seed: int = 1
) -> tuple[LuksHeader, bytes, bytes]:
    """`(header, area, master key)` of a volume that SECRET unlocks."""
    spec = CipherSpec.from_options(NAME, algorithm, mode, "plain64", None)
    return luks_volume.create(
        NAME, NewVolume(spec, iter_time_ms=1), SECRET,
        entropy=random.Random(seed).randbytes, clock=slow_clock(),
    )  # fmt: skip
