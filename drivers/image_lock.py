# SPDX-License-Identifier: Apache-2.0
"""Image locking: what this process does with an image, said where QEMU's programs look for it.

Two groups of bytes of the image file, far behind each other's permissions, carry shared
open-file-description locks and nothing else: byte 100 + bit for each permission in use, byte
200 + bit for each permission *not* granted to others (bit numbers: child.Permission). Everybody
first takes the locks, then looks for a clash: a permission that I use and somebody denies, or one
that I deny and somebody uses. So two programs that start at once may both step back, but can't
both go on.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from blockemu.drivers.child import Permission
from blockemu.drivers.errors import ImageError

if TYPE_CHECKING:
    from blockemu.loop.host_file import HostFile

USED_BASE = 100
DENIED_BASE = 200

_log = logging.getLogger(__name__)

_WORDS = {
    Permission.CONSISTENT_READ: "consistent read",
    Permission.WRITE: "write",
    Permission.WRITE_UNCHANGED: "write unchanged",
    Permission.RESIZE: "resize",
}


class ImageLock:
    """The locks of one open host file. Context: any one thread at a time."""

    def __init__(self, file: HostFile) -> None:
        self._file = file
        self._held: set[int] = set()
        self._supported = True

    def update(self, perm: Permission, shared: Permission) -> None:
        """Hold the locks for `perm` and against everything outside `shared`.

        Raises: ImageError, when another process (or another open of this one) is in the way; what
        was held before is then held still.
        """
        if not self._supported:
            return
        wanted = _positions(perm, shared)
        added = wanted - self._held
        try:
            self._lock(added)
            if added:
                self._refuse_clash(perm, shared)
        except BaseException:
            self._unlock(added & self._held)
            raise
        self._unlock(self._held - wanted)

    def _lock(self, positions: set[int]) -> None:
        for position in sorted(positions):
            try:
                self._file.lock_byte(position)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise ImageError(self._file.path, "is locked by another program") from None
                # A filesystem without locks: QEMU's locking=auto goes on, too, and so do we.
                _log.warning("%s: no image locking: %s", self._file.path, error.strerror)
                self._supported = False
                return
            self._held.add(position)

    def _refuse_clash(self, perm: Permission, shared: Permission) -> None:
        for bit, permission in enumerate(_WORDS):
            if permission & perm and self._file.byte_is_locked(DENIED_BASE + bit, exclusive=True):
                raise self._in_use(f"lets nobody else have '{_WORDS[permission]}' access")
            if not permission & shared and self._file.byte_is_locked(
                USED_BASE + bit, exclusive=True
            ):
                raise self._in_use(f"has '{_WORDS[permission]}' access")

    def _in_use(self, how: str) -> ImageError:
        return ImageError(self._file.path, f"is in use by another process, which {how}")

    def _unlock(self, positions: set[int]) -> None:
        for position in positions:
            self._file.unlock_byte(position)
            self._held.discard(position)


def _positions(perm: Permission, shared: Permission) -> set[int]:
    used = {USED_BASE + bit for bit, permission in enumerate(_WORDS) if permission & perm}
    denied = {DENIED_BASE + bit for bit, permission in enumerate(_WORDS) if not permission & shared}
    return used | denied
