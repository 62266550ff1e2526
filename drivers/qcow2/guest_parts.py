# SPDX-License-Identifier: Apache-2.0
"""Which parts do the guest's work in an image, as its features say; chosen once, when it is opened.

                       whole clusters     subclusters (extended L2 entries)
    in the file        ClusterMap...      SubclusterMap...
    in a data file     DataFileMap...     DataSubclusterMap...

So the parts for the plain image ask nothing about features that it hasn't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.qcow2.cluster_map import ClusterMap
from blockemu.drivers.qcow2.data_clusters import DataFileEraser, DataFileMap, DataFileWriter
from blockemu.drivers.qcow2.data_subclusters import (
    DataSubclusterEraser,
    DataSubclusterMap,
    DataSubclusterWriter,
)
from blockemu.drivers.qcow2.guest_erase import GuestEraser
from blockemu.drivers.qcow2.guest_read import GuestReader
from blockemu.drivers.qcow2.guest_write import GuestWriter
from blockemu.drivers.qcow2.subcluster_erase import SubclusterEraser
from blockemu.drivers.qcow2.subcluster_map import ExtendedTableCache, SubclusterMap
from blockemu.drivers.qcow2.subcluster_read import SubclusterReader
from blockemu.drivers.qcow2.subcluster_write import SubclusterWriter
from blockemu.drivers.qcow2.table_cache import TableCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockemu.drivers.qcow2.header import Header


class GuestParts(NamedTuple):
    """The classes of one kind of image."""

    clusters: type[ClusterMap]
    guest_writer: type[GuestWriter]
    eraser: Callable[..., GuestEraser]
    l2_cache: type[TableCache] = TableCache
    reader: type[GuestReader] = GuestReader


def guest_parts(header: Header, *, has_data: bool) -> GuestParts:
    """`has_data`: the data file is open; without it, its image can only be described."""
    if not header.layout.extended_l2:
        if not header.has_data_file:
            return GuestParts(ClusterMap, GuestWriter, GuestEraser)
        if not has_data:
            return GuestParts(DataFileMap, GuestWriter, GuestEraser)
        return GuestParts(DataFileMap, DataFileWriter, DataFileEraser)
    cache, reader = ExtendedTableCache, SubclusterReader
    if not header.has_data_file:
        return GuestParts(SubclusterMap, SubclusterWriter, SubclusterEraser, cache, reader)
    if not has_data:
        return GuestParts(DataSubclusterMap, SubclusterWriter, SubclusterEraser, cache, reader)
    return GuestParts(DataSubclusterMap, DataSubclusterWriter, DataSubclusterEraser, cache, reader)
