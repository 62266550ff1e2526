# SPDX-License-Identifier: Apache-2.0
"""Was the image preallocated, so that clusters which it names are holes in its file?

Then block status has to ask the file, too: otherwise all of such a disk would be data, to be read
and copied. Asking the file always would cost a system call or two for each stretch of every image,
and cut the answers to pieces where a cluster was written in part.

So this is a guess, QEMU's: an image is taken for preallocated if its refcounts know of clearly more
clusters than the host has given the file. A wrong guess makes answers coarser or finer, not false.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.qcow2.layout import div_up

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image import Image


async def looks_preallocated(image: Image) -> bool:
    """Suspends: while refcounts are read, if the file is sparse enough. Raises: OSError."""
    host = image.file.host_file
    if host is None or host.is_block_device:
        return False
    size = image.layout.cluster_size
    given = host.allocated_bytes() // size
    enough = max(given * 10 // 9, given + 2)
    clusters = div_up(image.file.length, size)
    return clusters >= enough and await image.refcounts.has_used(enough, before=clusters)
