# SPDX-License-Identifier: Apache-2.0
"""Exports: which backend is offered to clients, under which name, and how.

Several exports may have backends on one node: each has its own name, rights and figures, and a
drained section on the node quiets them all.

An export has two homes. Its fields, its place in the table and the count of its clients belong to
the main thread. Its set of connections belongs to the home thread of `backend.ctx`, where they run;
`quiet` too, which says that a drained section runs on the backend: connections then begin no
request until it ends. (Their sockets are external handlers and silent anyway, but a connection may
have parsed requests left, or wait for room in flight.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockemu.drivers.nbd.protocol import TransmissionFlag
from blockemu.loop.sync import Mutex
from blockemu.nbd.statistics import ExportStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.dirty_bitmap import DirtyBitmap
    from blockemu.nbd.connection import BaseConnection


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """What an export is to be, besides its node."""

    name: str
    """What clients ask for; UTF-8."""
    id: str | None = None
    """What QMP calls it; None: as its name."""
    writable: bool = True
    description: str = ""
    hidden: bool = False
    """Not in what LIST tells; who knows the name gets in."""
    connections_max: int | None = None
    """Clients at once; None: as many as the daemon's limit for each export."""
    rotational: bool | None = None
    """Whether clients are told that seeks are slow; None: what the host says of its device."""
    resizable: bool = False
    """Clients may change the size (NBD_CMD_RESIZE)."""
    multi_conn: bool = True
    """Clients are told that they may come by several connections, where that is right."""
    write_through: bool = False
    """What is written is on stable storage before it is acknowledged."""
    bitmaps: tuple[str, ...] = ()
    """Dirty bitmaps of the node or its backing chain that clients may ask about."""
    allocation_depth: bool = False
    """Clients may ask in which layer of the backing chain bytes are."""


class Export:
    """One backend under one name."""

    __slots__ = (
        "allocation_depth",
        "backend",
        "bitmaps",
        "clients",
        "connections",
        "connections_max",
        "description",
        "hidden",
        "id",
        "multi_conn",
        "name",
        "quiet",
        "read_only",
        "resizable",
        "rotational",
        "shutting_down",
        "statistics",
        "status_turn",
    )

    def __init__(
        self,
        name: str,
        backend: BlockBackend,
        *,
        id: str | None = None,
        read_only: bool = False,
        description: str = "",
        multi_conn: bool = True,
        hidden: bool = False,
        connections_max: int | None = None,
        rotational: bool = False,
        resizable: bool = False,
    ) -> None:
        """`multi_conn`: all connections see one cache, and a flush on one covers all. True for any
        single backend in one daemon, since there is only one cache and it is the host's or the
        node's; unless the node is itself a client of a server that doesn't say so
        (export_traits.py).

        Context: home thread of `backend.ctx`, or main while nothing runs there.
        """
        self.name = name
        self.id = name if id is None else id
        self.backend = backend
        self.read_only = read_only or not backend.writable
        self.description = description
        self.multi_conn = multi_conn
        self.hidden = hidden
        self.connections_max = connections_max
        self.rotational = rotational
        self.resizable = resizable and not self.read_only
        self.shutting_down = False
        """It was removed: nobody gets in any more."""
        self.clients = 0
        """Clients that have chosen it, from their choice until nothing is left of them."""
        self.bitmaps: tuple[DirtyBitmap, ...] = ()
        """Dirty bitmaps that clients may ask about. Set by nbd/export_contexts.py, before clients
        come, as is `allocation_depth`."""
        self.allocation_depth = False
        """Clients may ask in which layer of the chain bytes are."""
        self.status_turn = Mutex()
        """Held by the one BLOCK_STATUS request that is looking at the graph."""
        self.connections: set[BaseConnection] = set()
        self.quiet = False
        self.statistics = ExportStatistics()
        backend.set_dev_ops(self._drained_begin, self._drained_end)

    @property
    def transmission_flags(self) -> TransmissionFlag:
        """What a client of this export may ask of it. Context: main."""
        flag = TransmissionFlag
        flags = flag.NBD_FLAG_HAS_FLAGS | flag.NBD_FLAG_SEND_FLUSH | flag.NBD_FLAG_SEND_FUA
        flags |= flag.NBD_FLAG_SEND_CACHE
        if self.read_only:
            flags |= flag.NBD_FLAG_READ_ONLY
        else:
            flags |= flag.NBD_FLAG_SEND_TRIM | flag.NBD_FLAG_SEND_WRITE_ZEROES
            flags |= flag.NBD_FLAG_SEND_FAST_ZERO
        if self.multi_conn:
            flags |= flag.NBD_FLAG_CAN_MULTI_CONN
        if self.rotational:
            flags |= flag.NBD_FLAG_ROTATIONAL
        if self.resizable:
            flags |= flag.NBD_FLAG_SEND_RESIZE
        return flags

    def refusal(self, connections_max: int) -> str | None:
        """Why one more client can't come in now, as a text for it, or None. `connections_max`
        is for exports that have no bound of their own. Context: main."""
        if self.shutting_down:
            return f"export '{self.name[:64]}' is being removed"
        bound = connections_max if self.connections_max is None else self.connections_max
        if self.clients >= bound:
            clients = "1 client" if bound == 1 else f"{bound} clients"
            return f"export '{self.name[:64]}' has all its {clients} already; try again later"
        return None

    def _drained_begin(self) -> None:
        """Context: home thread of `backend.ctx`."""
        self.quiet = True
        for connection in self.connections:
            connection.pause()

    def _drained_end(self) -> None:
        """Context: home thread of `backend.ctx`."""
        self.quiet = False
        for connection in self.connections:
            connection.resume()


class ExportTable:
    """The exports of a daemon, by name, in the order in which they were added.

    Clients who name none get the one named `default_name`, or the first that isn't hidden.
    Context: main.
    """

    def __init__(self, *, default_name: str | None = None) -> None:
        self.default_name = default_name
        self._offered: dict[str, Export] = {}
        self._leaving: dict[str, Export] = {}

    def add(self, export: Export) -> None:
        """Offer `export`. Raises: ValueError when its name or its id is taken."""
        if export.name in self._offered:
            raise ValueError(f"export {export.name!r} exists already")
        if self.by_id(export.id) is not None:
            raise ValueError(f"an export with id {export.id!r} exists already")
        self._offered[export.name] = export

    def remove(self, name: str) -> Export:
        """Offer it no more; connections that it has go on. Raises: KeyError."""
        return self._offered.pop(name)

    def begin_to_remove(self, export: Export) -> None:
        """Offer it no more, but know it by its id until `forget`. Its name is free at once."""
        assert not export.shutting_down
        export.shutting_down = True
        del self._offered[export.name]
        self._leaving[export.id] = export

    def forget(self, export: Export) -> None:
        """Nothing is left of it."""
        del self._leaving[export.id]

    def get(self, name: str) -> Export | None:
        """The export of this name; "" is the default export unless one has that very name."""
        found = self._offered.get(name)
        if found is not None or name:
            return found
        if self.default_name is not None:
            return self._offered.get(self.default_name)
        return next((export for export in self._offered.values() if not export.hidden), None)

    def has(self, name: str) -> bool:
        """Whether one has this very name."""
        return name in self._offered

    def by_id(self, id: str) -> Export | None:
        """The export that QMP calls so; also one that is being removed."""
        for export in self.with_leaving():
            if export.id == id:
                return export
        return None

    def list(self) -> list[Export]:
        """All exports that are offered, in their order."""
        return [*self._offered.values()]

    def with_leaving(self) -> tuple[Export, ...]:
        """Those and the ones that are being removed."""
        return (*self._offered.values(), *self._leaving.values())

    def __iter__(self) -> Iterator[Export]:
        return iter(self.list())

    def __len__(self) -> int:
        return len(self._offered)
