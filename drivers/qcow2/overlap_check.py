# SPDX-License-Identifier: Apache-2.0
"""Before something is written: does metadata lie there?

An L2 entry, an L1 entry, a refcount that is wrong (a damaged image, one that a crashed program left
behind) can send a write over the header or a table, and that is the end of the image. So each kind
of write has its check, before anything is written:

    guest data                    GuestData.write, one bisection
    ... past us, by a direct map  when a page is published: one over metadata isn't writable
    a cluster that is taken       Refcounts.allocate: it isn't counted as free, whatever it says
    a cluster that is let go      Refcounts.release: it isn't counted down
    an L2 table, a refcount block before the first entry in it is changed: is something else there?
    the L1, the refcount table    before an entry is changed

What clashes is damage: the request ends with EIO, the image is marked corrupt and written no more
(corrupt_mark.py), and one line in the log says which structure lies where.

**A page that is published and then becomes a table's place** would let writes past all of this. It
takes a cluster that an L2 entry names and that counts as free. A cluster that was never used can't
be one: only what lies before the end of all that was ever in use is published. For any other
cluster that is to hold a table, the map is searched (`take_place`), some milliseconds for a full
one; what is found there is damage, too. (An entry that is met later, when the table is there, meets
the other checks.)

Context: home thread of the AioContext.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockemu.drivers.qcow2.metadata_places import MetadataPlaces, Structure

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.corrupt_mark import CorruptMark
    from blockemu.drivers.qcow2.damage import DamageLog

BY_L2_ENTRY = "is named by an L2 entry"
AS_FREE = "is counted as free"


class OverlapCheck:
    """One image's. Everything that doesn't suspend is meant for the hot path."""

    def __init__(
        self, places: MetadataPlaces, *, cluster_bits: int, damage: DamageLog, mark: CorruptMark
    ) -> None:
        self.places = places
        self.is_clear = places.is_clear
        """Whether a host range (offset, bytes) is free of metadata; else `refuse` decides."""
        self.is_mapped: Callable[[int, int], bool] = lambda host, length: False
        """Whether a direct map leads into a host range."""
        self._bits = cluster_bits
        self._damage = damage
        self._mark = mark

    async def refuse_bytes(self, host: int, length: int) -> None:
        """Guest data is about to be written where `is_clear` says that metadata may be.

        Suspends: to mark the image. Raises: OSError(EIO), if it is so.
        """
        first = host >> self._bits
        await self.refuse(first, ((host + length - 1) >> self._bits) - first + 1, BY_L2_ENTRY)

    async def refuse(self, first: int, clusters: int, claim: str) -> None:
        """Clusters are about to be used for something else than a table of ours.

        Suspends: only to mark the image. Raises: OSError(EIO), if metadata lies there.
        """
        places = self.places
        if places.first_in(first, clusters) is None:
            return
        places.forget()  # as it is now: the mark can't be taken back
        found = places.first_in(first, clusters)
        if found is None:
            return
        await self._found(found, places.kind_of(found), claim)

    async def refuse_table(self, kind: Structure, cluster: int) -> None:
        """Something in a table of this kind is about to be changed.

        Suspends: only to mark the image. Raises: OSError(EIO), if something else lies there, too.
        """
        if self.places.is_only(kind, cluster):
            return
        self.places.forget()
        other = self.places.kind_of(cluster, besides=kind)
        if other is not None:
            await self._found(cluster, other, f"is taken for the {kind.value}")

    async def take_place(self, cluster: int) -> None:
        """A cluster that was in use at some time, and counted as free, is to hold a table.

        Suspends: only to mark the image. Raises: OSError(EIO), if a guest cluster is there.
        """
        host = cluster << self._bits
        if self.is_mapped(host, 1 << self._bits):
            error = self._damage.report(
                f"host cluster {cluster} at offset {host:#x} holds data of the guest but {AS_FREE}"
            )
            await self._mark.set()
            raise error

    async def _found(self, cluster: int, kind: Structure | None, claim: str) -> None:
        what = kind.value if kind is not None else "metadata"
        error = self._damage.report(
            f"host cluster {cluster} at offset {cluster << self._bits:#x} holds the {what}"
            f" but {claim}"
        )
        await self._mark.set()
        raise error
