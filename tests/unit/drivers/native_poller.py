# SPDX-License-Identifier: Apache-2.0
"""What a native map needs of a context's poll, without one."""

from __future__ import annotations

from collections.abc import Callable

from blockemu.drivers.native_map import MAP_IDLE


class FakePoller:
    """Hands an event on when the test says so."""

    def __init__(self, *, has_aio: bool = True) -> None:
        self.callbacks: dict[int, Callable[[int, int], None]] = {}
        self.tokens = 0
        self.has_aio = has_aio
        self.asked_for_aio = 0

    def add_native(self, callback: Callable[[int, int], None], /) -> int:
        self.tokens += 1
        self.callbacks[self.tokens] = callback
        return self.tokens

    def remove_native(self, token: int, /) -> None:
        del self.callbacks[token]

    def enable_aio(self) -> bool:
        self.asked_for_aio += 1
        return self.has_aio

    def post(self, token: int) -> None:
        self.callbacks[token](MAP_IDLE, 0)
