# SPDX-License-Identifier: Apache-2.0
"""What must be on disk before what: the one place that writes cached metadata back.

The power may fail between any two writes, and the disk may reorder all that lies between two
flushes. An image must then be one that leaks clusters at worst. A flush of ours is a run of phases,
with a flush of the file wherever a phase names what an earlier one wrote:

    refcount blocks                      space is taken before anything lies in it
      [file flush] refcount table        a new block's contents before the entry that names it
    [file flush]                         covers guest data and new L2 tables, too
    L2 tables                            entries name data and refcounts that are safe now
    [file flush] L1 table                a new L2 table's contents before the entry that names it
    [file flush]                         if the caller wants to know that all this is safe

An external data file is flushed before the L2 tables, too, which name what was written to it.

Phases with nothing to write are left out. New places of the L1 table, the refcount table or the
header's other fields are rare and written by those who change them, with the same rule.

Nothing is written that wasn't complete when the run began: all dirty state is *captured* first,
without suspending (table_cache.py). An entry that becomes dirty during the run waits for the next,
which again begins with its data and its refcounts.

Letting go goes the other way round. A host cluster that an L2 entry names no more may be named by
the entry on disk still. So it goes on a list (`let_go`), and only after a run that made the new
entry durable does it count as `released`: then its refcount may be lowered and it may be handed out
again. After a crash in between it is a leak.

Concurrent callers share runs: one is enough for all who called before it began.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.errors import io_error
from blockemu.loop.sync import Mutex, gather

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.root_table import RootTable
    from blockemu.drivers.qcow2.table_cache import Capture, TableCache

LET_GO_MAX = 65536
"""Clusters that may wait for a flush before one is made for their sake: bounds the list, and
with 64 KiB clusters keeps the image from growing past 4 GiB for want of a flush."""


class Reference(NamedTuple):
    """One reference to each of `clusters` host clusters from `first` on (cluster numbers)."""

    first: int
    clusters: int
    is_table: bool = False
    discard: bool = False
    """The guest said that it needs the data no more: the host may have the space back."""


class _Captured(NamedTuple):
    blocks: Capture
    reftable: tuple[list[tuple[int, bytes]], set[int]]
    l2: Capture
    l1: tuple[list[tuple[int, bytes]], set[int]]
    let_go: list[Reference]


class MetadataWriter:
    """Writes back the caches that `attach` names. Context: home thread of the AioContext."""

    blocks: TableCache
    reftable: RootTable
    l2: TableCache
    l1: RootTable

    def __init__(self, file: ImageFile) -> None:
        self.released: list[Reference] = []
        """Durably let go; refcount.py lowers their refcounts."""
        self._file = file
        self._flush_data: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._let_go: list[Reference] = []
        self._let_go_clusters = 0
        self._mutex = Mutex()
        self._runs_begun = 0
        self._covered = 0
        self._covered_durably = 0
        self._stopped: str | None = None

    def attach(
        self, *, blocks: TableCache, reftable: RootTable, l2: TableCache, l1: RootTable
    ) -> None:
        self.blocks = blocks
        self.reftable = reftable
        self.l2 = l2
        self.l1 = l1

    def attach_data_file(self, flush: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """The guest's data lie in a file of their own: `flush` makes them durable."""
        self._flush_data = flush

    def let_go(self, reference: Reference) -> None:
        """An entry that was changed just now named these clusters. Suspends: never."""
        self._let_go.append(reference)
        self._let_go_clusters += reference.clusters

    @property
    def wants_flush(self) -> bool:
        """So much waits for a durable flush that somebody should make one."""
        return self._let_go_clusters > LET_GO_MAX

    @property
    def is_dirty(self) -> bool:
        """Something is in memory that isn't on its way to the file."""
        return (
            self.blocks.is_dirty
            or self.l2.is_dirty
            or self.l1.is_dirty
            or self.reftable.is_dirty
            or bool(self._let_go)
        )

    @property
    def is_stopped(self) -> bool:
        """`stop` was called."""
        return self._stopped is not None

    def stop(self, reason: str) -> None:
        """Memory and disk may disagree on where a table is: write no metadata from now on."""
        self._stopped = reason

    def check_running(self) -> None:
        """Raises: OSError(EIO), if changes of metadata won't be written any more."""
        if self._stopped is not None:
            raise io_error(errno.EIO, f"{self._file.name}: {self._stopped}")

    async def write_back(self) -> None:
        """Clean the caches, to make room. Promises order, not durability."""
        await self._run(durable=False)

    async def flush(self) -> None:
        """All that was complete before this call is durable when it returns, guest data included.

        Suspends: for the writes and file flushes, and behind a run that is under way.
        Raises: OSError. What failed is dirty still; the next flush tries it again.
        """
        await self._run(durable=True)

    async def _run(self, *, durable: bool) -> None:
        wanted = self._runs_begun + 1
        async with self._mutex:
            if (self._covered_durably if durable else self._covered) >= wanted:
                return
            self.check_running()
            self._runs_begun += 1
            number = self._runs_begun
            captured = self._capture()
            try:
                await self._write(captured, durable=durable)
            except BaseException:
                self._settle(captured, failed=True, durable=durable)
                raise
            self._settle(captured, failed=False, durable=durable)
            self._covered = number
            if durable:
                self._covered_durably = number

    def _capture(self) -> _Captured:
        captured = _Captured(
            self.blocks.capture(),
            self.reftable.capture(),
            self.l2.capture(),
            self.l1.capture(),
            self._let_go,
        )
        self._let_go = []
        self._let_go_clusters = 0
        return captured

    async def _write(self, captured: _Captured, *, durable: bool) -> None:
        file = self._file
        if captured.blocks.writes:
            await file.write_all(captured.blocks.writes)
        if captured.reftable[0]:
            await file.flush()
            await file.write_all(captured.reftable[0])
        if captured.l2.writes:
            await self._flush_both()
            await file.write_all(captured.l2.writes)
        if captured.l1[0]:
            await file.flush()
            await file.write_all(captured.l1[0])
        if durable and not captured.l2.writes:
            await self._flush_both()
        elif durable:
            await file.flush()

    async def _flush_both(self) -> None:
        """The image's file, and that of the guest's data if there is one."""
        if self._flush_data is None:
            await self._file.flush()
        else:
            await gather(self._flush_data(), self._file.flush())

    def _settle(self, captured: _Captured, *, failed: bool, durable: bool) -> None:
        self.blocks.settle(captured.blocks, failed=failed)
        self.l2.settle(captured.l2, failed=failed)
        if failed:
            self.reftable.restore(captured.reftable[1])
            self.l1.restore(captured.l1[1])
        if failed or not durable:
            self._let_go[:0] = captured.let_go
            self._let_go_clusters += sum(reference.clusters for reference in captured.let_go)
        else:
            self.released.extend(captured.let_go)
