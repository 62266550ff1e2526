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

A large buffer lies in huge pages, where the kernel has some: as one piece of physical memory, a
transfer of a MiB is one request to the disk. In pages of 4 KiB it is over what many disks take at
once (254 pages on a virtio disk), and is split: reads of 1 MiB past the page cache were a third
slower for it. A huge page is 2 MiB, so buffers of 1 MiB are made in twos.

A slab with a free list would waste less on odd sizes; requests are powers of two nearly always, so
it would buy nothing here.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

from blockemu.loop._libaio import ffi

CLASS_BYTES_MIN: Final = 4096
CLASS_BYTES_MAX: Final = 32 << 20
# One context's idle memory: enough for a queue of 32 requests of 1 MiB twice over.
RETAINED_BYTES_MAX: Final = 64 << 20

HUGE_BYTES: Final = 2 << 20
"""A huge page; where the kernel's are larger, these are small pages, and as good as those."""

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

    def __init__(self, capacity: int, view: memoryview | None = None) -> None:
        """In `view`, or else in memory of its own."""
        self.view = _map(capacity) if view is None else view
        self.capacity = capacity
        self.address = address_of(self.view)
        assert self.address % CLASS_BYTES_MIN == 0


def untouched_memory(length: int) -> memoryview:
    """`length` bytes of zeroes, none of which takes memory until it is used. A bytearray would fill
    itself with zeroes, page by page. Any thread may call this."""
    return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _map(capacity: int) -> memoryview:
    """Fresh memory, in huge pages if it is as large as one."""
    if capacity < HUGE_BYTES:
        return memoryview(mmap.mmap(-1, capacity))
    # Private, since shared memory is seldom in huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, capacity + HUGE_BYTES, flags=flags)
    start = -address_of(memoryview(mapping)) % HUGE_BYTES
    # A child's copy on write could take a page away from under a transfer.
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(advice, start, capacity)
    return memoryview(mapping)[start : start + capacity]


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
        capacity = CLASS_BYTES_MIN << index
        if capacity != HUGE_BYTES // 2:
            return Buffer(capacity)
        both = _map(HUGE_BYTES)
        self.give(Buffer(capacity, both[capacity:]))
        return Buffer(capacity, both[:capacity])

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
