# SPDX-License-Identifier: Apache-2.0
"""Where the guest's own bytes go: the one door between them and host clusters.

GuestReader, GuestWriter and the direct map reach data clusters through here, and metadata never
does. So what concerns the guest's bytes alone has one place: which file they lie in, and what form
they have there.

Context: home thread of the node's AioContext.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from blockemu.drivers.node import BlockDriverState
    from blockemu.drivers.qcow2.image_file import ImageFile
    from blockemu.drivers.qcow2.overlap_check import OverlapCheck
    from blockemu.loop.host_file import HostFile


class GuestData:
    """The guest's bytes lie in `file`, as the guest sees them.

    `guest`: the guest offset of the first byte of a transfer. `overlaps` checks what is written;
    None where no metadata lies in the file.
    """

    keeps_zeroes = True
    """Zeroes in the file, and so its holes, are zeroes to the guest."""

    def __init__(self, file: ImageFile, overlaps: OverlapCheck | None = None) -> None:
        self.file = file
        self._overlaps = overlaps
        self._is_clear = _always_clear if overlaps is None else overlaps.is_clear
        self.granule = file.granule
        """Unit of writes that the node below carries out without reading first."""

    # `read` and `write` hand on the child's coroutine: one frame less for each request.

    def read(self, host: int, view: memoryview, guest: int) -> Coroutine[Any, Any, None]:
        """Fill `view` from host offset `host`. Raises: OSError."""
        return self.file.read(host, view)

    def write(self, host: int, view: memoryview, guest: int) -> Coroutine[Any, Any, None]:
        """Write `view` to host offset `host`, inside clusters that are taken.

        Raises: OSError (EIO, and the image is marked corrupt, if metadata lies there).
        """
        if self._is_clear(host, len(view)):
            return self.file.write(host, view)
        return self._write_checked(host, view)

    async def _write_checked(self, host: int, view: memoryview) -> None:
        assert self._overlaps is not None
        await self._overlaps.refuse_bytes(host, len(view))
        await self.file.write(host, view)

    def takes_writes(self, host: int, length: int) -> bool:
        """Whether a direct map may lead writes to these bytes."""
        return self._is_clear(host, length)

    async def cover(self, end: int) -> None:
        """Make the file at least `end` bytes long. Under the metadata mutex. Raises: OSError."""
        await self.file.cover(end)

    @property
    def length(self) -> int:
        """Of the file, in bytes."""
        return self.file.length

    @property
    def mapped_file(self) -> HostFile | None:
        """What a direct map may point into; None where the bytes aren't the guest's as they lie."""
        return self.file.host_file

    @property
    def node(self) -> BlockDriverState:
        """The node whose file that is."""
        return self.file.child.node


def _always_clear(host: int, length: int) -> bool:
    return True
