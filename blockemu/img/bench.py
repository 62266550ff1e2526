# SPDX-License-Identifier: Apache-2.0
"""`img bench`: a run of requests of one size, so many in parallel, and how long it took.

It measures this program's block layer on this image, from inside: no NBD, no client. `make bench`
is for comparisons with other servers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blockemu.drivers.errors import ImageError
from blockemu.img.session import open_image, run_session
from blockemu.loop.sync import gather, yield_now

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.registry import Opener

BUFFERS_BYTES_MAX: Final = 1 << 30
"""Memory for the buffers of all requests in parallel."""

REQUESTS_PER_TURN: Final = 64
"""Requests after which others get a turn, an interrupt among them, if none of them had to wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """What to do; defaults are qemu-img's. Sizes and offsets in bytes.

    `flush_interval`: flush whenever so many requests are done, 0: never; with `drain`, nothing else
    is under way meanwhile.
    """

    path: str
    fmt: str | None = None
    count: int = 75000
    depth: int = 64
    buffer_bytes: int = 4096
    step_bytes: int | None = None
    start: int = 0
    write: bool = False
    pattern: int = 0
    flush_interval: int = 0
    drain: bool = True
    cache: str = "writeback"
    aio: str = "threads"
    force_share: bool = False

    @property
    def step(self) -> int:
        """How far the next request is from the one before it."""
        return self.buffer_bytes if self.step_bytes is None else self.step_bytes

    def check(self) -> None:
        """What contradicts itself, or goes too far. Raises: ImageError."""
        if self.buffer_bytes * self.depth > BUFFERS_BYTES_MAX:
            raise ImageError(
                self.path,
                f"{self.depth} requests of {self.buffer_bytes} bytes in parallel take more than "
                f"{BUFFERS_BYTES_MAX} bytes of memory",
            )
        if self.flush_interval and not self.write:
            raise ImageError(self.path, "--flush-interval is for writes (-w)")
        if 0 < self.flush_interval < self.depth:
            raise ImageError(self.path, "--flush-interval can't be smaller than the depth (-d)")

    def introduction(self) -> list[str]:
        """What is going to be done, in qemu-img's words."""
        lines = [
            f"Sending {self.count} {'write' if self.write else 'read'} requests, "
            f"{self.buffer_bytes} bytes each, {self.depth} in parallel "
            f"(starting at offset {self.start}, step size {self.step})"
        ]
        if self.flush_interval:
            lines.append(f"Sending flush every {self.flush_interval} requests")
        return lines


def run_bench(request: BenchRequest, *, say: Callable[[str], None]) -> None:
    """Run it, and tell `say` what is done and how long it took.

    Context: the main thread, in which no loop runs. Raises: ImageError.
    """
    request.check()

    async def work(opener: Opener) -> None:
        async with open_image(
            opener,
            request.path,
            fmt=request.fmt,
            writable=request.write,
            cache=request.cache,
            aio=request.aio,
            force_share=request.force_share,
        ) as image:
            for line in request.introduction():
                say(line)
            begun_ns = opener.ctx.now_ns()
            await Run(request, image).run()
            say(f"Run completed in {(opener.ctx.now_ns() - begun_ns) / 1e9:.3f} seconds.")

    run_session(work)


class Run:
    """One run on an open image. Context: home thread of its context."""

    def __init__(self, request: BenchRequest, image: BlockBackend) -> None:
        self._request = request
        self._image = image
        self._left = request.count
        self._position = request.start

    async def run(self) -> None:
        """Suspends: for I/O. Raises: OSError of the first request that fails."""
        interval = self._request.flush_interval
        if not interval or not self._request.drain:
            await self._requests(self._left)
            return
        while self._left:
            await self._requests(self._left % interval or interval)
            await self._image.flush()

    async def _requests(self, count: int) -> None:
        """Do `count` requests, and wait for all."""
        until = self._left - count
        await gather(*(self._worker(until) for _ in range(min(count, self._request.depth))))

    async def _worker(self, until: int) -> None:
        request = self._request
        pool = self._image.ctx.buffers
        buffer = pool.take(request.buffer_bytes)
        try:
            view = buffer.view[: request.buffer_bytes]
            if request.write:
                view[:] = bytes((request.pattern,)) * len(view)
            while self._left > until:
                await self._one(view)
                if self._left % REQUESTS_PER_TURN == 0:
                    await yield_now()
        except BaseException:
            self._left = until
            raise
        finally:
            pool.give(buffer)

    async def _one(self, view: memoryview) -> None:
        request, position = self._request, self._position
        self._left -= 1
        left = self._left
        self._position = (position + request.step) % max(self._image.length_bytes, 1)
        if not request.write:
            await self._image.preadv(position, view)
            return
        await self._image.pwritev(position, view)
        if not request.drain and request.flush_interval and left % request.flush_interval == 0:
            await self._image.flush()
