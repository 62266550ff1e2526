# SPDX-License-Identifier: Apache-2.0
"""Builds `blockemu.drivers.crypto._xts_mask`, by cffi in API mode. Calls run without the GIL."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_NATIVE = Path(__file__).resolve().parent / "native"
_DECLARATIONS = (_NATIVE / "xts_mask.h").read_text()
_CODE = (_NATIVE / "xts_mask.c").read_text()

ffibuilder = FFI()
ffibuilder.cdef(_DECLARATIONS)
ffibuilder.set_source(
    "blockemu.drivers.crypto._xts_mask",
    _CODE,
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
