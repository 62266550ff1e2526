# SPDX-License-Identifier: Apache-2.0
"""The amend job: another size, version or other options for a qcow2 image that is there.

In this order: the disk grows; zero clusters go, if the version goes down; the header is switched.
Each step leaves a right image, and the last one is atomic (drivers/qcow2/amend.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.amend import Amendment, replace_zeroes
from blockemu.drivers.qcow2.driver import Qcow2Driver
from blockemu.jobs.job import Job

if TYPE_CHECKING:
    from blockemu.drivers.backend import BlockBackend
    from blockemu.drivers.qcow2.image import Image

STEP_BYTES = 1 << 30
"""Looked through between two pause points."""


class AmendJob(Job):
    """Context: the image's. It neither opens nor closes it, but it has to be closed afterwards:
    what is in memory is of the old version.

    `image`: writable and resizable. `on_progress` is told (bytes that are done, bytes in all).
    """

    kind: ClassVar[str] = "amend"

    def __init__(
        self,
        job_id: str,
        image: BlockBackend,
        amendment: Amendment,
        *,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(job_id, ctx=image.ctx, **kwargs)
        self._backend = image
        self._amendment = amendment
        self._on_progress = on_progress

    async def work(self) -> None:
        """Raises: ImageError, that names the image."""
        name = self._backend.name
        driver = self._backend.node.driver
        if not isinstance(driver, Qcow2Driver):
            raise ImageError(name, f"format {driver.name} has nothing that can be amended")
        image = driver.image
        self._amendment.check(name, image.header)
        try:
            await self._amend(image)
        except OSError as error:
            raise ImageError.from_os_error(name, error) from error

    async def _amend(self, image: Image) -> None:
        amendment = self._amendment
        if amendment.size_bytes is not None:
            await self._backend.truncate(amendment.size_bytes)
        if amendment.version == 2 and image.header.version == 3:
            await self._replace_zeroes(image)
        await image.flush()
        new = amendment.apply(image.name, image.header)
        if new != image.header:
            await image.header_file.replace(new)

    async def _replace_zeroes(self, image: Image) -> None:
        """Also where a backing file is about to go: until the header says so, it shows through."""
        backing = image.header.backing_file or self._amendment.backing_in(image.header)
        total = self._backend.length_bytes
        self.add_work(total)
        offset = 0
        while offset < total:
            await self.pause_point()
            step = min(total - offset, STEP_BYTES)
            done = await replace_zeroes(image, offset, step, write=backing is not None)
            self.work_done(done)
            self._on_progress(self.progress_current, self.progress_total)
            offset += done
