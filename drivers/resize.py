# SPDX-License-Identifier: Apache-2.0
"""Changing the size of a node that is in use.

It happens inside a drained section: nothing is in flight that would reach past a new end, no direct
map tells an old one, and those who wait at the door are judged by the new size when it opens. A
file that grew by itself (or a device, such as a logical volume) is taken in the same way: by asking
for the size that it has.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.child import Permission
from blockemu.drivers.drain import DrainedSection
from blockemu.drivers.errors import io_error

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState

SIZE_MAX = 2**63 - 512
"""What a disk may have: a multiple of a sector below the largest offset of a file."""


async def resize_node(node: BlockDriverState, length: int) -> None:
    """Make the disk `length` bytes long. What is new reads as zeroes; what is cut off is gone.

    The new size is durable when it is done. Not for a coroutine that is itself a request on the
    node.
    Context: home thread of `node.ctx`. Suspends: until it is quiet, and for the driver's work.
    Raises: ImageError, when another user of the node forbids it; OSError: EPERM or EACCES where it
    is read-only, ENOTSUP where the driver can't, ENOSPC, EFBIG, EIO.
    """
    node.ctx.assert_home()
    if not 0 <= length <= SIZE_MAX:
        raise io_error(errno.EFBIG, f"{node.node_name}: {length} bytes are no size for a disk")
    if node.read_only:
        raise io_error(errno.EPERM, f"{node.filename or node.node_name} is read-only")
    backend = BlockBackend("resize", node, writable=True, resizable=True, shared=Permission.ALL)
    try:
        async with DrainedSection(node):
            await node.truncate(length)
    finally:
        await backend.close()
