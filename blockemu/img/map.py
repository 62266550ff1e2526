# SPDX-License-Identifier: Apache-2.0
"""`img map`: where the guest's bytes lie, through the whole backing chain, in qemu-img's words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, NamedTuple

from blockemu.drivers.chain_status import chain_status
from blockemu.drivers.errors import ImageError
from blockemu.drivers.sector import sectors_up
from blockemu.img.session import open_image, run_session
from blockemu.loop.sync import yield_now

if TYPE_CHECKING:
    from blockemu.drivers.driver import BlockStatus
    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.registry import Opener

HUMAN_HEADER = f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File"


class Entry(NamedTuple):
    """Guest bytes that are alike; in bytes from the disk's start.

    `present`: some layer of the chain decides what they read as. `offset`: where they lie in
    `file`, if they lie there as the guest sees them.
    """

    start: int
    length: int
    depth: int = 0
    present: bool = False
    zero: bool = False
    data: bool = False
    offset: int | None = None
    file: str | None = None

    def joined(self, following: Entry) -> Entry | None:
        """Both as one entry, if they are one."""
        offset = None if self.offset is None else self.offset + self.length
        alike = self._replace(start=following.start, length=following.length, offset=offset)
        return self._replace(length=self.length + following.length) if alike == following else None


def map_image(
    path: str,
    emit: Callable[[str], None],
    *,
    output: str = "human",
    fmt: str | None = None,
    start: int = 0,
    length: int | None = None,
    force_share: bool = False,
) -> None:
    """Hand the map of the image at `path` to `emit`, line by line.

    `start` and `length` choose a part of the disk, in bytes.
    Context: the main thread, in which no loop runs. Raises: ImageError.
    """

    async def work(opener: Opener) -> None:
        async with open_image(opener, path, fmt=fmt, force_share=force_share) as backend:
            entries = walk(backend.node, start, length)
            if output == "json":
                await _emit_json(entries, emit)
            else:
                await _emit_human(path, entries, emit)

    run_session(work)


async def walk(
    node: BlockDriverState, start: int, length: int | None = None
) -> AsyncIterator[Entry]:
    """The entries from `start` on, as long as they can be; an empty one where there are none.

    Suspends: between any two questions to the drivers. Raises: OSError.
    """
    end = sectors_up(node.length_bytes)
    if length is not None:
        end = min(end, start + length)
    current = Entry(start, 0)
    while (offset := current.start + current.length) < end:
        found = await _entry(node, offset, end - offset)
        joined = current.joined(found) if current.length else found
        if joined is None:
            yield current
            joined = found
            await yield_now()
        current = joined
    yield current


async def _entry(node: BlockDriverState, offset: int, length: int) -> Entry:
    inside = min(length, node.length_bytes - offset)
    if inside <= 0:
        # The rest of a raw image's last sector.
        return Entry(offset, length, present=True, zero=True, offset=offset, file=node.filename)
    status: BlockStatus = await chain_status(node, offset, inside)
    return Entry(
        offset,
        status.length,
        depth=status.depth,
        present=status.allocated,
        zero=status.zero,
        data=status.data,
        offset=status.host_offset,
        file=status.file if status.host_offset is not None else None,
    )


async def _emit_json(entries: AsyncIterator[Entry], emit: Callable[[str], None]) -> None:
    """An array, an object a line; the same bytes as qemu-img's."""
    line = ""
    async for entry in entries:
        if line:
            emit(f"{line},")
        line = ("" if line else "[") + json_line(entry)
    emit(f"{line}]")


def json_line(entry: Entry) -> str:
    """One object of `--output json`."""
    facts = [
        f'"start": {entry.start}, "length": {entry.length}, "depth": {entry.depth}',
        f'"present": {_json_bool(entry.present)}, "zero": {_json_bool(entry.zero)}',
        f'"data": {_json_bool(entry.data)}',
    ]
    if entry.offset is not None:
        facts.append(f'"offset": {entry.offset}')
    return "{ " + ", ".join(facts) + "}"


def _json_bool(value: bool) -> str:
    return "true" if value else "false"


async def _emit_human(
    path: str, entries: AsyncIterator[Entry], emit: Callable[[str], None]
) -> None:
    emit(HUMAN_HEADER)
    async for entry in entries:
        if not entry.data or entry.zero:
            continue
        if entry.offset is None:
            raise ImageError(
                path,
                f"the data at {entry.start} is compressed or encrypted and lies nowhere as the "
                "guest sees it; --output json can show that",
            )
        emit(f"{_hex(entry.start)}{_hex(entry.length)}{_hex(entry.offset)}{entry.file or ''}")


def _hex(value: int) -> str:
    """As C's `%#-16x`, which writes 0 without a prefix."""
    return f"{hex(value) if value else '0':<16}"
