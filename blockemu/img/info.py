# SPDX-License-Identifier: Apache-2.0
"""`img info`: what an image is, in qemu-img's words.

`image_info` describes a node that is open, for QMP too; `read_info` opens one for the purpose. It
opens that image alone, never its backing file, so a format that was only guessed does no harm here.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import identity, is_json, resolve
from blockemu.drivers.registry import BACKING_DEPTH_MAX, Opener
from blockemu.img.session import run_session
from blockemu.img.size import format_size
from blockemu.img.snapshot_list import format_snapshots
from blockemu.loop.host_file import FileEngine

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState

Facts = dict[str, Any]
"""ImageInfo, under QEMU's names."""

_SPECIFIC_ORDER = (
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "refcount-bits",
    "encrypt",
    "data-file",
    "data-file-raw",
    "corrupt",
    "extended-l2",
)


def read_info(
    path: str, *, fmt: str | None = None, force_share: bool = False, files: FileEngine | None = None
) -> Facts:
    """Open the image at `path`, describe it, close it.

    `force_share`: also when another process writes to it. Context, and what an
    interrupt does: as `run_session`. Raises: ImageError.
    """
    return run_session(lambda opener: _read_info(opener, path, fmt, force_share), files=files)


def read_chain_info(
    path: str, *, fmt: str | None = None, force_share: bool = False, files: FileEngine | None = None
) -> list[Facts]:
    """Describe the image at `path`, its backing file, and so on. Otherwise as `read_info`.

    An image whose format was only guessed may lead nowhere. Raises: ImageError, for a loop, too.
    """
    return run_session(lambda opener: _read_chain(opener, path, fmt, force_share), files=files)


async def _read_chain(opener: Opener, path: str, fmt: str | None, force_share: bool) -> list[Facts]:
    chain: list[Facts] = []
    seen: set[str] = set()
    name: str | None = path
    while name is not None:
        if identity(name) in seen:
            raise ImageError(path, f"backing file '{name}' creates an infinite loop")
        if len(seen) > BACKING_DEPTH_MAX:
            raise ImageError(path, f"more than {BACKING_DEPTH_MAX} backing files in one chain")
        seen.add(identity(name))
        facts = await _read_info(opener, name, fmt, force_share)
        chain.append(facts)
        guessed = fmt is None and not is_json(name)
        backing, fmt = facts.get("backing-filename"), facts.get("backing-filename-format")
        if backing is None:
            break
        if guessed:
            raise ImageError(
                name,
                f"names another file, '{backing}', and its format was only guessed: say "
                f"-f {facts['format']} to describe both",
            )
        name = resolve(backing, above=facts["filename"])
    return chain


async def _read_info(opener: Opener, path: str, fmt: str | None, force_share: bool) -> Facts:
    node = await open_layer(opener, path, fmt=fmt, read_only=True, force_share=force_share)
    try:
        return image_info(node)
    finally:
        await node.close()


async def open_layer(
    opener: Opener, path: str, *, fmt: str | None, read_only: bool, force_share: bool = False
) -> BlockDriverState:
    """Open the image at `path` alone, without its backing file. `fmt` None: it is guessed.

    Context: that of `opener`. Raises: ImageError.
    """
    return await opener.open_named(
        path,
        fmt=fmt,
        options={"read-only": read_only, "force-share": force_share, "no-io": True},
        file_options={"aio": "threads"},
        alone=True,
    )


def image_info(node: BlockDriverState) -> Facts:
    """The node as ImageInfo. Context: any thread; it reads plain attributes, and stat(2)s."""
    facts: Facts = {
        "virtual-size": node.length_bytes,
        "filename": node.filename or "",
        "format": node.driver.name,
    }
    actual_bytes = _allocated_bytes(node)
    if actual_bytes is not None:
        facts["actual-size"] = actual_bytes
    facts.update(node.driver.info())
    backing = facts.get("backing-filename")
    if backing is not None:
        full = _full_name(facts["filename"], backing)
        if full is not None:
            facts["full-backing-filename"] = full
    if not _is_remote(node):
        facts.setdefault("dirty-flag", False)
    return facts


def _full_name(image: str, backing: str) -> str | None:
    """The backing file's name from here; None, where there is none."""
    try:
        return resolve(backing, above=image)
    except ImageError:
        return None


def _is_remote(node: BlockDriverState) -> bool:
    """Whether its bytes, unchanged, are an export's: of that QEMU knows no such flag."""
    while node.driver.name == "raw":
        node = node.children["file"].node
    return node.driver.name == "nbd"


def _allocated_bytes(node: BlockDriverState) -> int | None:
    """What the host file below takes on its filesystem."""
    if node.filename is None:
        return None
    try:
        return os.stat(node.filename).st_blocks * 512
    except OSError:
        return None


def format_json(facts: Facts | list[Facts]) -> str:
    """`--output json`, of one image or of a chain."""
    return json.dumps(facts, indent=4)


def format_human(facts: Facts) -> str:
    """`--output human`, line for line as qemu-img 7.2 does it."""
    actual = facts.get("actual-size")
    size = facts["virtual-size"]
    lines = [
        f"image: {facts['filename']}",
        f"file format: {facts['format']}",
        f"virtual size: {format_size(size)} ({size} bytes)",
        f"disk size: {'unavailable' if actual is None else format_size(actual)}",
    ]
    if facts.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in facts:
        lines.append(f"cluster_size: {facts['cluster-size']}")
    if facts.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    lines += _backing_lines(facts)
    lines += format_snapshots(facts.get("snapshots", []))
    specific = facts.get("format-specific", {}).get("data", {})
    if specific:
        lines.append("Format specific information:")
        lines += _specific_lines(_in_order(specific), indent=1)
    return "\n".join(lines)


def format_human_chain(chain: list[Facts]) -> str:
    """`--output human`, of a chain."""
    return "\n\n".join(format_human(facts) for facts in chain)


def _backing_lines(facts: Facts) -> list[str]:
    backing = facts.get("backing-filename")
    if backing is None:
        return []
    full = facts.get("full-backing-filename", backing)
    lines = [f"backing file: {backing}" + (f" (actual path: {full})" if full != backing else "")]
    if "backing-filename-format" in facts:
        lines.append(f"backing file format: {facts['backing-filename-format']}")
    return lines


def _in_order(specific: Facts) -> Facts:
    """The same facts as QEMU's schema lists them; those that it doesn't, at the end."""
    known = {key: specific[key] for key in _SPECIFIC_ORDER if key in specific}
    return known | specific


def _specific_lines(values: Facts, *, indent: int) -> list[str]:
    lines = []
    for key, value in values.items():
        name = "    " * indent + key.replace("-", " ")
        if isinstance(value, dict):
            lines.append(f"{name}:")
            lines += _specific_lines(value, indent=indent + 1)
        elif isinstance(value, list):
            lines.append(f"{name}:")
            for index, item in enumerate(value):
                mark = "    " * (indent + 1) + f"[{index}]:"
                if isinstance(item, dict):
                    lines.append(mark)
                    lines += _specific_lines(item, indent=indent + 2)
                else:
                    lines.append(f"{mark} {item}")
        else:
            shown = str(value).lower() if isinstance(value, bool) else value
            lines.append(f"{name}: {shown}")
    return lines
