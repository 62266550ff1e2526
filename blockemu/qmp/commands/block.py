# SPDX-License-Identifier: Apache-2.0
"""Commands about block nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockemu.drivers.resize import resize_node
from blockemu.img.info import image_info
from blockemu.loop.coroutine import run_in_context
from blockemu.qmp.command import Command, Session
from blockemu.qmp.commands.bitmap import describe_bitmaps
from blockemu.qmp.commands.nodes import find_node
from blockemu.qmp.errors import QmpError
from blockemu.qmp.schema import NoArguments

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState


@dataclass(frozen=True, slots=True)
class NamedBlockNodesArguments:
    """`flat`: leave the backing images out of each node's `image`."""

    flat: bool = False


@dataclass(frozen=True, slots=True)
class BlockResizeArguments:
    """Of `block_resize`, whose names have underscores or none. `size` in bytes."""

    size: int
    device: str = ""
    node_name: str = ""


async def block_resize(session: Session, arguments: BlockResizeArguments) -> dict[str, Any]:
    """Change the size of a disk while it is in use; also how to take in a file or device that has
    changed its size by itself. Suspends: until it is done, in the node's context."""
    device = "" if arguments.node_name else arguments.device
    node = find_node(session, device=device, node_name=arguments.node_name)
    if arguments.size < 0:
        raise QmpError("Parameter 'size' expects a >0 size")
    await run_in_context(node.ctx, lambda: resize_node(node, arguments.size))
    return {}


async def query_named_block_nodes(
    session: Session, arguments: NamedBlockNodesArguments
) -> list[dict[str, Any]]:
    """Every node of the graph, newest first."""
    nodes = reversed(list(session.daemon.opener.nodes.values()))
    found = []
    for node in list(nodes):
        facts = describe_node(node, flat=arguments.flat)
        if bitmaps := await describe_bitmaps(node):
            facts["dirty-bitmaps"] = bitmaps
        found.append(facts)
    return found


def describe_node(node: BlockDriverState, *, flat: bool) -> dict[str, Any]:
    """A node as BlockDeviceInfo. Context: main; what it reads are plain attributes."""
    image = image_info(node)
    backing = _backing(node)
    above = image
    while backing is not None and not flat:
        above["backing-image"] = above = image_info(backing)
        backing = _backing(backing)
    shown: dict[str, Any] = {
        "file": node.filename or "",
        "node-name": node.node_name,
        "ro": node.read_only,
        "drv": node.driver.name,
        "backing_file_depth": _backing_depth(node),
        "encrypted": False,
        "detect_zeroes": node.detect_zeroes,
        "cache": _cache(node),
        "write_threshold": 0,
        "image": image,
    }
    for unit in ("bps", "iops"):
        for direction in ("", "_rd", "_wr"):
            shown[unit + direction] = 0
    nearest = _backing(node)
    if nearest is not None:
        shown["backing_file"] = nearest.filename or ""
    return shown


async def query_metadata_memory(session: Session, arguments: NoArguments) -> dict[str, Any]:
    """What the images' metadata may take of our memory, and what it takes. Not a command of
    QEMU's: members may change."""
    opener = session.daemon.opener
    return {
        "bytes-max": opener.metadata_budget.bytes_max,
        "bytes-granted": opener.metadata_budget.granted_bytes,
        "nodes": [
            {
                "node-name": node.node_name,
                "parts": [
                    {"part": name, "bytes-max": part.bytes_max, "bytes-used": part.used()}
                    for name, part in share.parts.items()
                ],
            }
            for node in opener.nodes.values()
            if (share := node.driver.metadata_share) is not None
        ],
    }


def _backing(node: BlockDriverState) -> BlockDriverState | None:
    edge = node.children.get("backing")
    return edge.node if edge is not None else None


def _backing_depth(node: BlockDriverState) -> int:
    depth = 0
    below = _backing(node)
    while below is not None:
        depth += 1
        below = _backing(below)
    return depth


def _cache(node: BlockDriverState) -> dict[str, Any]:
    cache = node.file_options.get("cache", {})
    return {
        "writeback": True,
        "direct": bool(cache.get("direct")),
        "no-flush": bool(cache.get("no-flush")),
    }


COMMANDS = (
    Command("block_resize", block_resize, BlockResizeArguments),
    Command("query-named-block-nodes", query_named_block_nodes, NamedBlockNodesArguments),
    Command("x-query-metadata-memory", query_metadata_memory),
)
