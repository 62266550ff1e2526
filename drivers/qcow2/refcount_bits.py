# SPDX-License-Identifier: Apache-2.0
"""Another width for an image's refcounts (specification: Header, refcount_order).

All of them are written anew behind the end of the file, in blocks of the new width, and made
durable; then the header names them, and says how wide they are, in its one sector. A power cut
leaves the old refcounts or the new ones. What they are is read off the tables, as a check does it
(metadata_walk.py), so leaks go by the way.

It works on the file, not on an open image, whose caches are of the old width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.bitmap_directory import AUTOCLEAR_BITMAPS
from blockemu.drivers.qcow2.check import Examination
from blockemu.drivers.qcow2.features import RAW_DATA
from blockemu.drivers.qcow2.findings import say_nothing
from blockemu.drivers.qcow2.header_file import HeaderFile, read_header
from blockemu.drivers.qcow2.image_file import ImageFile
from blockemu.drivers.qcow2.refcount_rebuild import Gaps, rebuild_refcounts

if TYPE_CHECKING:
    from blockemu.drivers.child import BdrvChild


async def change_refcount_bits(name: str, child: BdrvChild, bits: int) -> None:
    """Give the qcow2 image in the file `child` refcounts of `bits`, durably.

    `child`: writable, and nobody else uses it. Context: home thread of the child's node.
    Raises: ImageError, and then the image is as it was: a count doesn't fit, or the image needs a
    repair first.
    """
    header = await read_header(name, child)
    order = bits.bit_length() - 1
    assert bits == 1 << order
    if order == header.refcount_order:
        return
    if header.version < 3:
        raise ImageError(name, f"refcounts of {bits} bits take version 3 (compat=1.1)")
    file = ImageFile(child, cluster_size=header.cluster_size, name=name)
    examined = Examination(name, header, file, say=say_nothing)
    found = await examined.run()
    if not found.is_clean:
        raise ImageError(
            name, f"is damaged: repair it first, with blockemu img check -r all {name}"
        )
    if order < header.refcount_order:
        _check_counts(name, examined, bits)
    gaps = Gaps.of(examined)
    examined.forget()
    known = header.autoclear_features & (AUTOCLEAR_BITMAPS | RAW_DATA)
    new = replace(header, refcount_order=order, autoclear_features=known)
    header_file = HeaderFile(new, file)
    try:
        await rebuild_refcounts(name, new, file, header_file, gaps)
    except OSError as error:
        raise ImageError.from_os_error(name, error) from error


def _check_counts(name: str, examined: Examination, bits: int) -> None:
    count_max = (1 << bits) - 1
    for cluster, count in examined.walk.counts.counted():
        if count > count_max:
            place = cluster << examined.header.cluster_bits
            raise ImageError(
                name,
                f"refcounts of {bits} bits can't count the {count} references to the cluster at "
                f"offset {place:#x}",
            )
