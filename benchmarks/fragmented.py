# SPDX-License-Identifier: Apache-2.0
"""A qcow2 image of 100 GiB in which every second cluster is data: 1,638,400 extents, in a second.

Only the metadata is real in size (13 MiB). All data clusters share sixteen host clusters, as they
would after a copy that shares what is alike: their refcounts say so, and `qemu-img check` finds the
image sound. Neighbouring data clusters have different host clusters, so no two extents can be
joined by chance.
"""

from __future__ import annotations

import os
import struct
from array import array
from pathlib import Path

from tests.peers.qemu import QemuImg

DISK_BYTES = 100 << 30
CLUSTER_BYTES = 64 << 10
EXTENTS = DISK_BYTES // CLUSTER_BYTES
SHARED_CLUSTERS = 16

L2_ENTRIES = CLUSTER_BYTES // 8
COPIED = 1 << 63
_L1_SIZE_AT, _REFCOUNT_TABLE_AT = 36, 48


def _big_endian(kind: str, values: list[int]) -> bytes:
    numbers = array(kind, values)
    numbers.byteswap()
    return numbers.tobytes()


def make_fragmented(path: Path) -> Path:
    """Make it."""
    QemuImg.create(path, DISK_BYTES, options={"cluster_size": CLUSTER_BYTES})
    tables = -(-EXTENTS // L2_ENTRIES)
    with path.open("r+b") as file:
        header = file.read(104)
        l1_size, l1_at, refcount_table_at = struct.unpack_from(">IQQ", header, _L1_SIZE_AT)
        assert l1_size == tables
        file.seek(refcount_table_at)
        (refcounts_at,) = struct.unpack(">Q", file.read(8))
        end = -(-os.fstat(file.fileno()).st_size // CLUSTER_BYTES)
        shared = [(end + number) * CLUSTER_BYTES for number in range(SHARED_CLUSTERS)]
        tables_at = [(end + SHARED_CLUSTERS + n) * CLUSTER_BYTES for n in range(tables)]

        file.seek(shared[0])
        file.write(os.urandom(SHARED_CLUSTERS * CLUSTER_BYTES))
        period = [value for at in shared for value in (at, 0)]
        table = _big_endian("Q", period * (L2_ENTRIES // len(period)))
        file.write(table * tables)
        uses = tables * L2_ENTRIES // 2 // SHARED_CLUSTERS
        file.seek(refcounts_at + 2 * end)
        file.write(_big_endian("H", [uses] * SHARED_CLUSTERS + [1] * tables))
        file.seek(l1_at)
        file.write(_big_endian("Q", [at | COPIED for at in tables_at]))
    return path
