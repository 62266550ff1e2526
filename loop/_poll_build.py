# SPDX-License-Identifier: Apache-2.0
"""Builds `blockemu.loop._poll`: the native poll, by cffi in API mode (see _libaio_build.py).

Native handlers live in extensions of their own, on the floors that they belong to. They compile the
same files into themselves and work on the same structures, whose addresses Python hands them; so
there is nothing in these files that exists once per process, and nothing to be linked.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_NATIVE = Path(__file__).resolve().parent / "native"
_HEADERS = ("aio_queue.h", "buffer_pool.h", "poll.h")
_CODE = ("aio_queue.c", "buffer_pool.c", "poll_aio.c", "poll.c")
_DECLARATIONS = "".join((_NATIVE / name).read_text() for name in _HEADERS)
_TEXT = "".join((_NATIVE / name).read_text() for name in _CODE)

ffibuilder = FFI()
ffibuilder.cdef(_DECLARATIONS)
ffibuilder.set_source(
    "blockemu.loop._poll",
    f"#include <stdint.h>\n{_DECLARATIONS}\n{_TEXT}",
    libraries=["aio"],
    extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
