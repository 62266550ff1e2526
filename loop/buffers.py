# SPDX-License-Identifier: Apache-2.0
"""Aligned memory for I/O, reused while it is still warm.

O_DIRECT wants memory that starts on a block boundary, which only a mapping gives in Python. A fresh
mapping costs a system call and a page fault for each 4 KiB, so buffers come back to a pool and go
out again last in, first out: the one that went out last is the one that the CPU's cache still
holds.

Classes are powers of two from a page to 32 MiB (the largest request of the NBD protocol's default).
A class is kept as a stack; what the stacks hold together is bounded, and a buffer that would go
over the bound is dropped, which unmaps it. A request over 32 MiB gets a mapping of its own length
and the pool never keeps it.

A slab with a free list would waste less on odd sizes; requests are powers of two nearly always, so
it would buy nothing here.
"""

from __future__ import annotations

import mmap
from typing import Final

from blockemu.loop._libaio import ffi

CLASS_BYTES_MIN: Final = 4096
CLASS_BYTES_MAX: Final = 32 << 20
# One context's idle memory: enough for a queue of 32 requests of 1 MiB twice over.
RETAINED_BYTES_MAX: Final = 64 << 20

_POINTER = ffi.typeof("uintptr_t")
_FIRST_CLASS: Final = CLASS_BYTES_MIN.bit_length() - 1
_CLASSES: Final = (CLASS_BYTES_MAX // CLASS_BYTES_MIN).bit_length()


def address_of(view: memoryview) -> int:
    """The address of the first byte of a view; good only while the caller keeps the view alive."""
    return int(ffi.cast(_POINTER, ffi.from_buffer(view)))


class Buffer:
    """Writable memory of at least the length asked for, 4 KiB aligned; its content is arbitrary.

    Use slices of `view`: a slice of known length costs 50 ns. `address` is that of `view[0]`.
    """

    __slots__ = ("address", "capacity", "view")

    def __init__(self, capacity: int) -> None:
        self.view = memoryview(mmap.mmap(-1, capacity))
        self.capacity = capacity
        self.address = address_of(self.view)
        assert self.address % CLASS_BYTES_MIN == 0


class BufferPool:
    """A stack of idle buffers for each power of two.

    Context: home thread of the AioContext that owns it, for all methods.
    """

    __slots__ = ("_idle", "retained_bytes", "retained_bytes_max")

    def __init__(self, *, retained_bytes_max: int = RETAINED_BYTES_MAX) -> None:
        self.retained_bytes_max = retained_bytes_max
        self.retained_bytes = 0
        self._idle: list[list[Buffer]] = [[] for _ in range(_CLASSES)]

    def take(self, length: int) -> Buffer:
        """A buffer of at least `length` bytes, yours until you give it back. Not zeroed."""
        assert length >= 0
        index = (length - 1).bit_length() - _FIRST_CLASS if length > CLASS_BYTES_MIN else 0
        if index >= _CLASSES:
            return Buffer(-(-length // CLASS_BYTES_MIN) * CLASS_BYTES_MIN)
        idle = self._idle[index]
        if idle:
            buffer = idle.pop()
            self.retained_bytes -= buffer.capacity
            return buffer
        return Buffer(CLASS_BYTES_MIN << index)

    def give(self, buffer: Buffer) -> None:
        """Takes a buffer back. Nobody may use it, or a slice of it, any more."""
        capacity = buffer.capacity
        if capacity > CLASS_BYTES_MAX or self.retained_bytes + capacity > self.retained_bytes_max:
            return  # dropped: the mapping goes with the last reference
        self.retained_bytes += capacity
        self._idle[capacity.bit_length() - 1 - _FIRST_CLASS].append(buffer)

    def clear(self) -> None:
        """Lets go of all idle buffers."""
        for idle in self._idle:
            idle.clear()
        self.retained_bytes = 0
