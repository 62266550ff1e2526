# SPDX-License-Identifier: Apache-2.0
"""`img snapshot`: the internal snapshots of one image, listed or changed.

The image is opened alone, never with its backing file: snapshots don't touch that, and a format
that was only guessed does no harm here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from blockemu.drivers.errors import ImageError
from blockemu.drivers.registry import Opener
from blockemu.img.info import open_layer
from blockemu.img.session import run_session
from blockemu.loop.host_file import FileEngine

if TYPE_CHECKING:
    from blockemu.drivers.driver import BlockDriver

Change = Callable[["BlockDriver"], Awaitable[None]]


def list_snapshots(
    path: str, *, fmt: str | None = None, force_share: bool = False, files: FileEngine | None = None
) -> list[dict[str, Any]]:
    """SnapshotInfo of each, under QEMU's names; nothing for formats that have none.

    `force_share`: also when another process writes to it. Context, and what an
    interrupt does: as `run_session`. Raises: ImageError.
    """

    async def work(opener: Opener) -> list[dict[str, Any]]:
        node = await open_layer(opener, path, fmt=fmt, read_only=True, force_share=force_share)
        try:
            found: list[dict[str, Any]] = node.driver.info().get("snapshots", [])
            return found
        finally:
            await node.close()

    return run_session(work, files=files)


def create_snapshot(
    path: str, name: str, *, fmt: str | None = None, files: FileEngine | None = None
) -> None:
    """Keep the disk as it is now. Context, Raises: as `list_snapshots`."""
    _change(path, lambda driver: driver.snapshot_create(name), fmt, files)


def apply_snapshot(
    path: str, id_or_name: str, *, fmt: str | None = None, files: FileEngine | None = None
) -> None:
    """Make the disk what it was. Context, Raises: as `list_snapshots`."""
    _change(path, lambda driver: driver.snapshot_apply(id_or_name), fmt, files)


def delete_snapshot(
    path: str, name_or_id: str, *, fmt: str | None = None, files: FileEngine | None = None
) -> None:
    """Delete a snapshot. Context, Raises: as `list_snapshots`."""
    _change(path, lambda driver: driver.snapshot_delete(name_or_id), fmt, files)


def _change(path: str, change: Change, fmt: str | None, files: FileEngine | None) -> None:
    async def work(opener: Opener) -> None:
        node = await open_layer(opener, path, fmt=fmt, read_only=False)
        try:
            await change(node.driver)
            await node.flush()
        except OSError as error:
            raise ImageError.from_os_error(path, error) from error
        finally:
            await node.close()

    run_session(work, files=files)
