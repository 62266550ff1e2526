# SPDX-License-Identifier: Apache-2.0
"""The driver's options: how much memory the metadata caches may take, and what a discard means.

`l2-cache-size`, `refcount-cache-size`, `cache-size` (both together): bytes. The L2 cache's default
is what maps the whole disk, at least 1 MiB and at most 32: with 64 KiB clusters, 1 MiB of it maps
8 GiB of disk. It is a bound, and filled on demand; a daemon with many large images may grant less
(metadata_budget.py). The refcount cache needs little: only allocation
uses it.

`overlap-check`: before what kinds of metadata the image is guarded (overlap_check.py): none,
constant (what lies in one place), cached (also what is known without reading; the default) or all.
`overlap-check.template` is another name for it; `overlap-check.main-header` and so on turn a single
kind on or off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import take_bool, take_choice, take_dict, take_size
from blockemu.drivers.qcow2.layout import CLUSTER_BITS_MIN, Layout, div_up
from blockemu.drivers.qcow2.metadata_places import Structure
from blockemu.drivers.qcow2.table_cache import SLICE_BYTES

if TYPE_CHECKING:
    from blockemu.drivers.metadata_budget import Share

# Parts of an image's share of the metadata budget.
L2_CACHE = "l2-cache"
REFCOUNT_CACHE = "refcount-cache"

L2_CACHE_MIN = 1024 * 1024
L2_CACHE_MAX = 32 * 1024 * 1024
REFCOUNT_CACHE_BYTES = 256 * 1024
L2_SLICE_BYTES_MAX = 64 * 1024
"""A slice where the cache covers the disk: none will have to go for another, and what is read from
a table at once may as well be kept in one piece."""

OVERLAP_CHECK = "overlap-check"
STRUCTURES = {
    "main-header": Structure.MAIN_HEADER,
    "active-l1": Structure.ACTIVE_L1,
    "active-l2": Structure.ACTIVE_L2,
    "refcount-table": Structure.REFCOUNT_TABLE,
    "refcount-block": Structure.REFCOUNT_BLOCK,
    "snapshot-table": Structure.SNAPSHOT_TABLE,
    "inactive-l1": Structure.INACTIVE_L1,
    "inactive-l2": Structure.INACTIVE_L2,
    "bitmap-directory": Structure.BITMAP_DIRECTORY,
}
"""QEMU's names."""
_CONSTANT = frozenset({
    Structure.MAIN_HEADER, Structure.ACTIVE_L1, Structure.REFCOUNT_TABLE,
    Structure.SNAPSHOT_TABLE, Structure.BITMAP_DIRECTORY,
})  # fmt: skip
_ALL = frozenset(Structure)
TEMPLATES = {
    "none": frozenset[Structure](),
    "constant": _CONSTANT,
    "cached": _ALL - {Structure.INACTIVE_L2},
    "all": _ALL,
}


class Options(NamedTuple):
    """Validated. Bytes."""

    l2_cache_bytes: int
    refcount_cache_bytes: int
    l2_slice_bytes: int
    slice_bytes: int
    """Of the refcount cache."""
    pass_discard: bool
    overlap_checks: frozenset[Structure]


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
    slice_given = take_size(name, options, "l2-cache-entry-size", None)
    slice_bytes = SLICE_BYTES if slice_given is None else slice_given
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
    needed = div_up(size_bytes, layout.cluster_size) * layout.l2_entry_bytes
    if l2_bytes is None:
        wanted = min(max(needed, L2_CACHE_MIN), L2_CACHE_MAX)
        l2_bytes = share.reserve(L2_CACHE, wanted, least_bytes=L2_CACHE_MIN)
    else:
        share.reserve(L2_CACHE, l2_bytes, least_bytes=l2_bytes)
    slice_bytes = l2_slice_bytes = min(slice_bytes, layout.cluster_size)
    if slice_given is None and needed <= l2_bytes:
        l2_slice_bytes = min(L2_SLICE_BYTES_MAX, layout.cluster_size)
    checks = take_overlap_checks(name, options)
    return Options(l2_bytes, refcount_bytes, l2_slice_bytes, slice_bytes, pass_discard, checks)


def take_overlap_checks(name: str, options: dict[str, Any]) -> frozenset[Structure]:
    """What `overlap-check` and its parts ask for. Raises: ImageError."""
    given = options.pop(OVERLAP_CHECK, None)
    own: dict[str, Any] = given if isinstance(given, dict) else {}
    options[OVERLAP_CHECK] = own
    own = take_dict(name, options, OVERLAP_CHECK)
    if given is not None and not isinstance(given, dict):
        own_template = own.setdefault("template", given)
        if own_template != given:
            raise ImageError(
                name,
                f"'{OVERLAP_CHECK}' and '{OVERLAP_CHECK}.template' say two things:"
                f" {given!r} and {own_template!r}",
            )
    chosen = set(TEMPLATES[take_choice(name, own, "template", tuple(TEMPLATES), "cached")])
    for key, kind in STRUCTURES.items():
        if take_bool(name, own, key, default=kind in chosen):
            chosen.add(kind)
        else:
            chosen.discard(kind)
    if own:
        keys = ", ".join(f"'{OVERLAP_CHECK}.{key}'" for key in sorted(own))
        raise ImageError(name, f"driver 'qcow2' has no option {keys}")
    return frozenset(chosen)


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
