# SPDX-License-Identifier: Apache-2.0
"""The file below a qcow2 image: what the format needs of it beyond reads and writes.

- Its length as this image knows it. Nobody else changes it, so it is asked once.
- Growth in steps. Allocation moves the end of the file on; a file that grows with each cluster pays
  for its length with each write (with O_DIRECT, the host then makes each such write wait). So it
  is lengthened ahead of need, by an eighth, between a megabyte and 256: a hole, given back when
  the image is closed.
- Because it grows by holes, a cluster that was never handed out reads as zeroes (`zero_beyond`),
  and the first write to it need not fill it up.

Context: home thread of the node's AioContext. `cover` is called under the metadata mutex only.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import io_error
from blockemu.drivers.qcow2.layout import SECTOR, round_up
from blockemu.loop.sync import gather

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from typing import Any

    from blockemu.drivers.child import BdrvChild
    from blockemu.loop.host_file import HostFile

log = logging.getLogger(__name__)

GROWTH_MIN = 1024 * 1024
GROWTH_MAX = 256 * 1024 * 1024
GROWTH_DIVISOR = 8

WRITES_AT_ONCE = 16
"""Metadata writes in flight together: enough to keep a disk busy."""


class ImageFile:
    """The "file" child, as the parts of the qcow2 driver use it."""

    def __init__(self, child: BdrvChild, *, cluster_size: int, name: str) -> None:
        self.child = child
        self.name = name
        self.cluster_size = cluster_size
        self.length = child.length_bytes
        driver = child.node.driver
        self.host_file: HostFile | None = driver.host_file
        self._fixed = self.host_file is not None and self.host_file.is_block_device
        self.granule = max(SECTOR, driver.request_alignment)
        """Unit of metadata writes: whole sectors, and nothing the node below must read first."""
        self._grows_by_writes = driver.is_protocol and not self._fixed
        self.sparse = self._grows_by_writes
        """Bytes beyond all that was ever written read as zeroes."""
        self._grown = False

    # `read` and `write` hand on the child's coroutine: one frame less for each request.

    def read(self, offset: int, view: memoryview) -> Coroutine[Any, Any, None]:
        """Fill `view`; what lies past the end of the file is zeroes. Raises: OSError."""
        if offset + len(view) <= self.length:
            return self.child.preadv(offset, view)
        return self._read_past_end(offset, view)

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill `view` if that needs no waiting, else False: use `read`. Suspends: never."""
        if self.host_file is None or offset + len(view) > self.length:
            return False
        return self.host_file.try_read(offset, view)

    async def _read_past_end(self, offset: int, view: memoryview) -> None:
        inside = max(self.length - offset, 0)
        if inside:
            await self.child.preadv(offset, view[:inside])
        view[inside:] = bytes(len(view) - inside)

    def write(self, offset: int, data: memoryview | bytes) -> Coroutine[Any, Any, None]:
        """Write inside the file as it is now (see `cover`), or in its last cluster, which may be
        cut short in an image that somebody else made. Raises: OSError."""
        if offset + len(data) > self.length and self._grows_by_writes:
            self.length = offset + len(data)  # should it fail, these bytes still read as zeroes
        return self.child.pwritev(offset, memoryview(data))

    async def write_all(self, writes: Sequence[tuple[int, bytes]]) -> None:
        """Many writes whose order doesn't matter. Raises: the first one's OSError, after all."""
        if len(writes) == 1:
            await self.write(*writes[0])
            return
        for start in range(0, len(writes), WRITES_AT_ONCE):
            batch = writes[start : start + WRITES_AT_ONCE]
            await gather(*(self.write(offset, data) for offset, data in batch))

    async def zero(self, offset: int, length: int) -> None:
        """Make bytes inside the file read as zeroes."""
        await self.child.pwrite_zeroes(offset, length, RequestFlags.NONE)

    async def discard(self, offset: int, length: int) -> None:
        """Give the host its space back, if it wants it: a hint, whose failure is of no interest."""
        try:
            await self.child.pdiscard(offset, min(length, self.length - offset))
        except OSError as error:
            log.debug("%s: discard of %d+%d: %s", self.name, offset, length, error)

    async def flush(self) -> None:
        await self.child.flush()

    async def cover(self, end: int) -> None:
        """Make the file at least `end` bytes long.

        Raises: OSError (ENOSPC on a device of fixed length, EFBIG).
        """
        if end <= self.length:
            return
        if self._fixed:
            raise io_error(errno.ENOSPC, f"{self.name}: {end} bytes don't fit on the device")
        ahead = min(max(self.length // GROWTH_DIVISOR, GROWTH_MIN), GROWTH_MAX)
        target = round_up(end + ahead, self.cluster_size)
        try:
            await self.child.truncate(target)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            if not self.child.node.driver.is_protocol:
                raise io_error(errno.ENOSPC, f"{self.name}: the file can't grow") from error
            # No resizing: the file grows by being written, so its tail can't be left a hole.
            self.sparse = False
            target = end
        else:
            self._grown = True
        self.length = max(self.length, target)

    async def trim(self, end: int) -> None:
        """Give back what was grown ahead, now that everything in use ends at `end`."""
        if self._grown and end < self.length:
            await self.child.truncate(end)
            self.length = end
            self._grown = False
