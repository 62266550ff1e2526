# SPDX-License-Identifier: Apache-2.0
"""The convert job: writes what some images show, one after the other, into another one.

One walk through the sources' block status cuts the disk into pieces; a few workers carry them out:
read, look for zeroes, write. So several reads and writes are under way at once, whoever finishes
first. Writes are begun in the disk's order all the same, unless the plan lets them go: a new qcow2
image then has its clusters in that order, too.

Compressed clusters are written whole, so pieces then begin and end between clusters of the target,
with what is unlike inside a cluster in one piece.

What is known to be zeroes is never read. Whether it is written depends on the target: a new image
reads as zeroes already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from blockemu.drivers.chain_status import backing_node, chain_status
from blockemu.drivers.driver import BlockStatus, RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.sector import SECTOR_BYTES, sectors_up
from blockemu.jobs.job import Job
from blockemu.loop.memory_scan import zero_and_data_runs
from blockemu.loop.sync import Mutex, WaitQueue, gather, yield_now

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend

PIECE_BYTES: Final = 2 << 20
"""The most that is read and written at once. Pieces end at multiples of it, and so at the ends of
clusters of any size."""

ZERO_BYTES_MAX: Final = 1 << 30
"""The most that is zeroed at once: bounds the time until a pause or a cancel is heard."""

SALVAGED_BYTES: Final = 4096
"""Taken for data where not even block status can be had, before the question is asked again."""

REQUESTS_MAX: Final = 16
"""Workers, each with a buffer of PIECE_BYTES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertPlan:
    """What is to be copied, and what is known of the target. All images are open in one context.

    `target_is_blank`: the target has no data of its own, so it reads as zeroes, or as its backing
    file. `keep_backing`: its backing file shows what the sources' backing files do, so only what
    lies above those is copied. `sparse_bytes`: runs of so many zero bytes inside data are left out;
    0: everything is written, zeroes too. `compressed`: clusters are stored compressed, where that
    makes them smaller. `on_unreadable`: what can't be read becomes zeroes, and each sector of it is
    told; None: it ends the job. Each source begins at a whole sector, and if `compressed` in a
    whole cluster of the target.
    """

    sources: Sequence[BlockBackend]
    target: BlockBackend
    target_is_blank: bool = False
    keep_backing: bool = False
    sparse_bytes: int = 4096
    requests_max: int = 8
    in_order: bool = True
    compressed: bool = False
    on_unreadable: Callable[[str], None] | None = None

    @property
    def granule_bytes(self) -> int:
        """What pieces begin and end at multiples of, but for the end."""
        return self.target.node.driver.cluster_size if self.compressed else 1

    @property
    def length_bytes(self) -> int:
        """What the target must hold."""
        return sum(sectors_up(source.length_bytes) for source in self.sources)


class Piece(NamedTuple):
    """A part of the target. `source` None: zeroes; else the image to read, at `source_offset`."""

    serial: int
    start: int
    length: int
    source: BlockBackend | None = None
    source_offset: int = 0


class ConvertJob(Job):
    """Context: the home thread of the images' context. It neither opens nor closes them.

    `on_progress` is told (bytes that are done, bytes in all) whenever that changes.
    """

    kind: ClassVar[str] = "convert"

    def __init__(
        self,
        job_id: str,
        plan: ConvertPlan,
        *,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(job_id, ctx=plan.target.ctx, **kwargs)
        assert 1 <= plan.requests_max <= REQUESTS_MAX
        self._plan = plan
        self._granule = plan.granule_bytes
        self._on_progress = on_progress
        backing = backing_node(plan.target.node)
        self._backing_bytes = 0 if backing is None else backing.length_bytes
        self._walk_mutex = Mutex()
        self._source_index = 0
        self._source_start = 0
        self._walked = 0
        self._known: BlockStatus | None = None
        self._known_until = 0
        self._serial = 0
        self._begun = 0
        self._turn = WaitQueue()
        self._stopped = False

    async def work(self) -> None:
        """Copy, and flush the target. Raises: ImageError, which names the image that failed."""
        plan = self._plan
        if plan.length_bytes > plan.target.length_bytes:
            raise ImageError(
                plan.target.name,
                f"has {plan.target.length_bytes} bytes, fewer than the {plan.length_bytes} of "
                "what is to be copied",
            )
        self.add_work(plan.length_bytes)
        await gather(*(self._worker() for _ in range(plan.requests_max)))
        try:
            await plan.target.flush()
        except OSError as error:
            raise ImageError.from_os_error(plan.target.name, error) from error

    # --- the workers ---

    async def _worker(self) -> None:
        try:
            while (piece := await self._next_piece()) is not None:
                await self._carry_out(piece)
                self._report(piece.length)
                await yield_now()  # where nothing suspends, a cancel must be heard all the same
        except BaseException:
            self._stopped = True
            self._turn.wake_all()
            raise

    async def _carry_out(self, piece: Piece) -> None:
        if piece.source is None:
            await self._write_in_turn(piece, memoryview(b""))
            return
        pool = self.ctx.buffers
        buffer = pool.take(piece.length)
        try:
            view = buffer.view[: piece.length]
            await self._read(piece.source, piece.source_offset, view)
            await self._write_in_turn(piece, view)
        finally:
            pool.give(buffer)

    async def _read(self, source: BlockBackend, offset: int, view: memoryview) -> None:
        try:
            await _read(source, offset, view)
        except ImageError as error:
            if self._plan.on_unreadable is None:
                raise
            if len(view) <= SECTOR_BYTES:
                self._plan.on_unreadable(f"error while reading offset {offset}: {error.reason}")
                view[:] = bytes(len(view))
                return
        else:
            return
        for start in range(0, len(view), SECTOR_BYTES):
            await self._read(source, offset + start, view[start : start + SECTOR_BYTES])

    async def _write_in_turn(self, piece: Piece, view: memoryview) -> None:
        """Begin the piece's writes when those of all before it have begun."""
        while self._plan.in_order and self._begun != piece.serial and not self._stopped:
            await self._turn.wait()
        if self._stopped:
            return
        await gather(self._write(piece, view), self._pass_turn_on())

    async def _pass_turn_on(self) -> None:
        self._begun += 1
        self._turn.wake_all()

    async def _write(self, piece: Piece, view: memoryview) -> None:
        plan = self._plan
        try:
            if not view:
                await self._write_zeroes(piece.start, piece.length)
            elif not plan.sparse_bytes:
                await self._write_data(piece.start, view)
            else:
                await self._write_sparsely(piece.start, view)
        except OSError as error:
            raise ImageError.from_os_error(plan.target.name, error) from error

    async def _write_sparsely(self, start: int, view: memoryview) -> None:
        plan = self._plan
        granule = self._granule if plan.compressed else plan.sparse_bytes
        for run in zero_and_data_runs(view, offset=start, granule=granule):
            if not run.is_zero:
                part = view[run.start : run.start + run.length]
                await self._write_data(start + run.start, part)
            elif not self._shows_zeroes(start + run.start):
                await self._write_zeroes(start + run.start, run.length)

    async def _write_data(self, start: int, view: memoryview) -> None:
        target = self._plan.target
        if not self._plan.compressed:
            await target.pwritev(start, view)
            return
        end = start + len(view)
        odd = 0 if end == target.length_bytes else end % self._granule
        if len(view) > odd:
            await target.pwritev(start, view[: len(view) - odd], RequestFlags.WRITE_COMPRESSED)
        if odd:  # the rest of that cluster isn't ours to change
            await target.pwritev(end - odd, view[len(view) - odd :])

    async def _write_zeroes(self, start: int, length: int) -> None:
        await self._plan.target.pwrite_zeroes(start, length, RequestFlags.MAY_UNMAP)

    # --- the walk ---

    async def _next_piece(self) -> Piece | None:
        """The next piece that takes any work; None at the end, or when another worker failed."""
        async with self._walk_mutex:
            while not self._stopped:
                await self.pause_point()
                if self._source_index == len(self._plan.sources):
                    return None
                piece = await self._look()
                if piece is not None:
                    self._serial += 1
                    return piece
                await yield_now()
        return None

    async def _look(self) -> Piece | None:
        """Walk on by what is alike. None: that needn't be copied."""
        plan = self._plan
        source = plan.sources[self._source_index]
        start, offset = self._walked, self._walked - self._source_start
        rest = sectors_up(source.length_bytes) - offset
        if rest <= 0:
            self._source_index += 1
            self._source_start = self._walked
            return None
        if self._known is None or self._known_until <= start:
            self._known = await self._status(source, offset, rest)
            self._known_until = start + self._known.length
        status, length = self._known, self._known_until - start
        whole = length if length >= rest else length - length % self._granule
        if not whole:  # not all of this cluster is alike
            return self._data_piece(source, offset, self._granule, rest)
        length = whole
        if status.zero and plan.sparse_bytes:
            if self._shows_zeroes(start):
                self._walk_past(length)
                return None
            if start < self._backing_bytes:
                clusters = -(-(self._backing_bytes - start) // self._granule)
                length = min(length, clusters * self._granule)
            length = min(length, ZERO_BYTES_MAX)
            self._walked += length
            return Piece(self._serial, start, length)
        if plan.keep_backing and not status.allocated and not status.zero:
            self._walk_past(length)
            return None
        return self._data_piece(source, offset, length, rest)

    def _data_piece(self, source: BlockBackend, offset: int, length: int, rest: int) -> Piece:
        start = self._walked
        length = min(length, rest, PIECE_BYTES - start % PIECE_BYTES)
        self._walked += length
        return Piece(self._serial, start, length, source, offset)

    def _walk_past(self, length: int) -> None:
        self._walked += length
        self._report(length)

    def _shows_zeroes(self, start: int) -> bool:
        """Whether the target, unless it is written, shows zeroes from `start` on."""
        return self._plan.target_is_blank and start >= self._backing_bytes

    async def _status(self, source: BlockBackend, offset: int, length: int) -> BlockStatus:
        inside = min(length, source.length_bytes - offset)
        if inside <= 0:
            return BlockStatus(length, data=False, zero=True)  # the rest of the last sector
        base = backing_node(source.node) if self._plan.keep_backing else None
        try:
            return await chain_status(source.node, offset, inside, base=base)
        except OSError as error:
            if self._plan.on_unreadable is not None:  # then reading tells what is wrong
                return BlockStatus(min(inside, SALVAGED_BYTES), data=True, zero=False)
            raise ImageError.from_os_error(source.name, error) from error

    def _report(self, length: int) -> None:
        self.work_done(length)
        self._on_progress(self.progress_current, self.progress_total)


async def _read(source: BlockBackend, offset: int, view: memoryview) -> None:
    """Fill `view` from `offset`; zeroes behind the source's end. Raises: ImageError."""
    inside = max(min(len(view), source.length_bytes - offset), 0)
    try:
        if inside:
            await source.preadv(offset, view[:inside])
    except OSError as error:
        raise ImageError.from_os_error(source.name, error) from error
    if inside < len(view):
        view[inside:] = bytes(len(view) - inside)
