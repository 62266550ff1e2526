# SPDX-License-Identifier: Apache-2.0
"""What the img subcommands share: a loop for the time of one command, and images opened in it.

Ctrl-C doesn't tear a command from the middle of a step: the command's task is cancelled, closes its
images (and removes what it had half made), and then the interrupt goes on to the caller. A second
one no longer waits for servers that don't answer.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.errors import ImageError
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.img.session_objects import session_objects
from blockemu.jobs.job import Job, JobCancelled
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Cancelled
from blockemu.loop.host_file import FileEngine, PosixFiles
from blockemu.loop.signals import SignalWatcher

T = TypeVar("T")

CACHE_MODES: Final[dict[str, dict[str, Any]]] = {
    "none": {"direct": True},
    "directsync": {"direct": True},
    "writeback": {},
    "writethrough": {},
    "unsafe": {"no-flush": True},
}
"""QEMU's names for the ways through the host's cache, as options of the file node. A command that
writes flushes before it ends; to it, the -sync and -through modes are no others."""


def run_session(
    work: Callable[[Opener], Coroutine[Any, Any, T]], *, files: FileEngine | None = None
) -> T:
    """Run `work` in a new main context, and return what it returns.

    Context: the process's main thread, in which no loop runs.
    Raises: what `work` raises; KeyboardInterrupt after a SIGINT, when `work` has cleaned up.
    """
    ctx = AioContext("main")
    ctx.adopt()
    try:
        objects = session_objects()
        opener = Opener(files=files or PosixFiles(), ctx=ctx, objects=objects)
        interrupts = 0

        def interrupt(signum: int) -> None:
            nonlocal interrupts
            interrupts += 1
            if interrupts == 1:
                task.cancel()
            else:
                for node in opener.nodes.values():
                    node.driver.cancel_in_flight("interrupted")

        task = ctx.spawn(work(opener))
        watcher = SignalWatcher(ctx, (signal.SIGINT,), interrupt)
        try:
            while not task.done():
                ctx.poll(blocking=True)
        finally:
            watcher.close()
        return task.result()
    except Cancelled:
        raise KeyboardInterrupt from None
    finally:
        ctx.close()


@asynccontextmanager
async def open_image(
    opener: Opener,
    path: str,
    *,
    fmt: str | None,
    writable: bool = False,
    resizable: bool = False,
    cache: str = "writeback",
    aio: str = "native",
    force_share: bool = False,
    snapshot: str | None = None,
) -> AsyncIterator[BlockBackend]:
    """The image at `path`, open inside the block; flushed and closed at its end.

    `fmt` None means: find it out, and refuse an image that names other files. `snapshot`: as it
    was at that internal snapshot (an id, or else a name), to read.
    Raises: ImageError; of the block, an OSError becomes an ImageError that names the image.
    """
    node = await _open_node(
        opener, path, fmt=fmt, writable=writable, cache=cache, aio=aio, force_share=force_share,
        snapshot=snapshot,
    )  # fmt: skip
    async with _held(path, node, writable=writable, resizable=resizable) as backend:
        yield backend


@asynccontextmanager
async def open_window(
    opener: Opener,
    path: str,
    *,
    fmt: str | None,
    choose: Callable[[int], tuple[int, int]],
    force_share: bool = False,
) -> AsyncIterator[BlockBackend]:
    """A part of the disk at `path`, to read. `choose` is told the disk's length in bytes and
    answers with the part's offset and length. Otherwise as `open_image`.
    """
    disk = await _open_node(
        opener,
        path,
        fmt=fmt,
        writable=False,
        cache="writeback",
        aio="native",
        force_share=force_share,
    )
    try:
        offset, length = choose(disk.length_bytes)
        options = {"driver": "raw", "file": disk.node_name, "offset": offset, "size": length}
        node = await opener.open({**options, "read-only": True})
    except BaseException:
        await disk.close()
        raise
    async with _held(path, node, writable=False, resizable=False) as backend:
        yield backend


async def _open_node(
    opener: Opener,
    path: str,
    *,
    fmt: str | None,
    writable: bool,
    cache: str,
    aio: str,
    force_share: bool,
    snapshot: str | None = None,
) -> BlockDriverState:
    options: dict[str, Any] = {"read-only": not writable, "force-share": force_share}
    if snapshot is not None:
        if fmt == "raw":
            raise ImageError(path, "format raw has no internal snapshots")
        options["snapshot"] = snapshot
    return await opener.open_named(
        path,
        fmt=fmt,
        options=options,
        file_options={"aio": aio, "cache": CACHE_MODES[cache]},
    )


@asynccontextmanager
async def _held(
    path: str, node: BlockDriverState, *, writable: bool, resizable: bool
) -> AsyncIterator[BlockBackend]:
    try:
        backend = BlockBackend(path, node, writable=writable, resizable=resizable)
    except BaseException:
        await node.close()
        raise
    try:
        try:
            yield backend
        finally:
            await backend.close()
    except OSError as error:
        raise ImageError.from_os_error(path, error) from error


async def finish(job: Job) -> None:
    """Start the job and wait for its end.

    If the caller is cancelled, so is the job, and it is over when Cancelled goes on.
    Suspends: while the job runs. Raises: what the job failed with.
    """
    job.start()
    try:
        await job.wait()
    except Cancelled:
        job.cancel(force=True)
        try:
            await job.wait()
        except (JobCancelled, ImageError):
            pass  # the interrupt is what the user hears of
        raise
