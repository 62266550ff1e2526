# SPDX-License-Identifier: Apache-2.0
"""NBD_CMD_RESIZE (8): a client changes the size of an export that lets it.

The protocol document reserves the command and the flag for an experimental extension, which lies in
its own branch (extension-resize) and was never merged. By that text, the header's `offset` is the
new size; EPERM is for exports that don't allow it, and for making one smaller that other clients
use; and what lies beyond the end of a resizable export is ENOSPC for all commands, reads too.
Nobody is told of a new size who doesn't ask again (INFO, GO): the protocol has no way to.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.nbd.protocol import NbdError
from blockemu.drivers.resize import resize_node
from blockemu.nbd.reply_style import Failure

if TYPE_CHECKING:
    from blockemu.exports import Export


def check_resize(export: Export, flags: int, length: int) -> Failure | None:
    """What is to be said against the request, whatever the size that it asks for."""
    if flags or length:
        return Failure(NbdError.NBD_EINVAL, "RESIZE has neither flags nor a length")
    assert not export.read_only
    return None


async def resize_export(export: Export, size: int) -> None:
    """Make the export's disk `size` bytes long.

    Context: home thread of the export's context, in a request's coroutine, outside the node.
    Suspends: until the node is quiet, and for the driver's work.
    Raises: OSError, EPERM when somebody else would lose what is cut off.
    """
    node = export.backend.node
    if size < node.length_bytes and (export.clients > 1 or _other_users(export)):
        raise io_error(errno.EPERM, "others use the export, too: it can't become smaller")
    try:
        await resize_node(node, size)
    except ImageError as error:
        raise io_error(errno.EPERM, str(error)) from error


def _other_users(export: Export) -> bool:
    """Whether another export, or a job, uses the node. A hold that only keeps it open doesn't."""
    root = export.backend.root
    return any(edge.perm for edge in root.node.parents if edge is not root)
