# SPDX-License-Identifier: Apache-2.0
"""Files past the page cache, O_DIRECT: by Linux AIO, or by worker threads.

Offsets, lengths and memory are aligned as direct_alignment.py found out. A file whose length isn't
a multiple of that is read to its last byte all the same (the read comes back short); its last bytes
are written through a second, buffered descriptor. The kernel keeps the two views of the file
together: a direct read writes dirty pages back first, a direct write drops clean ones.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from blockemu.loop.buffers import address_of
from blockemu.loop.direct_alignment import probe_direct_alignment
from blockemu.loop.file_engine import Done, NativeIo, NativeKind
from blockemu.loop.linux_aio import IO_CMD_PREAD, IO_CMD_PWRITE
from blockemu.loop.posix_file import PosixFile

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext
    from blockemu.loop.linux_aio import LinuxAio

# Results that say "not now, not like this": a worker does the request again and may wait.
_TRY_AGAIN: Final = frozenset({-errno.EAGAIN, -errno.EINTR})


class DirectFile(PosixFile):
    """An O_DIRECT descriptor; `native` for Linux AIO where the context has it."""

    def __init__(self, fd: int, path: str, *, read_only: bool, native: bool) -> None:
        super().__init__(fd, path, read_only=read_only, direct=True)
        self.request_alignment, self.memory_alignment = probe_direct_alignment(
            fd, is_block_device=self.is_block_device
        )
        self._mask = self.request_alignment - 1
        self._memory_mask = self.memory_alignment - 1
        self._native = native
        self._aio: LinuxAio | None = None
        self._aio_sought = not native
        # Opened now and not when it is needed: by then we may lack the right to. Devices have no
        # ragged end, and closing a second descriptor of one would send udev looking at it.
        has_tail = not (read_only or self.is_block_device)
        self._tail_fd = _open_buffered(fd) if has_tail else -1

    def native_io(self) -> NativeIo | None:
        if not self._native:
            return None
        durable = not self._flushes.sticky
        return NativeIo(self._fd, NativeKind.AIO, self.memory_alignment, durable=durable)

    def attach(self, ctx: AioContext) -> None:
        super().attach(ctx)
        # Found at the first request: only ctx's home thread may make its Linux AIO.
        self._aio = None
        self._aio_sought = not self._native

    def detach(self) -> None:
        super().detach()
        self._aio = None

    def start_read(self, offset: int, view: memoryview, done: Done, address: int = 0) -> int | None:
        length = len(view)
        assert not (offset | length) & self._mask, f"{self.path}: unaligned read"
        aio = self._aio or self._find_aio()
        if aio is None:
            self._read_in_worker(offset, view, 0, done)
            return None
        address = address or address_of(view)
        assert not address & self._memory_mask, f"{self.path}: read into unaligned memory"
        aio.queue(IO_CMD_PREAD, self._fd, address, length, offset, done, view, self._read_short)
        return None

    def start_write(
        self, offset: int, view: memoryview, done: Done, address: int = 0
    ) -> int | None:
        length = len(view)
        assert not (offset | length) & self._mask, f"{self.path}: unaligned write"
        aio = self._aio or self._find_aio()
        if aio is None:
            self._write_in_worker(offset, view, 0, done)
            return None
        address = address or address_of(view)
        assert not address & self._memory_mask, f"{self.path}: write from unaligned memory"
        aio.queue(IO_CMD_PWRITE, self._fd, address, length, offset, done, view, self._write_short)
        return None

    def close(self) -> None:
        super().close()
        if self._tail_fd >= 0:
            fd, self._tail_fd = self._tail_fd, -1
            os.close(fd)

    def _find_aio(self) -> LinuxAio | None:
        if not self._aio_sought:
            self._aio_sought = True
            self._aio = self.ctx.linux_aio
        return self._aio

    def _buffered_fd(self) -> int:
        return self._tail_fd if self._tail_fd >= 0 else self._fd

    def _read_short(self, offset: int, view: memoryview, result: int, done: Done) -> None:
        if result in _TRY_AGAIN:
            self._read_in_worker(offset, view, 0, done)
        elif result <= 0 or result & self._mask:
            done(result)  # an error, or the end of the file
        else:
            self._read_in_worker(offset, view, result, done)

    def _write_short(self, offset: int, view: memoryview, result: int, done: Done) -> None:
        if result in _TRY_AGAIN:
            self._write_in_worker(offset, view, 0, done)
        elif result < 0:
            done(result)
        else:
            # A worker writes the rest from the last whole block on, and meets the error, if any.
            self._write_in_worker(offset, view, result & ~self._mask, done)


def _open_buffered(fd: int) -> int:
    """A second descriptor of the same file, by its number and not its name, without O_DIRECT."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
