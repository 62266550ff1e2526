# SPDX-License-Identifier: Apache-2.0
"""The corrupt mark: an image whose metadata contradicts itself is written to no more.

It is set when space turns out to be two things at once, a table and something else
(metadata_places.py). Nothing is ruined yet then, and nothing shall be: who repairs the image later
wants to find it as it was. In this order:

1. New writes are refused, and the direct map is dropped, which would let writes past us.
2. What was written before is brought to the disk: its places were in use all along.
3. The metadata writer stops.
4. The header's incompatible feature bit 1 (specification: Header) is set and made durable, so that
   no program opens the image for writing again but to repair it. Version 2 has no such bit.

Reads go on. A flush succeeds if nothing is left to be written.

Context: home thread of the AioContext.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from blockemu.loop.coroutine import settled
from blockemu.loop.current import running_context

if TYPE_CHECKING:
    from blockemu.drivers.qcow2.header_file import HeaderFile
    from blockemu.drivers.qcow2.metadata_writer import MetadataWriter

log = logging.getLogger(__name__)


async def _nobody() -> None:
    return


class CorruptMark:
    """One image's. `refuse_writes` keeps the node's users from writing; the driver says how."""

    def __init__(self, name: str, *, header: HeaderFile, writer: MetadataWriter) -> None:
        self.refuse_writes: Callable[[], Coroutine[Any, Any, None]] = _nobody
        self.is_set = False
        """Set, or being set: no space may be taken or given back."""
        self.is_done = False
        """Everything on the list above is done, as far as the host let us."""
        self._name = name
        self._header = header
        self._writer = writer

    async def set(self) -> None:
        """Set the mark, once. Raises: nothing; what the host refuses is logged.

        Suspends: until all is done, or at once if somebody else is at it. It goes on if the caller
        is cancelled.
        """
        if self.is_set:
            return
        self.is_set = True
        log.error(
            "%s: is read-only from now on, since its metadata is damaged; "
            "repair it with: blockemu img check -r all %s", self._name, self._name,
        )  # fmt: skip
        await settled(running_context().spawn(self._set(), name="corrupt mark"))

    async def _set(self) -> None:
        await self.refuse_writes()
        try:
            await self._writer.flush()
        except OSError as error:
            log.error("%s: the last writes aren't all on the disk: %s", self._name, error)
        self._writer.stop("its metadata is damaged, and no longer written")
        try:
            await self._header.mark_corrupt()
        except OSError as error:
            log.error("%s: couldn't be marked as corrupt: %s", self._name, error)
        self.is_done = True
