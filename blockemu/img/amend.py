# SPDX-License-Identifier: Apache-2.0
"""`img amend`: options of a qcow2 image that is there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.amend import AMENDABLE, Amendment
from blockemu.drivers.qcow2.driver import Qcow2Driver
from blockemu.drivers.qcow2.refcount_bits import change_refcount_bits
from blockemu.img.check import file_edge
from blockemu.img.options import options_help, parse_options
from blockemu.img.session import finish, open_image, run_session
from blockemu.jobs.amend import AmendJob

if TYPE_CHECKING:
    from blockemu.drivers.registry import Opener


def amend_help() -> str:
    """What `-o help` prints."""
    lines = options_help("qcow2").splitlines()[1:]
    known = [line for line in lines if line.split("=")[0].strip() in AMENDABLE]
    return "\n".join(["Options of qcow2 images that can be amended:", *known])


def amend_image(
    path: str,
    *,
    fmt: str | None,
    option_texts: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Give the image at `path` these options. Context: the main thread, in which no loop runs.

    Raises: ImageError; KeyboardInterrupt.
    """
    amendment = Amendment.parse(path, parse_options(path, "qcow2", option_texts))
    run_session(lambda opener: _amend(opener, path, fmt, amendment, progress))


async def _amend(
    opener: Opener,
    path: str,
    fmt: str | None,
    amendment: Amendment,
    progress: Callable[[int, int], None],
) -> None:
    fmt = fmt or await opener.probe(path)
    if fmt == "raw":
        raise ImageError(path, "format raw has nothing that can be amended")
    bits = amendment.refcount_bits
    if bits is not None and amendment.version == 2:  # which has one width only
        await _check(opener, path, fmt, amendment)
        await _change_refcount_bits(opener, path, bits)
    async with open_image(
        opener, path, fmt=fmt, writable=True, resizable=True, aio="threads"
    ) as image:
        job = AmendJob("amend", image, amendment, on_progress=progress, main_ctx=opener.ctx)
        await finish(job)
    if bits is not None and amendment.version != 2:
        await _change_refcount_bits(opener, path, bits)


async def _check(opener: Opener, path: str, fmt: str, amendment: Amendment) -> None:
    """Whether all of it could be done, the width of refcounts taken for granted."""
    async with open_image(opener, path, fmt=fmt) as image:
        driver = image.node.driver
        assert isinstance(driver, Qcow2Driver)
        assert amendment.refcount_bits is not None
        order = amendment.refcount_bits.bit_length() - 1
        amendment.check(path, replace(driver.image.header, refcount_order=order))


async def _change_refcount_bits(opener: Opener, path: str, bits: int) -> None:
    node = await opener.open({"driver": "file", "filename": path})
    try:
        edge = file_edge(node, writable=True)
        node.add_parent(edge)
        try:
            await change_refcount_bits(path, edge, bits)
        finally:
            node.remove_parent(edge)
    finally:
        await node.close()
