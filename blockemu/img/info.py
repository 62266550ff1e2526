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
from blockemu.drivers.registry import PROBE_BYTES, Opener
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
    options = {"driver": "file", "filename": path, "aio": "threads"}
    shared = {"read-only": read_only, "force-share": force_share, "no-io": True}
    file = await opener.open({**options, **shared})
    try:
        if fmt is None:
            fmt = await guess_format(opener, file)
        known = {} if fmt == "raw" else {"backing": None}
        if fmt == "qcow2" and read_only:
            known["data-file"] = None
        if fmt in ("file", "host_device") or opener.drivers.find(fmt) is None:
            raise ImageError(path, f"there is no image format '{fmt}'")
        return await opener.open({"driver": fmt, "file": file.node_name, **known, **shared})
    except BaseException:
        await file.close()
        raise


async def guess_format(opener: Opener, file: BlockDriverState) -> str:
    """The format that recognises the first bytes of `file`; raw when none does."""
    start = bytearray(min(PROBE_BYTES, file.length_bytes))
    try:
        await file.preadv(0, memoryview(start))
    except OSError as error:
        raise ImageError.from_os_error(file.filename or file.node_name, error) from error
    for name in opener.drivers.names():
        driver = opener.drivers.find(name)
        if driver is not None and driver.recognises(bytes(start)):
            return name
    return "raw"


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
        facts["full-backing-filename"] = os.path.join(os.path.dirname(facts["filename"]), backing)
    facts.setdefault("dirty-flag", False)
    return facts


def _allocated_bytes(node: BlockDriverState) -> int | None:
    """What the host file below takes on its filesystem."""
    if node.filename is None:
        return None
    try:
        return os.stat(node.filename).st_blocks * 512
    except OSError:
        return None


def format_json(facts: Facts) -> str:
    """`--output json`."""
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
    if facts["dirty-flag"]:
        lines.append("cleanly shut down: no")
    lines += _backing_lines(facts)
    lines += format_snapshots(facts.get("snapshots", []))
    specific = facts.get("format-specific", {}).get("data", {})
    if specific:
        lines.append("Format specific information:")
        lines += _specific_lines(_in_order(specific), indent=1)
    return "\n".join(lines)


def _backing_lines(facts: Facts) -> list[str]:
    backing = facts.get("backing-filename")
    if backing is None:
        return []
    full = facts["full-backing-filename"]
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
