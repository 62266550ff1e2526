# SPDX-License-Identifier: Apache-2.0
"""Builds `blockemu.drivers._direct_map`: the direct map's native twin, by cffi in API mode.

Python fills the table through this module; the native connection's module compiles the same C file
and reads it. They share the structure by its address, so both must come from one header.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_NATIVE = Path(__file__).resolve().parent / "native"
_DECLARATIONS = (_NATIVE / "direct_map.h").read_text()
_CODE = (_NATIVE / "direct_map.c").read_text()

ffibuilder = FFI()
ffibuilder.cdef(_DECLARATIONS)
ffibuilder.set_source(
    "blockemu.drivers._direct_map",
    f"#include <stdint.h>\n{_DECLARATIONS}\n{_CODE}",
    extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
