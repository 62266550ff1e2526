# SPDX-License-Identifier: Apache-2.0
"""`img bitmap`: the persistent dirty bitmaps of one image, changed one action after the other.

The image is opened alone, never with its backing file: bitmaps don't touch that. At the end they
are stored; when that fails the image has them as they were before.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockemu.drivers import bitmap_commands
from blockemu.drivers.errors import ImageError
from blockemu.img.info import open_layer
from blockemu.img.session import run_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.registry import Opener
    from blockemu.loop.host_file import FileEngine


class Verb(enum.Enum):
    """What to do, under qemu-img's names."""

    ADD = "add"
    REMOVE = "remove"
    CLEAR = "clear"
    ENABLE = "enable"
    DISABLE = "disable"
    MERGE = "merge"


@dataclass(frozen=True, slots=True)
class Action:
    """One step. `source`: of MERGE, the bitmap to take over."""

    verb: Verb
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapRequest:
    """What the user asked for. `source_path`: whose bitmaps are merged; None: those of `path`."""

    path: str
    bitmap: str
    actions: Sequence[Action]
    fmt: str | None = None
    granularity: int | None = None
    source_path: str | None = None
    source_fmt: str | None = None

    def check(self) -> None:
        """What contradicts itself. Raises: ImageError."""
        verbs = {action.verb for action in self.actions}
        if not verbs:
            raise ImageError(
                self.path,
                "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
            )
        if self.granularity is not None and Verb.ADD not in verbs:
            raise ImageError(self.path, "granularity only supported with --add")
        if self.source_path is not None and Verb.MERGE not in verbs:
            raise ImageError(self.path, "Merge bitmap source file only supported with --merge")
        if self.source_fmt is not None and self.source_path is None:
            raise ImageError(self.path, "-F only supported with -b")


def change_bitmap(request: BitmapRequest, *, files: FileEngine | None = None) -> None:
    """Carry the request out. Durable when this returns.

    Context, and what an interrupt does: as `run_session`. Raises: ImageError.
    """
    request.check()
    run_session(lambda opener: _change(opener, request), files=files)


async def _change(opener: Opener, request: BitmapRequest) -> None:
    async with _opened(opener, request.path, request.fmt, read_only=False) as node:
        if request.source_path is None:
            await _act(node, node, request)
        else:
            async with _opened(
                opener, request.source_path, request.source_fmt, read_only=True
            ) as source:
                await _act(node, source, request)


async def _act(node: BlockDriverState, source: BlockDriverState, request: BitmapRequest) -> None:
    for action in request.actions:
        try:
            await _do(node, source, request, action)
        except ImageError as error:
            what = f"Operation {action.verb.value} on bitmap {request.bitmap} failed"
            raise ImageError(error.name, f"{what}: {error.reason}") from error
    await node.driver.store_bitmaps()


async def _do(
    node: BlockDriverState, source: BlockDriverState, request: BitmapRequest, action: Action
) -> None:
    name = request.bitmap
    if action.verb is Verb.ADD:
        await bitmap_commands.add(node, name, granularity=request.granularity, persistent=True)
    elif action.verb is Verb.REMOVE:
        await bitmap_commands.remove(node, name)
    elif action.verb is Verb.CLEAR:
        await bitmap_commands.clear(node, name)
    elif action.verb is Verb.ENABLE:
        await bitmap_commands.enable(node, name)
    elif action.verb is Verb.DISABLE:
        await bitmap_commands.disable(node, name)
    else:
        taken = await bitmap_commands.find(source, action.source)
        await bitmap_commands.merge(node, name, taken)


@asynccontextmanager
async def _opened(
    opener: Opener, path: str, fmt: str | None, *, read_only: bool
) -> AsyncIterator[BlockDriverState]:
    if fmt is None and not read_only:
        fmt = await _safe_guess(opener, path)
    node = await open_layer(opener, path, fmt=fmt, read_only=read_only)
    try:
        yield node
    except OSError as error:
        raise ImageError.from_os_error(path, error) from error
    finally:
        await node.close()


async def _safe_guess(opener: Opener, path: str) -> str:
    """The image's format, found out. Raises: ImageError, if another file would be opened for it,
    whose name whoever can write to a raw disk could have put there."""
    node = await open_layer(opener, path, fmt=None, read_only=True)
    try:
        other = node.driver.info().get("format-specific", {}).get("data", {}).get("data-file")
        fmt = node.driver.name
    finally:
        await node.close()
    if other is not None:
        raise ImageError(
            path,
            f"has its data in another file, '{other}', and its format was only guessed: say "
            f"-f {fmt} to open both",
        )
    return fmt
