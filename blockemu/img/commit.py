# SPDX-License-Identifier: Apache-2.0
"""`img commit`: the chain is opened as the commit job wants it.

The base is opened for writing, with its own backing chain. The images above it are opened as a
chain of their own that ends above the base: what they hold is all that is read of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import identity
from blockemu.img.chain import Link, read_chain
from blockemu.img.session import finish, open_image, run_session
from blockemu.jobs.commit import CommitJob

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.registry import Opener

FILE_OPTIONS = {"aio": "threads"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """What the user asked for. `base` None: the image's backing file; given, it implies `drop`."""

    path: str
    fmt: str | None = None
    base: str | None = None
    drop: bool = False
    """Leave the image as it is afterwards."""


def commit_image(
    request: CommitRequest, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Carry the request out. Context: the main thread, in which no loop runs.

    Raises: ImageError; KeyboardInterrupt.
    """
    run_session(lambda opener: _commit(opener, request, progress))


async def _commit(
    opener: Opener, request: CommitRequest, progress: Callable[[int, int], None]
) -> None:
    fmt = request.fmt or await opener.probe(request.path)
    chain = await read_chain(opener, request.path, fmt=fmt)
    if len(chain) == 1:
        raise ImageError(request.path, "has no backing file to commit into")
    depth = _find_base(opener, request, chain)
    base_link = chain[depth]
    drop = request.drop or request.base is not None
    base_open = open_image(
        opener, base_link.path, fmt=base_link.fmt, writable=True, resizable=True, aio="threads"
    )
    async with base_open as base:
        node = await _open_cut_chain(opener, chain[:depth], read_only=drop)
        try:
            top = BlockBackend(request.path, node, writable=not drop)
        except BaseException:
            await node.close()
            raise
        try:
            job = CommitJob(
                "commit", top=top, base=base, empty=not drop, on_progress=progress,
                main_ctx=opener.ctx,
            )  # fmt: skip
            await finish(job)
        finally:
            await top.close()


def _find_base(opener: Opener, request: CommitRequest, chain: list[Link]) -> int:
    """How many images are above the base. Raises: ImageError."""
    if request.base is None:
        return 1
    wanted = identity(request.base)
    for depth in range(1, len(chain)):
        named = chain[depth - 1].backing_file
        if named == request.base or identity(chain[depth].path) == wanted:
            return depth
    raise ImageError(request.path, f"there is no '{request.base}' in its backing chain")


async def _open_cut_chain(
    opener: Opener, links: list[Link], *, read_only: bool
) -> BlockDriverState:
    """Open these images over each other, with nothing below the last one, the first for writing.

    From below, since a chain may be longer than the interpreter's stack is deep.
    """
    below: BlockDriverState | None = None
    for link in reversed(links):
        options = opener.image_options(link.path, link.fmt, file_options=FILE_OPTIONS)
        options["read-only"] = read_only or link is not links[0]
        options["backing"] = None if below is None else below.node_name
        try:
            node = await opener.open(options)
        except BaseException:
            if below is not None and below.node_name in opener.nodes:
                await below.close()
            raise
        below = node
    assert below is not None
    return below
