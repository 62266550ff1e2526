# SPDX-License-Identifier: Apache-2.0
"""The edge of the block graph: a parent's hold on a child, with role and permissions.

Permissions are what keeps two users of one node from ruining each other's data: an edge says what
its parent does (`perm`) and what it lets the others do (`shared`). An edge that breaks what
another was promised isn't made. The sum over all edges goes down to the driver, which for a host
file turns it into the byte-range locks that other programs respect (image_lock.py).
"""

from __future__ import annotations

import enum
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from blockemu.drivers.driver import BlockStatus, RequestFlags

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.status_runs import StatusRuns


class Permission(enum.IntFlag):
    """What a parent may do with a child. The values are the bit numbers of QEMU's image locks."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


class Role(enum.Flag):
    """What a child is to its parent."""

    DATA = enum.auto()
    METADATA = enum.auto()
    FILTERED = enum.auto()
    BACKING = enum.auto()
    ROOT = enum.auto()


class BdrvChild:
    """One edge. Its request calls are those of the child node, in the child's context.

    `parent` is None for the edge of a BlockBackend, which is then its `owner`.
    """

    __slots__ = ("may_write", "name", "node", "owner", "parent", "perm", "role", "shared")

    def __init__(
        self,
        name: str,
        node: BlockDriverState,
        *,
        parent: BlockDriverState | None,
        role: Role,
        perm: Permission,
        shared: Permission,
        owner: object = None,
    ) -> None:
        self.name = name
        self.node = node
        self.parent = parent
        self.role = role
        self.perm = perm
        self.shared = shared
        self.owner = owner
        # Asked by each write; arithmetic with an IntFlag takes a microsecond.
        self.may_write = bool(perm & (Permission.WRITE | Permission.WRITE_UNCHANGED))

    @property
    def length_bytes(self) -> int:
        return self.node.length_bytes

    # Plain functions that hand on the node's coroutine: an `async def` here would cost each
    # request one more frame for nothing.

    def preadv(self, offset: int, view: memoryview) -> Coroutine[Any, Any, None]:
        return self.node.preadv(offset, view)

    def pwritev(
        self, offset: int, view: memoryview, flags: RequestFlags = RequestFlags.NONE
    ) -> Coroutine[Any, Any, None]:
        assert self.may_write, self.describe()
        return self.node.pwritev(offset, view, flags)

    def pwrite_zeroes(
        self, offset: int, length: int, flags: RequestFlags = RequestFlags.NONE
    ) -> Coroutine[Any, Any, None]:
        assert self.may_write, self.describe()
        return self.node.pwrite_zeroes(offset, length, flags)

    def pdiscard(self, offset: int, length: int) -> Coroutine[Any, Any, None]:
        assert self.perm & Permission.WRITE, self.describe()
        return self.node.pdiscard(offset, length)

    def flush(self) -> Coroutine[Any, Any, None]:
        return self.node.flush()

    def block_status(self, offset: int, length: int) -> Coroutine[Any, Any, BlockStatus]:
        return self.node.block_status(offset, length)

    def status_runs(
        self, offset: int, length: int, *, runs_max: int
    ) -> Coroutine[Any, Any, StatusRuns]:
        return self.node.status_runs(offset, length, runs_max=runs_max)

    def truncate(self, length: int, *, preallocation: str = "off") -> Coroutine[Any, Any, None]:
        assert self.perm & Permission.RESIZE, self.describe()
        return self.node.truncate(length, preallocation=preallocation)

    def describe(self) -> str:
        """For messages: who holds what, and how."""
        holder = self.parent.node_name if self.parent is not None else self.owner
        return f"child '{self.name}' of {holder} on {self.node.node_name} ({self.perm!r})"
