# SPDX-License-Identifier: Apache-2.0
"""The driver's options: how much memory the metadata caches may take, and what a discard means.

`l2-cache-size`, `refcount-cache-size`, `cache-size` (both together): bytes. The L2 cache's default
is what maps the whole disk, at least 1 MiB and at most 32: with 64 KiB clusters, 1 MiB of it maps
8 GiB of disk. It is a bound, and filled on demand; a daemon with many large images may grant less
(metadata_budget.py). The refcount cache needs little: only allocation
uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import take_bool, take_size
from blockemu.drivers.qcow2.layout import CLUSTER_BITS_MIN, Layout, div_up
from blockemu.drivers.qcow2.table_cache import SLICE_BYTES

if TYPE_CHECKING:
    from blockemu.drivers.metadata_budget import Share

# Parts of an image's share of the metadata budget.
L2_CACHE = "l2-cache"
REFCOUNT_CACHE = "refcount-cache"

L2_CACHE_MIN = 1024 * 1024
L2_CACHE_MAX = 32 * 1024 * 1024
REFCOUNT_CACHE_BYTES = 256 * 1024


class Options(NamedTuple):
    """Validated. Bytes."""

    l2_cache_bytes: int
    refcount_cache_bytes: int
    slice_bytes: int
    pass_discard: bool


def take_options(
    name: str,
    options: dict[str, Any],
    layout: Layout,
    size_bytes: int,
    share: Share,
    *,
    unmap: bool = True,
) -> Options:
    """Take this driver's own options out of `options`. What they leave open is the share's to say.

    `unmap`: what the node does with discards, which `pass-discard-request` defaults to.
    Raises: ImageError.
    """
    total = take_size(name, options, "cache-size", None)
    l2_bytes = take_size(name, options, "l2-cache-size", None)
    refcount_bytes = take_size(name, options, "refcount-cache-size", None)
    slice_bytes = take_size(name, options, "l2-cache-entry-size", SLICE_BYTES)
    pass_discard = take_bool(name, options, "pass-discard-request", default=unmap)
    if slice_bytes < 1 << CLUSTER_BITS_MIN or slice_bytes & (slice_bytes - 1):
        raise ImageError(
            name, f"l2-cache-entry-size is a power of two from 512 on, not {slice_bytes}"
        )
    if total is not None:
        l2_bytes, refcount_bytes = _split(name, total, l2_bytes, refcount_bytes)
    if refcount_bytes is None:
        refcount_bytes = REFCOUNT_CACHE_BYTES
    share.reserve(REFCOUNT_CACHE, refcount_bytes, least_bytes=refcount_bytes)
    if l2_bytes is None:
        needed = div_up(size_bytes, layout.cluster_size) * layout.l2_entry_bytes
        wanted = min(max(needed, L2_CACHE_MIN), L2_CACHE_MAX)
        l2_bytes = share.reserve(L2_CACHE, wanted, least_bytes=L2_CACHE_MIN)
    else:
        share.reserve(L2_CACHE, l2_bytes, least_bytes=l2_bytes)
    return Options(l2_bytes, refcount_bytes, min(slice_bytes, layout.cluster_size), pass_discard)


def _split(
    name: str, total: int, l2_bytes: int | None, refcount_bytes: int | None
) -> tuple[int, int]:
    if l2_bytes is not None and refcount_bytes is not None:
        raise ImageError(
            name, "cache-size, l2-cache-size and refcount-cache-size: set two of them at most"
        )
    for key, part in (("l2-cache-size", l2_bytes), ("refcount-cache-size", refcount_bytes)):
        if part is not None and part > total:
            raise ImageError(name, f"{key} ({part}) is larger than cache-size ({total})")
    if l2_bytes is not None:
        return l2_bytes, total - l2_bytes
    if refcount_bytes is None:
        refcount_bytes = min(REFCOUNT_CACHE_BYTES, total // 4)
    return total - refcount_bytes, refcount_bytes
