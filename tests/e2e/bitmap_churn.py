# SPDX-License-Identifier: Apache-2.0
"""A process that works on an image's bitmaps until it is killed: `python -m ... IMAGE SEED`.

Before each change of what the image has, it prints a line of JSON: what the image has when that is
done, by name what is dirty and whether it records.
"""

from __future__ import annotations

import json
import random
import sys
from typing import TYPE_CHECKING

from blockemu.drivers import bitmap_commands
from blockemu.drivers.registry import Opener
from blockemu.img.info import open_layer
from blockemu.img.session import run_session

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState

GRANULARITY = 512
BITMAPS = 8


def say(node: BlockDriverState, *, without: str = "") -> None:
    state = {
        bitmap.name: [bitmap.enabled, [offset for run in bitmap.ranges() for offset in
                                       range(run[0], sum(run), GRANULARITY)]]
        for bitmap in node.dirty_bitmaps.values()
        if bitmap.name != without and not bitmap.inconsistent
    }  # fmt: skip
    print(json.dumps(state), flush=True)


async def live(opener: Opener, path: str, rng: random.Random) -> None:
    """One opening of the image."""
    node = await open_layer(opener, path, fmt="qcow2", read_only=False)
    for bitmap in list(node.dirty_bitmaps.values()):
        if bitmap.inconsistent:
            await bitmap_commands.remove(node, bitmap.name)
    for number in range(BITMAPS):
        name = f"bitmap-{number}"
        if name not in node.dirty_bitmaps:
            await bitmap_commands.add(
                node, name, granularity=GRANULARITY, persistent=True, enabled=number % 3 > 0
            )
    for _ in range(10):
        offset = rng.randrange(node.length_bytes // GRANULARITY - 8) * GRANULARITY
        await node.pwritev(offset, memoryview(rng.randbytes(8 * GRANULARITY)))
    await node.flush()
    await bitmap_commands.merge(node, "bitmap-0", node.dirty_bitmaps["bitmap-1"])
    await bitmap_commands.clear(node, f"bitmap-{rng.randrange(BITMAPS)}")
    if rng.random() < 0.5:
        gone = f"bitmap-{rng.randrange(BITMAPS)}"
        say(node, without=gone)
        await bitmap_commands.remove(node, gone)
    say(node)
    await node.close()


def main() -> None:
    path, rng = sys.argv[1], random.Random(sys.argv[2])
    while True:
        run_session(lambda opener: live(opener, path, rng))


if __name__ == "__main__":
    main()
