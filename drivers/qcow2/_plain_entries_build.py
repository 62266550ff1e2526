# SPDX-License-Identifier: Apache-2.0
"""Builds `blockemu.drivers.qcow2._plain_entries`, by cffi in API mode."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_NATIVE = Path(__file__).resolve().parent / "native"
_DECLARATIONS = (_NATIVE / "plain_entries.h").read_text()
_CODE = (_NATIVE / "plain_entries.c").read_text()

ffibuilder = FFI()
ffibuilder.cdef(_DECLARATIONS)
ffibuilder.set_source(
    "blockemu.drivers.qcow2._plain_entries",
    f"#include <stdint.h>\n{_DECLARATIONS}\n{_CODE}",
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
