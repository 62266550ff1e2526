# SPDX-License-Identifier: Apache-2.0
"""Commands about dirty bitmaps. Each is carried out in its node's home thread."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from blockemu.drivers import bitmap_commands
from blockemu.drivers.errors import ImageError
from blockemu.loop.coroutine import run_in_context
from blockemu.qmp.command import Command, Session
from blockemu.qmp.errors import QmpError
from blockemu.qmp.schema import parse_arguments

if TYPE_CHECKING:
    from blockemu.drivers.dirty_bitmap import DirtyBitmap
    from blockemu.drivers.node import BlockDriverState

T = TypeVar("T")

BITMAPS_MERGED_MAX = 256
"""In one command: each is copied, since it may belong to another thread."""


@dataclass(frozen=True, slots=True)
class BitmapArguments:
    """Which bitmap: `node` is a node's name."""

    node: str
    name: str


@dataclass(frozen=True, slots=True)
class BitmapAddArguments:
    """`granularity`: bytes; without it, the cluster size, within 4 KiB and 64 KiB."""

    node: str
    name: str
    granularity: int | None = None
    persistent: bool = False
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class BitmapMergeArguments:
    """`bitmaps`: names of bitmaps of the same node, or objects of `node` and `name`."""

    node: str
    target: str
    bitmaps: list[Any]


async def bitmap_add(session: Session, arguments: BitmapAddArguments) -> dict[str, Any]:
    """A new bitmap, clean. A persistent one is in its image when the image is closed."""
    name = arguments.node
    node: BlockDriverState | None = session.daemon.opener.nodes.get(name)
    if node is None:
        raise QmpError(f"Cannot find device='{name}' nor node-name='{name}'")
    home = node
    await _at_home(
        home,
        lambda: bitmap_commands.add(
            home,
            arguments.name,
            granularity=arguments.granularity,
            persistent=arguments.persistent,
            enabled=not arguments.disabled,
        ),
    )
    return {}


async def bitmap_remove(session: Session, arguments: BitmapArguments) -> dict[str, Any]:
    """Delete a bitmap, a persistent one from its image, too."""
    return await _change(session, arguments, bitmap_commands.remove)


async def bitmap_clear(session: Session, arguments: BitmapArguments) -> dict[str, Any]:
    """Make it clean."""
    return await _change(session, arguments, bitmap_commands.clear)


async def bitmap_enable(session: Session, arguments: BitmapArguments) -> dict[str, Any]:
    """Have it record."""
    return await _change(session, arguments, bitmap_commands.enable)


async def bitmap_disable(session: Session, arguments: BitmapArguments) -> dict[str, Any]:
    """Have it record no more."""
    return await _change(session, arguments, bitmap_commands.disable)


async def bitmap_merge(session: Session, arguments: BitmapMergeArguments) -> dict[str, Any]:
    """Make dirty what is dirty in any of the bitmaps: all of them are merged, or none is."""
    node = _node(session, arguments.node)
    if len(arguments.bitmaps) > BITMAPS_MERGED_MAX:
        raise QmpError(f"Parameter 'bitmaps' has more than {BITMAPS_MERGED_MAX} elements")
    sources = [
        _source(arguments, index, element) for index, element in enumerate(arguments.bitmaps)
    ]
    copies = [await _copy_of(_node(session, source.node), source.name) for source in sources]
    await _at_home(node, lambda: bitmap_commands.merge(node, arguments.target, *copies))
    return {}


async def describe_bitmaps(node: BlockDriverState) -> list[dict[str, Any]]:
    """A node's bitmaps as BlockDirtyInfo, newest first. Context: main."""

    async def describe() -> list[dict[str, Any]]:
        return [_facts(bitmap) for bitmap in reversed(node.dirty_bitmaps.values())]

    return await run_in_context(node.ctx, describe) if node.dirty_bitmaps else []


def _facts(bitmap: DirtyBitmap) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": bitmap.name,
        "count": bitmap.count(),
        "granularity": bitmap.granularity,
        "recording": bitmap.records,
        "busy": bitmap.busy,
        "persistent": bitmap.persistent,
    }
    if bitmap.inconsistent:
        facts["inconsistent"] = True
    return facts


async def _change(
    session: Session,
    arguments: BitmapArguments,
    change: Callable[[BlockDriverState, str], Coroutine[Any, Any, None]],
) -> dict[str, Any]:
    node = _node(session, arguments.node)
    await _at_home(node, lambda: change(node, arguments.name))
    return {}


async def _copy_of(node: BlockDriverState, name: str) -> DirtyBitmap:
    async def copy() -> DirtyBitmap:
        return (await bitmap_commands.find(node, name)).copy()

    return await _at_home(node, copy)


async def _at_home(node: BlockDriverState, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Do it in the node's thread. Raises: QmpError, with QEMU's sentence, for ImageError."""
    try:
        return await run_in_context(node.ctx, work)
    except ImageError as error:
        raise QmpError(error.reason) from error


def _source(arguments: BitmapMergeArguments, index: int, element: Any) -> BitmapArguments:
    if isinstance(element, str):
        return BitmapArguments(arguments.node, element)
    path = f"bitmaps[{index}]"
    if not isinstance(element, dict):
        raise QmpError(f"Invalid parameter type for '{path}', expected: BlockDirtyBitmapOrStr")
    return parse_arguments(BitmapArguments, element, path=f"{path}.")


def _node(session: Session, name: str) -> BlockDriverState:
    node: BlockDriverState | None = session.daemon.opener.nodes.get(name)
    if node is None:
        raise QmpError(f"Node '{name}' not found")
    return node


COMMANDS = (
    Command("block-dirty-bitmap-add", bitmap_add, BitmapAddArguments),
    Command("block-dirty-bitmap-remove", bitmap_remove, BitmapArguments),
    Command("block-dirty-bitmap-clear", bitmap_clear, BitmapArguments),
    Command("block-dirty-bitmap-enable", bitmap_enable, BitmapArguments),
    Command("block-dirty-bitmap-disable", bitmap_disable, BitmapArguments),
    Command("block-dirty-bitmap-merge", bitmap_merge, BitmapMergeArguments),
)
