# SPDX-License-Identifier: Apache-2.0
"""The names in a backing chain: read from the headers, one image open at a time.

For commands that open a chain in another shape than its headers say: with a part of it writable, or
cut off, or with another chain beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import identity, resolve
from blockemu.drivers.registry import BACKING_DEPTH_MAX
from blockemu.img.info import open_layer

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
    node = await open_layer(opener, path, fmt=fmt, read_only=True, force_share=force_share)
    try:
        facts = node.driver.info()
        return Link(
            path, node.driver.name, node.length_bytes, facts.get("cluster-size", 65536),
            facts.get("backing-filename"), facts.get("backing-filename-format"),
        )  # fmt: skip
    finally:
        await node.close()


async def read_chain(opener: Opener, path: str, *, fmt: str | None) -> list[Link]:
    """The image at `path` and all below it. Raises: ImageError: missing, or leads to itself."""
    chain = [await read_link(opener, path, fmt=fmt)]
    seen = {identity(path)}
    while (backing := chain[-1].backing_file) is not None:
        above = chain[-1].path
        below = resolve(backing, above=above)
        if identity(below) in seen:
            raise ImageError(above, f"its backing file '{backing}' leads back to itself")
        if len(chain) >= BACKING_DEPTH_MAX:
            raise ImageError(path, f"more than {BACKING_DEPTH_MAX} backing files in one chain")
        seen.add(identity(below))
        below_fmt = chain[-1].backing_fmt
        if not below_fmt:
            raise ImageError(above, f"doesn't say which format its backing file '{backing}' has")
        said = opener.said_of(above).get("backing")
        if isinstance(said, dict):  # of the one below, too, which is opened by itself
            opener.node_options.setdefault(below, said)
        try:
            chain.append(await read_link(opener, below, fmt=below_fmt))
        except ImageError as error:
            raise _below(error, below, above) from error
    return chain


async def open_beside(
    opener: Opener, node: BlockDriverState, *, image: str, name: str, options: dict[str, Any]
) -> BlockDriverState:
    """Open a chain that the image of `node` may get as its backing chain. Read-only.

    `name` is that of the chain's first image, `options` are its options.
    Raises: ImageError: it leads back to the image, or what `Opener.open` raises.
    """
    own, real = node.backing_names, identity(image)
    if identity(name) == real:
        raise ImageError(image, "an image can't be its own backing file")
    node.backing_names = own | {real}
    try:
        return await opener.open({**options, "read-only": True}, above=node)
    except ImageError as error:
        raise _below(error, name, image) from error
    finally:
        node.backing_names = own


def _below(error: ImageError, path: str, above: str) -> ImageError:
    """The same failure, saying whose backing file it is about."""
    if error.name != path:
        return error
    return ImageError(path, f"is the backing file of {above}: {error.reason}")
