# SPDX-License-Identifier: Apache-2.0
"""Writing guest clusters compressed, as an image is filled that will mostly be read.

Only whole clusters are taken; at the end of the disk, what there is of the last one. What becomes
of each:

    all zeroes                        a zero entry, as by write zeroes with MAY_UNMAP
    smaller when compressed           packed behind the one before it (packed_space.py)
    not smaller                       a plain cluster, as by any other write

A disk's short last cluster is compressed with zeroes behind it. Whatever the clusters held before
is let go, as by other writes: the new bytes lie elsewhere, are counted, and are complete in the
file before the L2 entries name them.

Compressing is what takes time: it is done on the thread pool without the GIL, in jobs of some
clusters, a bounded number of jobs at once for each request.

Context: home thread of the AioContext. The caller holds the clusters exclusive (cluster_lock.py).
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Coroutine
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from blockemu.drivers.errors import io_error
from blockemu.drivers.qcow2.table_cache import merge
from blockemu.drivers.zeroes import is_zero
from blockemu.loop.current import running_context
from blockemu.loop.sync import Mutex, gather

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.cluster_map import ClusterMap
    from blockemu.drivers.qcow2.compression import Compressor
    from blockemu.drivers.qcow2.guest_erase import GuestEraser
    from blockemu.drivers.qcow2.guest_read import GuestReader
    from blockemu.drivers.qcow2.guest_write import GuestWriter
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.layout import Layout
    from blockemu.drivers.qcow2.metadata_writer import MetadataWriter
    from blockemu.drivers.qcow2.packed_space import PackedSpace

JOB_BYTES = 64 * 1024
"""Compressed by one job, if that is a cluster at least: takes much longer than waking a thread."""

JOBS_AT_ONCE = 8
"""Of one request: half of the thread pool, which also serves others' I/O."""


class Form(enum.Enum):
    """How a guest cluster is stored."""

    ZERO = enum.auto()
    PACKED = enum.auto()
    PLAIN = enum.auto()


class Stored(NamedTuple):
    """One guest cluster as it is to be stored; `data` for those that are PACKED."""

    form: Form
    data: bytes = b""


Job = Callable[[], list[Stored]]


async def on_thread_pool(job: Job) -> list[Stored]:
    """Run `job` in a worker of the running context. Suspends: until it has run; shielded."""
    return await running_context().thread_pool.run(job)


class GuestCompressor:
    """Writes what the guest wants compressed. `offload` runs a job without blocking the loop."""

    def __init__(
        self,
        layout: Layout,
        *,
        file: ImageFile,
        clusters: ClusterMap,
        space: PackedSpace,
        writer: MetadataWriter,
        reader: GuestReader,
        guest_writer: GuestWriter,
        eraser: GuestEraser,
        mutex: Mutex,
        compress: Compressor,
    ) -> None:
        self.offload: Callable[[Job], Coroutine[Any, Any, list[Stored]]] = on_thread_pool
        self._layout = layout
        self._bits = layout.cluster_bits
        self._size = layout.cluster_size
        self._file = file
        self._clusters = clusters
        self._space = space
        self._writer = writer
        self._reader = reader
        self._guest_writer = guest_writer
        self._eraser = eraser
        self._mutex = mutex
        self._compress = compress

    def check(self, offset: int, length: int) -> None:
        """Raises: OSError(EINVAL), if the range isn't one of whole clusters."""
        end = offset + length
        if offset % self._size or (end % self._size and end != self._guest_writer.disk_bytes):
            raise io_error(
                errno.EINVAL,
                f"{self._file.name}: bytes {offset}+{length} aren't whole clusters to compress",
            )

    async def write(self, offset: int, view: memoryview) -> None:
        """Write a range that `check` likes. Raises: OSError; part may be written then."""
        step = JOBS_AT_ONCE * max(JOB_BYTES, self._size)
        for start in range(0, len(view), step):
            await self._write_batch(offset + start, view[start : start + step])

    async def _write_batch(self, offset: int, view: memoryview) -> None:
        done = 0
        for form, run in groupby(await self._pack(view), key=lambda stored: stored.form):
            packed = [stored.data for stored in run]
            part = view[done : done + len(packed) * self._size]
            if form is Form.ZERO:
                await self._eraser.zero(offset + done, len(part), may_unmap=True)
            elif form is Form.PLAIN or not self._space.reaches(len(packed)):
                await self._guest_writer.write(offset + done, part)
            else:
                await self._store((offset + done) >> self._bits, packed)
            done += len(part)

    async def _pack(self, view: memoryview) -> list[Stored]:
        """How each cluster is to be stored. Suspends: until all are compressed."""
        step = max(JOB_BYTES, self._size)
        parts = [view[start : start + step] for start in range(0, len(view), step)]
        packed = await gather(*(self.offload(self._job(part)) for part in parts))
        return [stored for items in packed for stored in items]

    def _job(self, view: memoryview) -> Job:
        compress, size, find_zeroes = self._compress, self._size, self._eraser.has_zeroes
        return lambda: [
            pack(compress, view[start : start + size], size, find_zeroes=find_zeroes)
            for start in range(0, len(view), size)
        ]

    # --- storing ---

    async def _store(self, cluster: int, packed: list[bytes]) -> None:
        """Compressed clusters for guest clusters from `cluster` on."""
        entries = self._clusters.slice_entries
        done = 0
        while done < len(packed):
            count = min(len(packed) - done, entries - (cluster + done) % entries)
            await self._store_in_slice(cluster + done, packed[done : done + count])
            done += count

    async def _store_in_slice(self, cluster: int, packed: list[bytes]) -> None:
        lengths = [len(data) for data in packed]
        if self._writer.wants_flush:
            await self._writer.flush()
        async with self._mutex:
            await self._clusters.make_writable(cluster)
            places = await self._space.take(lengths)
        try:
            await self._file.write_all(merge(list(zip(places, packed, strict=True))))
            if self._reader.direct_map is not None:
                await self._reader.direct_map.invalidate(
                    cluster << self._bits, len(packed) << self._bits
                )
            await self._link(cluster, places, lengths)
        except BaseException:
            async with self._mutex:
                await self._space.give_back(zip(places, lengths, strict=True))
            raise

    async def _link(self, cluster: int, places: list[int], lengths: list[int]) -> None:
        """Enter the compressed clusters in the L2 table, all of them without suspending."""
        found = await self._clusters.load(cluster)
        self._reader.forget_unpacked()
        descriptors = map(self._layout.compressed_descriptor, places, lengths)
        self._clusters.set_entries(found, cluster % self._clusters.slice_entries, [*descriptors])


def pack(compress: Compressor, cluster: memoryview, size: int, *, find_zeroes: bool) -> Stored:
    """How to store one cluster of `size` bytes, the disk's last one maybe shorter.

    Context: any thread.
    """
    if find_zeroes and is_zero(cluster):
        return Stored(Form.ZERO)
    if len(cluster) < size:
        cluster = memoryview(bytes(cluster).ljust(size, b"\0"))
    data = compress(cluster)
    return Stored(Form.PACKED, data) if len(data) < size else Stored(Form.PLAIN)
