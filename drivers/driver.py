# SPDX-License-Identifier: Apache-2.0
"""What a block driver is: one class, a handful of coroutines.

A driver turns requests on its node into requests on its children, or, at the bottom of the graph,
into host I/O. It is called by its node only (node.py), which has already checked the range,
aligned the request to `request_alignment`, and tracked it; so a driver holds just the idea that
it is named after. A new one in a module of the user's own needs `name`, `open`, `length_bytes`,
`preadv` and `pwritev`; everything else has a default that is right, if not fast.
"""

from __future__ import annotations

import enum
import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.status_runs import StatusRuns, state_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from blockemu.drivers.child import Permission
    from blockemu.drivers.direct_map import DirectMap
    from blockemu.drivers.dirty_bitmap import DirtyBitmap
    from blockemu.drivers.metadata_budget import Share
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.registry import Opener
    from blockemu.loop.aio_context import AioContext
    from blockemu.loop.host_file import HostFile


class RequestFlags(enum.IntFlag):
    """How a write, write-zeroes or discard is to be carried out."""

    NONE = 0
    FUA = 1
    """On stable storage before it is acknowledged."""
    MAY_UNMAP = 2
    """Zeroes may be a hole: the space need not stay allocated."""
    NO_FALLBACK = 4
    """Fail with ENOTSUP sooner than write zero bytes the slow way."""
    WRITE_COMPRESSED = 8
    """Store what is written compressed, where that saves space. Whole clusters of the format only
    (the disk's last one may be short): EINVAL. ENOTSUP, where the driver can't."""


class BlockStatus(NamedTuple):
    """What the bytes from an offset on are, as this node's own layer sees them.

    `allocated` False means that this layer doesn't hold them and its backing file shows through;
    `zero` that they read as zeroes; `data` that they take space in this layer. `host_offset` is
    where they lie in `file` when they lie there unchanged. `depth` is 0 in an answer about one
    layer; chain_status.py counts by it the backing files down to the layer that it speaks of.
    """

    length: int
    data: bool
    zero: bool
    allocated: bool = True
    host_offset: int | None = None
    file: str | None = None
    depth: int = 0


class BlockDriver(ABC):
    """Base of all drivers. Context: every method runs in the home thread of `node.ctx`."""

    name: ClassVar[str]
    is_protocol: ClassVar[bool] = False
    """At the bottom of the graph: reads past its end are zeroes, writes past it make it grow."""
    supports_fua: ClassVar[bool] = False
    """`pwritev` and `pwrite_zeroes` honour FUA themselves; otherwise the node flushes."""
    supports_compressed_writes: bool = False
    """`pwritev` honours WRITE_COMPRESSED; otherwise it is never handed the flag."""

    keeps_zeroes: ClassVar[bool] = True
    """A filter's: zeroes of the file below, and so its holes, are zeroes here."""

    host_file: HostFile | None = None
    """The host file whose bytes are this node's bytes, offset by offset, where there is one."""

    metadata_share: Share | None = None
    """Of the daemon's memory for metadata, where the driver takes any."""

    def __init__(self, node: BlockDriverState) -> None:
        self.node = node

    @classmethod
    @abstractmethod
    async def open(cls, node: BlockDriverState, options: dict[str, Any], opener: Opener) -> Self:
        """Open the driver for `node`, taking (popping) what it knows from `options`.

        What is left in `options` afterwards is refused by the caller as unknown.
        Raises: ImageError.
        """

    @classmethod
    def recognises(cls, start: bytes) -> bool:
        """Whether an image that begins with `start` is of this format, as far as that tells."""
        return False

    @classmethod
    def names_other_file(cls, start: bytes) -> str | None:
        """A file that an image beginning with `start` would make us open as well, or None."""
        return None

    @classmethod
    def options_alone(cls, *, read_only: bool) -> dict[str, Any]:
        """The options that keep an image from opening files that it names, as far as it can do
        without them."""
        return {}

    @property
    def request_alignment(self) -> int:
        """Bytes; a power of two. Offsets and lengths handed in are multiples of it, but for the
        end of a write that reaches the end of the device, which may be any byte. A read of the
        last block may reach past the end by less than a block: zeroes, then."""
        return 1

    @property
    def cluster_size(self) -> int:
        """Bytes that the format allocates at once, and compresses; 1 where it does neither."""
        return 1

    @property
    @abstractmethod
    def length_bytes(self) -> int:
        """Size of the device in bytes, now."""

    @abstractmethod
    async def preadv(self, offset: int, view: memoryview) -> None:
        """Fill all of `view` with the bytes from `offset` on. Raises: OSError."""

    @abstractmethod
    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        """Write all of `view` at `offset`. Raises: OSError."""

    async def pwrite_zeroes(self, offset: int, length: int, flags: RequestFlags) -> None:
        """Make the range read as zeroes without being handed them.

        Raises: OSError(ENOTSUP) where there is no such way; the node then writes zero bytes.
        """
        raise io_error(errno.ENOTSUP, f"driver {self.name} has no write zeroes")

    async def pdiscard(self, offset: int, length: int) -> None:
        """Take note that nobody needs these bytes any more. The default forgets the hint."""
        return

    async def flush(self) -> None:
        """All writes that were acknowledged before are on stable storage when this returns."""
        return

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Describe the bytes from `offset`: at least one, at most `length`."""
        return BlockStatus(length, data=True, zero=False)

    async def status_runs(self, offset: int, length: int, *, runs_max: int) -> StatusRuns:
        """The same for as much of the range as is cheap, in about `runs_max` runs, at least one:
        status_runs.py. Worth having where it costs less than a `block_status` for each."""
        status = await self.block_status(offset, length)
        runs = StatusRuns()
        runs.add(status.length, state_of(status))
        return runs

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        """Change the size to `length` bytes. Raises: OSError(ENOTSUP) where it can't be."""
        raise io_error(errno.ENOTSUP, f"driver {self.name} can't be resized")

    async def change_backing_file(self, filename: str | None, fmt: str | None) -> None:
        """Have the image name another backing file, or none, from its next open on.

        Durable when this returns; a crash leaves the old names or the new ones.
        Raises: OSError(ENOTSUP), where the format has none; ImageError, where the name doesn't fit.
        """
        raise io_error(errno.ENOTSUP, f"format {self.name} has no backing files")

    async def make_empty(self) -> None:
        """Let go of all that this layer holds: its backing file shows through everywhere.

        Durable when this returns; after a crash on the way, some of it is gone.
        Raises: OSError(ENOTSUP), where the format has no backing files.
        """
        raise io_error(errno.ENOTSUP, f"format {self.name} has no backing files")

    # Internal snapshots: the coroutines drain the node themselves, and aren't requests on it.

    async def snapshot_create(self, name: str) -> None:
        """Keep the disk as it is now. Raises: ImageError; OSError. It is unchanged then."""
        raise self._no_snapshots()

    async def snapshot_apply(self, id_or_name: str) -> None:
        """Make the disk what it was then, its size included; what it is now is lost.

        Raises: ImageError; OSError. It is unchanged then.
        """
        raise self._no_snapshots()

    async def snapshot_delete(self, name_or_id: str) -> None:
        """Delete a snapshot, and free its space. Raises: ImageError; OSError. It is there then."""
        raise self._no_snapshots()

    def _no_snapshots(self) -> ImageError:
        name = self.node.filename or self.node.node_name
        return ImageError(name, f"format {self.name} has no internal snapshots")

    # Dirty bitmaps that are kept in the image. The node has them (node.py) and records; this is how
    # the driver reads and keeps them. The coroutines drain the node themselves, where they must.

    @property
    def supports_bitmaps(self) -> bool:
        """Whether the image can keep any."""
        return False

    @property
    def stored_bitmaps(self) -> tuple[str, ...]:
        """The names of those that it has, as it stands on the disk."""
        return ()

    def prepare_bitmap(self, name: str, granularity: int) -> None:
        """The node is about to have a new bitmap that is to be kept. Raises: ImageError: it can't
        be."""
        raise self._no_bitmaps()

    async def load_bitmap(self, name: str) -> DirtyBitmap | None:
        """The bitmap of this name, read from the image if it wasn't yet. Raises: ImageError."""
        return self.node.dirty_bitmaps.get(name)

    async def bitmaps_changing(self, bitmaps: Collection[DirtyBitmap]) -> None:
        """These bitmaps of the node are about to change, otherwise than by recording: a crash from
        here on makes those that the image keeps inconsistent. Raises: OSError."""
        return

    async def remove_stored_bitmap(self, name: str) -> None:
        """Take a persistent bitmap out of the image, durably. Raises: ImageError; OSError."""
        raise self._no_bitmaps()

    async def store_bitmaps(self) -> None:
        """Bring all persistent bitmaps to the image, durably; `close` does it, too, but can't fail.
        From here on, the node refuses writes. Raises: ImageError; OSError."""
        return

    def _no_bitmaps(self) -> ImageError:
        name = self.node.filename or self.node.node_name
        return ImageError(
            name,
            f"Can't store persistent bitmaps to {self.node.node_name}: format {self.name} has none",
        )

    def cancel_in_flight(self) -> None:
        """Requests that wait for somebody who may never answer, such as a server, fail with EIO
        soon, and so do all later ones. The default has nobody to wait for."""
        return

    async def close(self) -> None:
        """Let go of everything. The node is quiet and flushed; children are closed by the node."""
        return

    def set_permissions(self, perm: Permission, shared: Permission) -> None:
        """What all parents together do (`perm`) and tolerate (`shared`) has changed.

        Raises: ImageError, when the host refuses (an image lock); the old state then holds.
        """
        return

    def attach_aio_context(self, ctx: AioContext) -> None:
        """The node now belongs to `ctx`; runs in its home thread."""
        return

    def detach_aio_context(self) -> None:
        """The node is about to leave its context, and is quiet; runs in the old home thread."""
        return

    def direct_map(self) -> DirectMap | None:
        """The driver's direct map (direct_map.py), or None if every request must come by here."""
        return None

    async def drop_direct_map(self) -> None:
        """Forget the direct map, whose mappings are about to mean less; the next user is given a
        new one. Suspends: until the requests that were taken from it are done."""
        return

    def info(self) -> dict[str, Any]:
        """Facts of the format for `img info` and queries, under the field's own names."""
        return {}
