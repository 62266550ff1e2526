# SPDX-License-Identifier: Apache-2.0
"""What a meta context says of every byte of an export: extent by extent, or summed up.

Lines leave as they come, so that a map of a million extents takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from blockemu.drivers.nbd.inspection import ExportInfo, Inspection
from blockemu.nbdinfo.server import ask

BASE_ALLOCATION: Final = "base:allocation"

_ALLOCATION: Final = ("data", "hole", "zero", "hole,zero")
_DIRTY: Final = ("clean", "dirty")
_DEPTHS: Final = ("absent", "local")

Emit = Callable[[str], None]


def describe(context: str, state: int) -> str | None:
    """What `state` means in `context`, if that is known."""
    if context == BASE_ALLOCATION and state < len(_ALLOCATION):
        return _ALLOCATION[state]
    if context.startswith("qemu:dirty-bitmap:") and state < len(_DIRTY):
        return _DIRTY[state]
    if context == "qemu:allocation-depth":
        return _DEPTHS[state] if state < len(_DEPTHS) else f"backing depth {state}"
    return None


def map_export(uri: str, context: str, emit: Emit, *, as_json: bool) -> None:
    """Hand the map of the export at `uri` to `emit`, line by line, as `nbdinfo --map`.

    Context: the main thread, in which no loop runs. Raises: ImageError.
    """
    print_extent = (_JsonList if as_json else _Lines)(context, emit)

    async def question(inspection: Inspection, export: str) -> None:
        info, number = await inspection.choose(export, context)
        print_extent.begin()
        start, length, state = 0, 0, None
        async for extents in inspection.statuses(info, number):
            for more, said in extents:
                if said == state:
                    length += more
                    continue
                if state is not None:
                    print_extent(start, length, state)
                start, length, state = start + length, more, said
        if state is not None:
            print_extent(start, length, state)
        print_extent.end()

    ask(uri, question)


class _Lines:
    """Columns: offset, length, type, what it means."""

    def __init__(self, context: str, emit: Emit) -> None:
        self._context = context
        self._emit = emit

    def begin(self) -> None:
        """Before the first extent."""

    def __call__(self, offset: int, length: int, state: int) -> None:
        meaning = describe(self._context, state)
        self._emit(f"{offset:10}  {length:10}  {state:3}" + (f"  {meaning}" if meaning else ""))

    def end(self) -> None:
        """After the last one."""


class _JsonList(_Lines):
    """A list of objects, one a line. The last one is kept until it is known to be it."""

    _kept = ""

    def begin(self) -> None:
        self._emit("[")

    def __call__(self, offset: int, length: int, state: int) -> None:
        if self._kept:
            self._emit(f"{self._kept},")
        meaning = describe(self._context, state)
        end = f', "description": "{meaning}"' if meaning else ""
        self._kept = f'{{ "offset": {offset}, "length": {length}, "type": {state}{end} }}'

    def end(self) -> None:
        if self._kept:
            self._emit(self._kept)
        self._emit("]")


def total_export(uri: str, context: str, emit: Emit, *, as_json: bool) -> None:
    """The same summed up by type, as `nbdinfo --map --totals`. Context, Raises: as `map_export`."""
    totals: dict[int, int] = {}

    async def question(inspection: Inspection, export: str) -> ExportInfo:
        info, number = await inspection.choose(export, context)
        async for extents in inspection.statuses(info, number):
            for length, state in extents:
                totals[state] = totals.get(state, 0) + length
        return info

    size = ask(uri, question).size
    rows = [(total, 100 * total / size, state) for state, total in sorted(totals.items())]
    if as_json:
        emit("[")
    for index, (total, percent, state) in enumerate(rows):
        meaning = describe(context, state)
        if as_json:
            end = f', "description": "{meaning}"' if meaning else ""
            comma = "," if index < len(rows) - 1 else ""
            row = f'"size": {total}, "percent": {percent:g}, "type": {state}{end}'
            emit(f"{{ {row} }}{comma}")
        else:
            emit(f"{total:10} {percent:5.1f}% {state:3}" + (f" {meaning}" if meaning else ""))
    if as_json:
        emit("]")
