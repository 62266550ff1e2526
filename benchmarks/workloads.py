# SPDX-License-Identifier: Apache-2.0
"""What is measured: the load shapes, and the kinds of image they run on.

A *setting* is an image format and a cache mode; it decides which servers can take part. Every
workload runs in every setting.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Workload:
    """One shape of load, and who makes it: fio, or where `lean` native/lean_client.c, which alone
    can choose the style of replies."""

    name: str
    pattern: str
    block_bytes: int
    depth: int
    lean: bool = False
    style: str = "simple"

    @property
    def writes(self) -> bool:
        """Whether the load writes."""
        return "write" in self.pattern


@dataclass(frozen=True, slots=True)
class Setting:
    """An image format and a cache mode."""

    fmt: str
    direct: bool

    @property
    def name(self) -> str:
        """The name used in tables, filters and JSON."""
        return f"{self.fmt}-{'direct' if self.direct else 'cache'}"


WORKLOADS = (
    Workload("randread-4k-d1", "randread", 4 * KIB, 1),
    Workload("randread-4k-d32", "randread", 4 * KIB, 32),
    Workload("randwrite-4k-d1", "randwrite", 4 * KIB, 1),
    Workload("randwrite-4k-d32", "randwrite", 4 * KIB, 32),
    Workload("randread-4k-d32-lean", "randread", 4 * KIB, 32, lean=True),
    Workload("randwrite-4k-d32-lean", "randwrite", 4 * KIB, 32, lean=True),
    Workload("randread-64k-d16", "randread", 64 * KIB, 16),
    Workload("randwrite-64k-d16", "randwrite", 64 * KIB, 16),
    # Eight in flight is what qemu-img convert keeps, the sequential client that people wait for.
    Workload("read-1m-d8", "read", MIB, 8),
    Workload("write-1m-d8", "write", MIB, 8),
)

SETTINGS = (
    Setting("raw", direct=False),
    Setting("qcow2", direct=False),
    Setting("raw", direct=True),
    Setting("qcow2", direct=True),
)

# Those that targets are about.
QUICK_WORKLOADS = (
    "randread-4k-d1",
    "randread-4k-d32",
    "randwrite-4k-d32",
    "randread-4k-d32-lean",
    "randwrite-4k-d32-lean",
    "randread-64k-d16",
    "read-1m-d8",
    "write-1m-d8",
)
