# SPDX-License-Identifier: Apache-2.0
"""`img amend`: options of a qcow2 image that is there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from blockemu.drivers.crypto.amend_keys import KeyAmendment, amend_keys
from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import is_json, parse_filename
from blockemu.drivers.luks import LuksDriver
from blockemu.drivers.qcow2.amend import AMENDABLE, Amendment
from blockemu.drivers.qcow2.driver import Qcow2Driver
from blockemu.drivers.qcow2.refcount_bits import change_refcount_bits
from blockemu.img.check import file_edge
from blockemu.img.options import FORMATS, KEY_SLOTS, help_lines, parse_options
from blockemu.img.session import finish, open_image, run_session
from blockemu.jobs.amend import AmendJob

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.registry import Opener


QCOW2_KEY_SLOTS = tuple(replace(spec, name=f"encrypt.{spec.name}") for spec in KEY_SLOTS)


def amend_help() -> str:
    """What `-o help` prints."""
    known = [spec for spec in FORMATS["qcow2"] if spec.name in AMENDABLE]
    lines = help_lines((*known, *QCOW2_KEY_SLOTS))
    return "\n".join(["Options of qcow2 images that can be amended:", *lines])


def amend_image(
    path: str,
    *,
    fmt: str | None,
    option_texts: Sequence[str],
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Give the image at `path` these options. Context: the main thread, in which no loop runs.

    `force`: also what makes an encrypted image unreadable. Raises: ImageError; KeyboardInterrupt.
    """
    if fmt is None and is_json(path):
        said = parse_filename(path, {}).get("driver")
        fmt = said if isinstance(said, str) else None
    if fmt == "luks":
        keys = parse_options(path, fmt, option_texts, more=KEY_SLOTS)
        amendment = None
    else:
        options = parse_options(path, "qcow2", option_texts, more=QCOW2_KEY_SLOTS)
        prefix = "encrypt."
        keys = {
            key.removeprefix(prefix): value
            for key, value in options.items()
            if key.startswith(prefix)
        }
        plain = {key: value for key, value in options.items() if not key.startswith(prefix)}
        amendment = Amendment.parse(path, plain)
    key_amendment = KeyAmendment.parse(path, keys, force=force) if keys else None
    run_session(lambda opener: _amend(opener, path, fmt, amendment, key_amendment, progress))


async def _amend(
    opener: Opener,
    path: str,
    fmt: str | None,
    amendment: Amendment | None,
    keys: KeyAmendment | None,
    progress: Callable[[int, int], None],
) -> None:
    fmt = fmt or await opener.probe(path)
    if fmt == "raw":
        raise ImageError(path, "format raw has nothing that can be amended")
    bits = amendment.refcount_bits if amendment is not None else None
    if (
        amendment is not None and bits is not None and amendment.version == 2
    ):  # which has one width only
        await _check(opener, path, fmt, amendment)
        await _change_refcount_bits(opener, path, bits)
    async with open_image(
        opener, path, fmt=fmt, writable=True, resizable=True, aio="threads"
    ) as image:
        if keys is not None:
            await _amend_keys(opener, path, image, keys)
        if amendment is not None:
            job = AmendJob("amend", image, amendment, on_progress=progress, main_ctx=opener.ctx)
            await finish(job)
    if amendment is not None and bits is not None and amendment.version != 2:
        await _change_refcount_bits(opener, path, bits)


async def _amend_keys(opener: Opener, path: str, image: BlockBackend, keys: KeyAmendment) -> None:
    """Raises: ImageError; OSError."""
    driver = image.node.driver
    said = opener.said_of(path)
    if isinstance(driver, LuksDriver):
        start, length, secret_id = 0, driver.payload_offset, said.get("key-secret")
    else:
        assert isinstance(driver, Qcow2Driver)
        area = driver.image.header.crypto_area
        if area is None:
            raise ImageError(path, "is not encrypted by LUKS, so it has no key slots")
        start, length = area
        secret_id = said.get("encrypt", {}).get("key-secret")
    await amend_keys(
        path, image.node.children["file"], start=start, length=length, amendment=keys,
        key_secret=secret_id, opener=opener,
    )  # fmt: skip


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
