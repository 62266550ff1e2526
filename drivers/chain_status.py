# SPDX-License-Identifier: Apache-2.0
"""Block status of a whole backing chain: which layer the guest's bytes come from.

A driver's `block_status` speaks of its own layer. Where that layer holds nothing, the question is
handed on to its backing file, until a layer holds the bytes, or is known to show zeroes, or has
nothing below it.

A loop and no recursion: a chain may be longer than the interpreter's stack is deep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockemu.drivers.driver import BlockStatus
    from blockemu.drivers.node import BlockDriverState


async def chain_status(
    node: BlockDriverState, offset: int, length: int, *, base: BlockDriverState | None = None
) -> BlockStatus:
    """Describe the bytes from `offset` as `node` shows them: at least one, at most `length`.

    `depth` says in which layer the answer was found: 0 is `node`, 1 its backing file. With `base`,
    a node below in the chain, that one and all below it aren't asked: what they would have to
    answer is reported as not allocated. Neighbouring answers may be alike: merging is the caller's.

    Context: home thread of the node's context. Suspends: while metadata is read; the graph must
    keep its shape meanwhile. Raises: OSError.
    """
    depth = 0
    while True:
        status = await node.block_status(offset, length)
        backing = node.children.get("backing")
        if status.allocated or status.zero or backing is None or backing.node is base:
            return status._replace(depth=depth)
        node, length, depth = backing.node, status.length, depth + 1


def backing_node(node: BlockDriverState) -> BlockDriverState | None:
    """The node of the backing file, where there is one."""
    backing = node.children.get("backing")
    return None if backing is None else backing.node
