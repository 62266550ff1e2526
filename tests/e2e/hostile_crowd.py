# SPDX-License-Identifier: Apache-2.0
"""Many hostile clients in one process of low priority: `python -m tests.e2e.hostile_crowd`.

Arguments: the socket's path, an export, how many, and which sorts (all of them). It prints "ready"
when all have begun, and goes on until its stdin ends. They share the processor with the server
here, which real ones wouldn't; so they are nice, and what is seen of them is what they cost the
server.

What they do, in equal parts: never read their replies; stall in the middle of a payload; drip a
request byte by byte; stall in the middle of negotiation; flood with requests, and read the replies;
send garbage, get thrown out, and come again.
"""

from __future__ import annotations

import os
import random
import selectors
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.protocol.client import Client, info_data
from tests.protocol.wire import Cmd

PACE_S = 0.05
"""Between two steps of everybody's slow deeds."""


class Hostile:
    """One of them. `step` is called again and again, `readable` when there is something to read."""

    def __init__(self, path: Path, export: str) -> None:
        self.path, self.export = path, export
        self.client = self.enter()

    def enter(self) -> Client:
        """Its connection, non-blocking from now on."""
        client = Client.entered(self.path, self.export)
        client.sock.setblocking(False)
        return client

    def begin(self) -> None:
        """Its first deed."""

    def step(self) -> None:
        """Its next one, in its own time."""

    def readable(self) -> None:
        """The server says something."""

    def send(self, data: bytes) -> None:
        """As much as goes."""
        try:
            self.client.sock.send(data)
        except OSError:
            pass


class NeverReads(Hostile):
    """Asks for as much as it may, and takes nothing of it."""

    def begin(self) -> None:
        self.send(self.client.header(Cmd.READ, 0, 1 << 20) * 100)


class HalfAPayload(Hostile):
    """The second half never comes."""

    def begin(self) -> None:
        self.send(self.client.header(Cmd.WRITE, 0, 1 << 20) + bytes(50_000))


class Drips(Hostile):
    """A READ, one byte a step."""

    def begin(self) -> None:
        self._rest = b""

    def step(self) -> None:
        self._rest = self._rest or self.client.header(Cmd.READ, 0, 512)
        self.send(self._rest[:1])
        self._rest = self._rest[1:]

    def readable(self) -> None:
        self.client.sock.recv(1 << 16)


class HalfAnOption(Hostile):
    """Negotiates, and stops in the middle; comes again when it is shown the door."""

    def enter(self) -> Client:
        client = Client.greeted(self.path)
        client.sock.setblocking(False)
        return client

    def begin(self) -> None:
        self.send(b"IHAVEOPT\0\0\0\7\0\0\0\xff" + info_data(self.export))

    def readable(self) -> None:
        if not self.client.sock.recv(1 << 16):
            raise ConnectionResetError


class Floods(Hostile):
    """Always has as many requests on their way as go."""

    def begin(self) -> None:
        self._batch = self.client.header(Cmd.READ, 0, 4096) * 64
        self.send(self._batch)

    def readable(self) -> None:
        if not self.client.sock.recv(1 << 20):
            raise ConnectionResetError
        # A whole batch or nothing: half a header would be another kind of hostile.
        try:
            self.client.sock.send(self._batch)
        except BlockingIOError:
            pass


class Garbage(Hostile):
    """Noise where a request is due."""

    def step(self) -> None:
        self.send(os.urandom(64))
        raise ConnectionResetError


SORTS: tuple[type[Hostile], ...] = (
    NeverReads,
    HalfAPayload,
    Drips,
    HalfAnOption,
    Floods,
    Garbage,
)


class Crowd:
    """All of them."""

    def __init__(
        self, path: Path, export: str, count: int, sorts: Sequence[type[Hostile]] = SORTS
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._around: list[Hostile] = []
        for number in range(count):
            self._join(sorts[number % len(sorts)](path, export))

    def _join(self, hostile: Hostile) -> None:
        hostile.begin()
        self._around.append(hostile)
        if type(hostile).readable is not Hostile.readable:
            self._selector.register(hostile.client.sock, selectors.EVENT_READ, hostile)

    def _again(self, hostile: Hostile) -> None:
        """Thrown out, or gone by itself: it comes again."""
        if type(hostile).readable is not Hostile.readable:
            self._selector.unregister(hostile.client.sock)
        hostile.client.close()
        self._around.remove(hostile)
        self._join(type(hostile)(hostile.path, hostile.export))

    def run(self, stdin: int) -> None:
        """Until `stdin` ends."""
        self._selector.register(stdin, selectors.EVENT_READ, None)
        rng = random.Random(8)
        next_step = time.monotonic()
        while True:
            for key, _ in self._selector.select(PACE_S):
                if key.data is None:
                    return
                self._do(key.data, key.data.readable)
            if time.monotonic() >= next_step:
                next_step = time.monotonic() + PACE_S
                for hostile in rng.sample(self._around, len(self._around) // 5):
                    self._do(hostile, hostile.step)

    def _do(self, hostile: Hostile, deed: Callable[[], None]) -> None:
        try:
            deed()
        except BlockingIOError:
            pass
        except ConnectionError:
            self._again(hostile)


def main() -> None:
    """See the module's docstring."""
    os.nice(19)
    path, export, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    sorts = [sort for sort in SORTS if sort.__name__ in sys.argv[4:]] or SORTS
    crowd = Crowd(path, export, count, sorts)
    print("ready", flush=True)
    crowd.run(sys.stdin.fileno())


if __name__ == "__main__":
    main()
