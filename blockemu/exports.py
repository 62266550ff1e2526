# SPDX-License-Identifier: Apache-2.0
"""Exports: which backend is offered to clients, under which name, and how.

An export has two homes. Its fields and its place in the table belong to the main context. Its set
of connections belongs to the home thread of `backend.ctx`, where they run; `quiet` too, which says
that a drained section runs on the backend: connections then begin no request until it ends. (Their
sockets are external handlers and silent anyway, but a connection may have parsed requests left, or
wait for room in flight.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.drivers.nbd.protocol import TransmissionFlag
from blockemu.loop.sync import Mutex
from blockemu.nbd.statistics import ExportStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.dirty_bitmap import DirtyBitmap
    from blockemu.nbd.connection import BaseConnection


class Export:
    """One backend under one name."""

    __slots__ = (
        "allocation_depth",
        "backend",
        "bitmaps",
        "connections",
        "description",
        "multi_conn",
        "name",
        "quiet",
        "read_only",
        "statistics",
        "status_turn",
    )

    def __init__(
        self,
        name: str,
        backend: BlockBackend,
        *,
        read_only: bool = False,
        description: str = "",
        multi_conn: bool = True,
    ) -> None:
        """`multi_conn`: all connections see one cache, and a flush on one covers all. True for any
        single backend in one daemon, since there is only one cache and it is the host's or the
        node's."""
        self.name = name
        self.backend = backend
        self.read_only = read_only or not backend.writable
        self.description = description
        self.multi_conn = multi_conn
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
        return flags

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

    The first is the default: the one that a client gets who names none. Context: main.
    """

    def __init__(self) -> None:
        self._exports: dict[str, Export] = {}

    def add(self, export: Export) -> None:
        """Offer `export`. Raises: ValueError when its name is taken."""
        if export.name in self._exports:
            raise ValueError(f"export {export.name!r} exists already")
        self._exports[export.name] = export

    def remove(self, name: str) -> Export:
        """Offer it no more; connections that it has go on. Raises: KeyError."""
        return self._exports.pop(name)

    def get(self, name: str) -> Export | None:
        """The export of this name; "" is the default export unless one has that very name."""
        found = self._exports.get(name)
        if found is None and not name:
            found = next(iter(self._exports.values()), None)
        return found

    def list(self) -> list[Export]:
        """All exports, the default one first."""
        return [*self._exports.values()]

    def __iter__(self) -> Iterator[Export]:
        return iter(self.list())

    def __len__(self) -> int:
        return len(self._exports)
