# SPDX-License-Identifier: Apache-2.0
"""What an export is told by its node: whether seeks are slow, whether there is one cache.

Context: main, or the node's; what is read are plain attributes and small files of the kernel's.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState

SYSFS = Path("/sys")


def is_rotational(node: BlockDriverState, *, sysfs: Path = SYSFS) -> bool:
    """Whether a host file of the graph below `node` lies on a device that the host's kernel calls
    rotational. A filesystem without a device (tmpfs, overlay, network) is none."""
    return any(
        _device_rotates(below.filename, sysfs)
        for below in node.subtree()
        if below.driver.is_protocol and below.driver.host_file is not None and below.filename
    )


def _device_rotates(filename: str, sysfs: Path) -> bool:
    try:
        status = os.stat(filename)
    except OSError:
        return False
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    folder = sysfs / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"
    # A partition's folder lies in its disk's, which has the queue. The entry is a link.
    for queue in ("queue", "../queue"):
        try:
            return (folder.resolve() / queue / "rotational").read_text().strip() == "1"
        except (OSError, ValueError):
            continue
    return False


def has_one_cache(node: BlockDriverState) -> bool:
    """Whether a flush on one connection covers what another wrote: not where a node below is a
    client of a server that doesn't promise it."""
    return all(below.driver.multi_conn for below in node.subtree())
