# SPDX-License-Identifier: Apache-2.0
"""Block status: what a guest range is in this image's own layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.driver import BlockStatus
from blockemu.drivers.qcow2.cluster_map import Extent, Kind
from blockemu.drivers.qcow2.preallocation import looks_preallocated

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.image import Image

SLICES_MAX = 256
"""L2 slices looked through for one answer: bounds the time until a caller hears something."""


async def block_status(image: Image, offset: int, length: int) -> BlockStatus:
    """Describe the bytes from `offset`, as far as one description fits. Raises: OSError."""
    backing = image.reader.backing
    if backing is not None and offset < backing.length_bytes:
        length = min(length, backing.length_bytes - offset)  # behind it, unallocated means zero
    first = await image.clusters.resolve(offset, length)
    covered = first.length
    for _ in range(SLICES_MAX):
        if covered >= length:
            break
        following = await image.clusters.resolve(offset + covered, length - covered)
        if not _continues(first, following, covered):
            break
        covered += following.length
    status = _describe(image, first, offset, covered)
    if image.encryption is not None:
        return status._replace(host_offset=None, file=None)
    if first.kind is not Kind.DATA:
        return status
    if image.preallocated is None:
        image.preallocated = await looks_preallocated(image)
    return await _with_holes(image, status, first.host) if image.preallocated else status


async def _with_holes(image: Image, status: BlockStatus, host: int) -> BlockStatus:
    """What the file says of clusters that it may never have been given."""
    child = image.data.file.child
    inside = min(status.length, child.length_bytes - host)
    if inside <= 0:
        return status._replace(zero=True)
    below = await child.block_status(host, inside)
    return status._replace(length=below.length, zero=below.zero)


def _continues(first: Extent, following: Extent, covered: int) -> bool:
    if following.kind is not first.kind:
        return False
    if first.kind is Kind.UNALLOCATED and not (_has_place(first) and _has_place(following)):
        return not _has_place(first) and not _has_place(following)
    if first.kind in (Kind.DATA, Kind.ZERO_ALLOCATED, Kind.UNALLOCATED):
        return following.host == first.host + covered
    return True


def _has_place(extent: Extent) -> bool:
    """Of one that isn't allocated: it has a host cluster, which may be the first one of a file."""
    return bool(extent.host) or extent.writable


def _describe(image: Image, extent: Extent, offset: int, length: int) -> BlockStatus:
    kind = extent.kind
    zero = image.reader.reads_zero(extent, offset)
    if kind is Kind.UNALLOCATED and _has_place(extent):
        return BlockStatus(
            length, data=False, zero=zero, allocated=False, host_offset=extent.host,
            file=image.data.node.filename,
        )  # fmt: skip
    if kind is Kind.UNALLOCATED:
        return BlockStatus(length, data=False, zero=zero, allocated=False)
    if kind is Kind.DATA:
        return BlockStatus(
            length, data=True, zero=False, host_offset=extent.host,
            file=image.data.node.filename,
        )  # fmt: skip
    if kind is Kind.ZERO_ALLOCATED:
        return BlockStatus(
            length, data=False, zero=True, host_offset=extent.host,
            file=image.data.node.filename,
        )  # fmt: skip
    return BlockStatus(length, data=not zero, zero=zero)
