# SPDX-License-Identifier: Apache-2.0
"""`img rebase`: another backing file, or none.

The unsafe mode changes names and opens nothing but the image. The safe mode opens the old chain and
the new one side by side, and has the rebase job make up for their differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import identity, resolve
from blockemu.img.chain import Link, open_beside, read_link
from blockemu.img.session import finish, run_session
from blockemu.jobs.rebase import RebaseJob

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.registry import Opener

FILE_OPTIONS = {"aio": "threads"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RebaseRequest:
    """What the user asked for. `backing_file` "" or None: none."""

    path: str
    fmt: str | None = None
    backing_file: str | None = None
    backing_fmt: str | None = None
    unsafe: bool = False
    force_share: bool = False
    """The backing files may be in use by others; the image itself never."""

    def check(self) -> None:
        """Raises: ImageError."""
        if self.backing_file is None and not self.unsafe:
            raise ImageError(self.path, "say which backing file it is to have (-b), or use -u")
        if self.backing_file and self.backing_fmt is None:
            raise ImageError(
                self.path, f"the format of backing file '{self.backing_file}' must be given (-F)"
            )
        if not self.backing_file and self.backing_fmt is not None:
            raise ImageError(self.path, "a backing format without a backing file")


def rebase_image(
    request: RebaseRequest, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Carry the request out. Context: the main thread, in which no loop runs.

    Raises: ImageError; KeyboardInterrupt.
    """
    request.check()
    run_session(lambda opener: _rebase(opener, request, progress))


async def _rebase(
    opener: Opener, request: RebaseRequest, progress: Callable[[int, int], None]
) -> None:
    fmt = request.fmt
    if fmt is None and not request.unsafe:
        fmt = await opener.probe(request.path)
    link = await read_link(opener, request.path, fmt=fmt)
    if link.fmt == "raw":
        raise ImageError(request.path, "format raw has no backing files")
    if request.backing_file:
        name = resolve(request.backing_file, above=request.path)
        if identity(name) == identity(request.path):
            raise ImageError(request.path, "an image can't be its own backing file")
    options = opener.image_options(request.path, link.fmt, file_options=FILE_OPTIONS)
    below = {"backing": None} if request.unsafe else _old_backing(opener, request, link)
    node = await opener.open({**options, **below})
    try:
        image = BlockBackend(request.path, node, writable=True)
    except BaseException:
        await node.close()
        raise
    try:
        if request.unsafe:
            names = request.backing_file or None, request.backing_fmt
            await node.driver.change_backing_file(*names)
        else:
            await _copy_and_switch(opener, request, image, link, progress)
    except OSError as error:
        raise ImageError.from_os_error(request.path, error) from error
    finally:
        await image.close()


def _old_backing(opener: Opener, request: RebaseRequest, link: Link) -> dict[str, Any]:
    """How to open what is below the image now."""
    if link.backing_file is None:
        return {"backing": {"driver": "null-co", "size": link.length_bytes, "read-zeroes": True}}
    if not request.force_share or not link.backing_fmt:
        return {}  # as its header says
    name = resolve(link.backing_file, above=request.path)
    options = opener.image_options(name, link.backing_fmt, file_options=FILE_OPTIONS)
    return {"backing": {**options, "read-only": True, "force-share": True}}


async def _copy_and_switch(
    opener: Opener,
    request: RebaseRequest,
    image: BlockBackend,
    link: Link,
    progress: Callable[[int, int], None],
) -> None:
    new: BlockDriverState | None = None
    if request.backing_file:
        assert request.backing_fmt is not None
        name = resolve(request.backing_file, above=request.path)
        options = opener.image_options(name, request.backing_fmt, file_options=FILE_OPTIONS)
        options["force-share"] = request.force_share
        new = await open_beside(opener, image.node, image=request.path, name=name, options=options)
    try:
        job = RebaseJob(
            "rebase", image, new_backing=new, filename=request.backing_file or None,
            fmt=request.backing_fmt, granule=link.cluster_size, on_progress=progress,
            main_ctx=opener.ctx,
        )  # fmt: skip
        await finish(job)
    finally:
        if new is not None:
            await new.close()
