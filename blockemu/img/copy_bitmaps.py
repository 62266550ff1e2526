# SPDX-License-Identifier: Apache-2.0
"""`img convert --bitmaps`: the persistent dirty bitmaps of one image, made anew in another one.

They are made when the data is copied, so that they record nothing of that.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from blockemu.drivers import bitmap_commands
from blockemu.drivers.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockemu.drivers.node import BlockDriverState

log = logging.getLogger(__name__)


async def bitmaps_to_copy(source: BlockDriverState, *, skip_broken: bool) -> list[str]:
    """The names of those that can be copied. `skip_broken`: others are left out, with a warning.

    Suspends: for them to be read. Raises: ImageError: there can be none, or one is inconsistent.
    """
    name = bitmap_commands.node_label(source)
    if not source.driver.supports_bitmaps:
        raise ImageError(name, "Source lacks bitmap support")
    found = []
    for stored in source.driver.stored_bitmaps:
        bitmap = await source.driver.load_bitmap(stored)
        if bitmap is not None and not bitmap.inconsistent:
            found.append(stored)
        elif skip_broken:
            log.warning("%s: Skipping inconsistent bitmap '%s'", name, stored)
        else:
            raise ImageError(
                name,
                f"Cannot copy inconsistent bitmap '{stored}': try --skip-broken-bitmaps, or delete "
                "it with blockemu img bitmap --remove",
            )
    return found


async def copy_bitmaps(
    source: BlockDriverState, target: BlockDriverState, names: Sequence[str]
) -> None:
    """Make these bitmaps in `target`, and store them. It can't be written any more after that.

    Raises: ImageError, OSError.
    """
    if not target.driver.supports_bitmaps:
        raise ImageError(
            bitmap_commands.node_label(target),
            f"Format driver '{target.driver.name}' does not support bitmaps",
        )
    for name in names:
        found = await bitmap_commands.find(source, name)
        try:
            await bitmap_commands.add(
                target, name, granularity=found.granularity, persistent=True, enabled=False
            )
        except ImageError as error:
            raise ImageError(
                error.name, f"Failed to create bitmap {name}: {error.reason}"
            ) from error
        await bitmap_commands.merge(target, name, found)
        if found.enabled:
            await bitmap_commands.enable(target, name)
    await target.driver.store_bitmaps()
