# SPDX-License-Identifier: Apache-2.0
"""What O_DIRECT wants of offsets, lengths and memory on one open file.

Asked in this order: statx (Linux 6.1, not every filesystem), BLKSSZGET for block devices, and else
by trying: reads of the file's start in growing steps, the first that isn't EINVAL wins. A read of
one byte that succeeds proves nothing (an empty file, or a filesystem that doesn't mind), and then,
as when nothing else is known, 4096 is right everywhere. The idea of trying is as old as O_DIRECT;
QEMU does it, too.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from typing import Final

from blockemu.loop._libaio import ffi, lib
from blockemu.loop.blocking_io import BLKSSZGET

ALIGNMENT_MAX: Final = 4096
_STEPS: Final = (512, 1024, 2048, 4096)

NO_DIRECT: Final = "filesystem does not support O_DIRECT (cache.direct)"


def probe_direct_alignment(fd: int, *, is_block_device: bool) -> tuple[int, int]:
    """(alignment of offsets and lengths, alignment of memory) for a descriptor with O_DIRECT.

    Context: any thread; it may block for one read. Raises: OSError, EINVAL where no direct I/O
    works.
    """
    told = _ask_statx(fd)
    if told is not None:
        return told
    if is_block_device:
        request = _power_of_two(struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0])
        if request is not None:
            return request, max(request, 512)
    found = _try_reads(fd)
    return found, found


def _ask_statx(fd: int) -> tuple[int, int] | None:
    memory, request = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    if lib.file_direct_alignment(fd, memory, request) < 0:
        return None
    answer = _power_of_two(request[0]), _power_of_two(memory[0])
    if answer[0] is None or answer[1] is None:
        return None
    return answer[0], answer[1]


def _power_of_two(value: int) -> int | None:
    """The value, if it is an alignment that this program can work with (up to a page of 64 KiB)."""
    return value if 0 < value <= 1 << 16 and value & (value - 1) == 0 else None


def _try_reads(fd: int) -> int:
    with mmap.mmap(-1, ALIGNMENT_MAX) as memory, memoryview(memory) as view:
        if _read_works(fd, view[:1]):
            return ALIGNMENT_MAX
        for step in _STEPS:
            if _read_works(fd, view[:step]):
                return step
    raise OSError(errno.EINVAL, NO_DIRECT)


def _read_works(fd: int, view: memoryview) -> bool:
    try:
        os.preadv(fd, [view], 0)
    except OSError as error:
        # Any other error is the disk's, and says nothing about alignment.
        return error.errno != errno.EINVAL
    finally:
        view.release()
    return True
