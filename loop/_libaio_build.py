# SPDX-License-Identifier: Apache-2.0
"""Builds `blockemu.loop._libaio`: the C half of host I/O, by cffi in API mode.

The C lives in `native/*.{h,c}`, where an editor and a sanitizer find it; the headers are both
cffi's declarations and the compiler's. API mode because the compiler then checks every structure
against the machine's own headers; the limited API because one binary then serves every CPython.

Not reached through this module: io_submit and pwrite themselves. A call from Python for each
request costs more than the request does, so C takes a whole batch (see linux_aio.py and
transfer_batches.py).
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_NATIVE = Path(__file__).resolve().parent / "native"
_PARTS = ("aio_queue", "transfers", "memory_scan")
_DECLARATIONS = "".join((_NATIVE / f"{part}.h").read_text() for part in _PARTS)
_CODE = "".join((_NATIVE / f"{part}.c").read_text() for part in _PARTS)

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
