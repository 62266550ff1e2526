# SPDX-License-Identifier: Apache-2.0
"""`img convert`: opens the sources, has the target made, and lets the convert job copy.

What this made is removed again if anything fails, or the user interrupts it. A target that was
there before (`-n`, or a file that is overwritten) stays, with whatever it then holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockemu.drivers.chain_status import backing_node
from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import path_to_create, resolve
from blockemu.drivers.sector import SECTOR_BYTES, sectors_up
from blockemu.img.copy_bitmaps import bitmaps_to_copy, copy_bitmaps
from blockemu.img.create import CreateRequest, run_create
from blockemu.img.session import finish, open_image, run_session
from blockemu.jobs.convert import ConvertJob, ConvertPlan
from blockemu.loop.host_file import PosixFiles

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.registry import Opener

SPARSE_BYTES_MAX = 16 << 20
"""qemu-img's bound for -S."""

Progress = Callable[[int, int], None]
"""Told (bytes that are done, bytes in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertRequest:
    """What the user asked for; defaults are qemu-img's.

    `snapshot`: the source as it was then. `salvage`: what can't be read becomes zeroes.
    `existing`: the target is there and isn't made. `target_cache`: what is written is on stable
    storage at the end, unless it is "unsafe".
    """

    sources: Sequence[str]
    target: str
    source_fmt: str | None = None
    snapshot: str | None = None
    salvage: bool = False
    target_fmt: str = "raw"
    option_texts: Sequence[str] = ()
    backing_file: str | None = None
    backing_fmt: str | None = None
    existing: bool = False
    target_is_zero: bool = False
    sparse_bytes: int = 4096
    requests_max: int = 8
    in_order: bool = True
    compressed: bool = False
    bitmaps: bool = False
    skip_broken_bitmaps: bool = False
    source_cache: str = "writeback"
    target_cache: str = "unsafe"
    force_share: bool = False

    def check(self) -> None:
        """What contradicts itself. Raises: ImageError."""
        sparse = self.sparse_bytes
        if sparse % SECTOR_BYTES or sparse > SPARSE_BYTES_MAX:
            raise ImageError(
                "-S", f"takes a multiple of {SECTOR_BYTES} up to {SPARSE_BYTES_MAX}, not {sparse}"
            )
        if self.snapshot is not None and len(self.sources) > 1:
            raise ImageError("-l", "takes a single source")
        if self.target_is_zero and not self.existing:
            raise ImageError(self.target, "is new: --target-is-zero goes with -n only")
        if self.existing and self.option_texts:
            raise ImageError(self.target, "is not made anew (-n), so it takes no options (-o)")
        if self.skip_broken_bitmaps and not self.bitmaps:
            raise ImageError(self.target, "Use of --skip-broken-bitmaps requires --bitmaps")
        if self.bitmaps and len(self.sources) != 1:
            raise ImageError(self.target, "Copying bitmaps only possible with single source")


def convert_images(
    request: ConvertRequest, *, progress: Progress, warn: Callable[[str], None] = lambda text: None
) -> None:
    """Carry the request out; `warn` is told what can't be read, if that is to be salvaged.

    Context: the main thread, in which no loop runs.
    Raises: ImageError; KeyboardInterrupt.
    """
    request.check()
    run_session(
        lambda opener: _convert(opener, request, progress, warn), files=PosixFiles(bulk=True)
    )


async def _convert(
    opener: Opener, request: ConvertRequest, progress: Progress, warn: Callable[[str], None]
) -> None:
    async with AsyncExitStack() as stack:
        sources = [
            await stack.enter_async_context(
                open_image(
                    opener, path, fmt=request.source_fmt, cache=request.source_cache,
                    force_share=request.force_share, snapshot=request.snapshot,
                )
            )
            for path in request.sources
        ]  # fmt: skip
        await convert_opened(opener, request, sources, progress, warn)


async def convert_opened(
    opener: Opener,
    request: ConvertRequest,
    sources: Sequence[BlockBackend],
    progress: Progress,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """What is left when the sources are open: make the target, and copy.

    Context: the opener's. Suspends: while the jobs run. Raises: ImageError.
    """
    bitmaps = None
    if request.bitmaps:
        skip_broken = request.skip_broken_bitmaps
        bitmaps = await bitmaps_to_copy(sources[0].node, skip_broken=skip_broken)
    if request.existing:
        await _copy(opener, request, sources, bitmaps, progress, warn)
        return
    if request.compressed and any("encrypt" in text for text in request.option_texts):
        raise ImageError(request.target, "compression (-c) and encryption don't go together")
    length = sum(sectors_up(source.length_bytes) for source in sources)
    to_create = CreateRequest.from_user(
        request.target, str(length), fmt=request.target_fmt,
        option_texts=request.option_texts,
        backing_file=request.backing_file, backing_fmt=request.backing_fmt,
    )  # fmt: skip
    made = [path for path in _files_of(to_create) if not os.path.lexists(path)]
    try:
        await run_create(to_create, opener, cache=request.target_cache)
        _keep_secret(opener, to_create)
        await _copy(opener, request, sources, bitmaps, progress, warn)
    except BaseException:
        for path in made:
            _remove(path)
        raise


def _keep_secret(opener: Opener, created: CreateRequest) -> None:
    """What the target was encrypted with also opens it."""
    own = opener.node_options.setdefault(created.path, {})
    if "key-secret" in created.options:
        own["key-secret"] = created.options["key-secret"]
    elif "encrypt.key-secret" in created.options:
        own["encrypt"] = {"key-secret": created.options["encrypt.key-secret"]}


async def _copy(
    opener: Opener,
    request: ConvertRequest,
    sources: Sequence[BlockBackend],
    bitmaps: Sequence[str] | None,
    progress: Progress,
    warn: Callable[[str], None],
) -> None:
    async with open_image(
        opener, request.target, fmt=request.target_fmt, writable=True, cache=request.target_cache
    ) as target:
        has_backing = backing_node(target.node) is not None
        if request.target_is_zero and has_backing:
            raise ImageError(target.name, "has a backing file: --target-is-zero can't be true")
        if request.existing and request.backing_file is not None and not has_backing:
            raise ImageError(target.name, "has no backing file, so -B can't be true")
        if request.compressed:
            _check_compressible(target, sources)
        plan = ConvertPlan(
            sources=sources,
            target=target,
            target_is_blank=request.target_is_zero
            or (not request.existing and _new_image_is_blank(target)),
            keep_backing=has_backing and (not request.existing or request.backing_file is not None),
            sparse_bytes=request.sparse_bytes,
            requests_max=request.requests_max,
            in_order=request.in_order,
            compressed=request.compressed,
            on_unreadable=warn if request.salvage else None,
        )
        await finish(ConvertJob("convert", plan, main_ctx=opener.ctx, on_progress=progress))
        if bitmaps is not None:
            await copy_bitmaps(sources[0].node, target.node, bitmaps)


def _check_compressible(target: BlockBackend, sources: Sequence[BlockBackend]) -> None:
    """Clusters of the target can be compressed, and each comes from one source, or ImageError."""
    driver = target.node.driver
    if driver.info().get("encrypted"):
        raise ImageError(target.name, "compression (-c) and encryption don't go together")
    if not driver.supports_compressed_writes:
        if type(driver).supports_compressed_writes:
            raise ImageError(target.name, "clusters of an external data file can't be compressed")
        raise ImageError(target.name, f"format {driver.name} has no compression (-c)")
    for source in sources[:-1]:
        if sectors_up(source.length_bytes) % driver.cluster_size:
            raise ImageError(
                source.name,
                f"has {source.length_bytes} bytes, and only the last source may end inside a "
                f"cluster ({driver.cluster_size} bytes) of a compressed image",
            )


def _new_image_is_blank(target: BlockBackend) -> bool:
    """A new file is. A device holds what it held, and so may clusters preallocated on it."""
    return target.node.driver.keeps_zeroes and not any(
        node.driver.host_file is not None and node.driver.host_file.is_block_device
        for node in target.node.subtree()
        if node.driver.is_protocol
    )


def _files_of(request: CreateRequest) -> list[str]:
    """The files that a new image consists of. Raises: ImageError."""
    files = [path_to_create(request.path)]
    data_file = request.options.get("data_file")
    if data_file is not None:
        name = resolve(str(data_file), above=request.path, what="external data file")
        files.append(path_to_create(name))
    return files


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # it wasn't made, or somebody else has removed it
