# SPDX-License-Identifier: Apache-2.0
"""`img measure`: how much space a new image would take, before it is made.

Two numbers: what a copy of the source (or an empty image) needs at once, and what it needs when the
guest has written everything. The first isn't exact: it counts tables for the whole disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blockemu.drivers.chain_status import chain_status
from blockemu.drivers.crypto.create_options import take_new_volume
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.bitmap_directory import space_bytes
from blockemu.drivers.qcow2.create import allocated_bytes
from blockemu.drivers.qcow2.create_options import CreateOptions
from blockemu.drivers.qcow2.layout import round_up
from blockemu.drivers.sector import sectors_up
from blockemu.img.options import OptionValue, parse_options
from blockemu.img.session import open_image, run_session
from blockemu.loop.sync import yield_now

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.registry import Opener

UNMADE: Final = "-O"
"""What messages about the image that isn't made name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """In bytes. `bitmaps_bytes`: what copying the source's dirty bitmaps takes, or None where
    source or target can have none."""

    required_bytes: int
    allocated_bytes: int
    bitmaps_bytes: int | None = None

    def as_json(self) -> str:
        """`--output json`."""
        facts = {"required": self.required_bytes, "fully-allocated": self.allocated_bytes}
        if self.bitmaps_bytes is not None:
            facts = {"bitmaps": self.bitmaps_bytes, **facts}
        return json.dumps(facts, indent=4)

    def as_text(self) -> str:
        """`--output human`."""
        lines = [
            f"required size: {self.required_bytes}",
            f"fully allocated size: {self.allocated_bytes}",
        ]
        if self.bitmaps_bytes is not None:
            lines.append(f"bitmaps size: {self.bitmaps_bytes}")
        return "\n".join(lines)


def measure_size(size_bytes: int, *, fmt: str, option_texts: Sequence[str]) -> Measure:
    """What a new, empty image of this size takes. Raises: ImageError."""
    options = parse_options(UNMADE, fmt, option_texts)
    size_bytes = sectors_up(size_bytes)
    if fmt == "raw":
        return Measure(required_bytes=size_bytes, allocated_bytes=size_bytes)
    if fmt == "luks":
        return _luks_measure(size_bytes, options)
    parsed = CreateOptions.parse(UNMADE, size_bytes, options)
    return _qcow2_measure(parsed, 0)


def _luks_measure(size_bytes: int, options: Mapping[str, OptionValue]) -> Measure:
    rest = dict(options)
    total = size_bytes + take_new_volume(UNMADE, rest).payload_bytes()
    return Measure(required_bytes=total, allocated_bytes=total)


def measure_image(
    path: str,
    *,
    fmt: str | None,
    target_fmt: str,
    option_texts: Sequence[str],
    force_share: bool = False,
) -> Measure:
    """What a copy of the image at `path` takes.

    Context: the main thread, in which no loop runs. Raises: ImageError.
    """
    options = parse_options(UNMADE, target_fmt, option_texts)

    async def work(opener: Opener) -> Measure:
        async with open_image(opener, path, fmt=fmt, force_share=force_share) as source:
            return await _measure_copy(source, target_fmt, options)

    return run_session(work)


async def _measure_copy(
    source: BlockBackend, fmt: str, options: Mapping[str, OptionValue]
) -> Measure:
    size_bytes = sectors_up(source.length_bytes)
    if fmt == "raw":
        return Measure(required_bytes=size_bytes, allocated_bytes=size_bytes)
    if fmt == "luks":
        return _luks_measure(size_bytes, options)
    parsed = CreateOptions.parse(UNMADE, size_bytes, options)
    cluster = parsed.layout.cluster_size
    if parsed.backing_file is not None:
        data_bytes = round_up(size_bytes, cluster)  # nobody knows how much of it both share
    else:
        data_bytes = await _clusters_with_data(source, cluster) * cluster
    bitmaps_bytes = None
    if parsed.layout.version >= 3 and source.node.driver.supports_bitmaps:
        facts = source.node.driver.info()["format-specific"]["data"].get("bitmaps", [])
        bitmaps_bytes = space_bytes(
            source.length_bytes,
            cluster_size=cluster,
            bitmaps=[(fact["name"], fact["granularity"]) for fact in facts],
        )
    return _qcow2_measure(parsed, data_bytes, bitmaps_bytes=bitmaps_bytes)


async def _clusters_with_data(source: BlockBackend, cluster: int) -> int:
    """How many clusters of the copy hold something that isn't known to be zeroes."""
    count = offset = 0
    while offset < source.length_bytes:
        try:
            status = await chain_status(source.node, offset, source.length_bytes - offset)
        except OSError as error:
            raise ImageError.from_os_error(source.name, error) from error
        end = offset + status.length
        if not status.zero:
            end = round_up(end, cluster)
            count += end // cluster - offset // cluster
        offset = end
        await yield_now()
    return count


def _qcow2_measure(
    options: CreateOptions, data_bytes: int, *, bitmaps_bytes: int | None = None
) -> Measure:
    allocated = allocated_bytes(options)
    disk_bytes = round_up(options.size_bytes, options.layout.cluster_size)
    if options.preallocation in ("falloc", "full"):
        data_bytes = disk_bytes
    return Measure(
        required_bytes=allocated - disk_bytes + data_bytes,
        allocated_bytes=allocated,
        bitmaps_bytes=bitmaps_bytes,
    )
