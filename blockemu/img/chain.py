# SPDX-License-Identifier: Apache-2.0
"""The names in a backing chain: read from the headers, one image open at a time.

For commands that open a chain in another shape than its headers say: with a part of it writable, or
cut off, or with another chain beside it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from blockemu.drivers.errors import ImageError
from blockemu.drivers.registry import BACKING_DEPTH_MAX
from blockemu.img.info import guess_format

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.registry import Opener


class Link(NamedTuple):
    """One image of a chain, and what its header says of the next."""

    path: str
    fmt: str
    length_bytes: int
    cluster_size: int
    backing_file: str | None
    backing_fmt: str | None


async def read_link(
    opener: Opener, path: str, *, fmt: str | None, force_share: bool = False
) -> Link:
    """Look at the image at `path`, alone. `fmt` None: found out, which no other file depends on.

    Raises: ImageError.
    """
    shared = {"read-only": True, "force-share": force_share, "no-io": True}
    file = await opener.open({"driver": "file", "filename": path, "aio": "threads", **shared})
    try:
        if fmt is None:
            fmt = await guess_format(opener, file)
        if fmt in ("file", "host_device") or opener.drivers.find(fmt) is None:
            raise ImageError(path, f"there is no image format '{fmt}'")
        alone = {} if fmt == "raw" else {"backing": None}
        node = await opener.open({"driver": fmt, "file": file.node_name, **alone, **shared})
    except BaseException:
        await file.close()
        raise
    try:
        facts = node.driver.info()
        return Link(
            path, fmt, node.length_bytes, facts.get("cluster-size", 65536),
            facts.get("backing-filename"), facts.get("backing-filename-format"),
        )  # fmt: skip
    finally:
        await node.close()


async def read_chain(opener: Opener, path: str, *, fmt: str | None) -> list[Link]:
    """The image at `path` and all below it. Raises: ImageError: missing, or leads to itself."""
    chain = [await read_link(opener, path, fmt=fmt)]
    seen = {os.path.realpath(path)}
    while (backing := chain[-1].backing_file) is not None:
        above = chain[-1].path
        below = opener.resolve_backing(above, backing)
        if os.path.realpath(below) in seen:
            raise ImageError(above, f"its backing file '{backing}' leads back to itself")
        if len(chain) >= BACKING_DEPTH_MAX:
            raise ImageError(path, f"more than {BACKING_DEPTH_MAX} backing files in one chain")
        seen.add(os.path.realpath(below))
        below_fmt = chain[-1].backing_fmt
        if not below_fmt:
            raise ImageError(above, f"doesn't say which format its backing file '{backing}' has")
        said = opener.node_options.get(above, {}).get("backing")
        if isinstance(said, dict):  # of the one below, too, which is opened by itself
            opener.node_options.setdefault(below, said)
        try:
            chain.append(await read_link(opener, below, fmt=below_fmt))
        except ImageError as error:
            raise _below(error, below, above) from error
    return chain


async def open_beside(
    opener: Opener, node: BlockDriverState, *, image: str, options: dict[str, Any]
) -> BlockDriverState:
    """Open a chain that the image of `node` may get as its backing chain. Read-only.

    `options` are those of the chain's first image. Raises: ImageError: it leads back to the image,
    or what `Opener.open` raises.
    """
    path = options["file"]["filename"]
    own, real = node.backing_names, os.path.realpath(image)
    if os.path.realpath(path) == real:
        raise ImageError(image, "an image can't be its own backing file")
    node.backing_names = own | {real}
    try:
        return await opener.open({**options, "read-only": True}, above=node)
    except ImageError as error:
        raise _below(error, path, image) from error
    finally:
        node.backing_names = own


def _below(error: ImageError, path: str, above: str) -> ImageError:
    """The same failure, saying whose backing file it is about."""
    if error.name != path:
        return error
    return ImageError(path, f"is the backing file of {above}: {error.reason}")
