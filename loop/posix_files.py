# SPDX-License-Identifier: Apache-2.0
"""The engine for real files: which class serves which file.

| asked for | file on | served by |
|---|---|---|
| page cache | tmpfs, ramfs | MemoryFilesystemFile: everything on the spot |
| page cache | anything else | PageCacheFile: reads on the spot where cached, else workers |
| page cache, `bulk` | anything | BulkFile: reads the same, writes by one worker |
| direct, native | anything | DirectFile by Linux AIO, or workers in a context without it |
| direct, threads | anything | DirectFile by workers |

Through the page cache `aio` makes no difference: Linux AIO would block there, and what is done on
the spot is never slower than a worker.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from blockemu.loop.bulk_file import BulkFile
from blockemu.loop.direct_alignment import NO_DIRECT
from blockemu.loop.direct_file import DirectFile
from blockemu.loop.file_engine import HostFile
from blockemu.loop.page_cache_file import (
    MemoryFilesystemFile,
    PageCacheFile,
    is_memory_filesystem,
)


class PosixFiles:
    """FileEngine for regular files and block devices."""

    def __init__(self, *, inline: bool = True, bulk: bool = False) -> None:
        """`bulk`: for a program that copies and does nothing else (bulk_file.py). `inline=False`
        sends all page-cache I/O to workers (for comparison, and for tests)."""
        self._inline = inline
        self._bulk = bulk

    def open(
        self, path: str, *, read_only: bool, direct: bool, aio: str, create: bool = False
    ) -> HostFile:
        """See FileEngine.open. `create` makes a file that isn't there, and empties none that is.

        Raises: OSError with the file's name.
        """
        assert aio in ("native", "threads")
        fd = _open_file(path, read_only=read_only, direct=direct, create=create)
        try:
            if direct:
                native = aio == "native"
                return DirectFile(fd, path, read_only=read_only, native=native)
            if self._bulk:
                in_memory = is_memory_filesystem(fd)
                return BulkFile(fd, path, read_only=read_only, in_memory=in_memory)
            if self._inline and is_memory_filesystem(fd):
                return MemoryFilesystemFile(fd, path, read_only=read_only)
            return PageCacheFile(fd, path, read_only=read_only, inline=self._inline)
        except OSError as error:
            os.close(fd)
            raise OSError(error.errno, error.strerror, path) from error
        except BaseException:
            os.close(fd)
            raise


def _open_file(path: str, *, read_only: bool, direct: bool, create: bool) -> int:
    # O_NONBLOCK: a FIFO must be refused, not waited for.
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    flags |= os.O_RDONLY if read_only else os.O_RDWR
    flags |= os.O_DIRECT if direct else 0
    flags |= os.O_CREAT if create else 0
    try:
        fd = os.open(path, flags, 0o644)
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            raise OSError(errno.EINVAL, NO_DIRECT, path) from error
        raise
    try:
        _refuse_unless_disk(fd, path)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_unless_disk(fd: int, path: str) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise OSError(errno.ENOTSUP, "not a regular file or block device", path)
