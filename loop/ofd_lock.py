# SPDX-License-Identifier: Apache-2.0
"""Locks on single bytes of a file, owned by the open file description.

Classic POSIX locks belong to the process and vanish when any descriptor of the file is closed,
which makes them useless to a program that may open one image twice. Open-file-description locks
(Linux 3.15) belong to what open() made: two opens in one process exclude each other, and closing
another descriptor changes nothing. Other programs' POSIX locks on the same bytes count all the
same.

Layout: `struct flock` for F_OFD_*: type, whence, start, length, pid (must be 0).
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

_FLOCK: Final = struct.Struct("@hhqqi4x")


def _flock(kind: int, position: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, position, 1, 0)


def lock_byte(fd: int, position: int, *, exclusive: bool) -> None:
    """Takes a shared or an exclusive lock, or changes one into the other. Never waits.

    Raises: OSError, EAGAIN or EACCES where another open file holds a lock in conflict, EBADF for an
    exclusive lock through a read-only descriptor, ENOLCK or EINVAL where locks aren't supported.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(kind, position))


def unlock_byte(fd: int, position: int) -> None:
    """Gives a lock back; nothing happens where none is held."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, position))


def byte_is_locked(fd: int, position: int, *, exclusive: bool) -> bool:
    """Whether another open file's lock stands in the way of a lock of this kind."""
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(kind, position))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
