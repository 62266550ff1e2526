# SPDX-License-Identifier: Apache-2.0
"""Builds `blockemu.loop._libaio`: the C half of host I/O, by cffi in API mode.

The C lives in `native/aio_queue.{h,c}`, where an editor and a sanitizer find it; the header is both
cffi's declarations and the compiler's. API mode because the compiler then checks every structure
against the machine's own headers; the limited API because one binary then serves every CPython.

Not reached through this module: io_submit itself. A call from Python for each request costs more
than the request does, so C takes a whole batch (see linux_aio.py).
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_NATIVE = Path(__file__).resolve().parent / "native"
_DECLARATIONS = (_NATIVE / "aio_queue.h").read_text()
_CODE = (_NATIVE / "aio_queue.c").read_text()

ffibuilder = FFI()
ffibuilder.cdef(_DECLARATIONS)
ffibuilder.set_source(
    "blockemu.loop._libaio",
    # _GNU_SOURCE for fallocate: cffi includes Python.h first, which defines it.
    f"#include <stdint.h>\n{_DECLARATIONS}\n{_CODE}",
    libraries=["aio"],
    extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
