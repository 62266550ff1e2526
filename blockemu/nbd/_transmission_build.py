# SPDX-License-Identifier: Apache-2.0
"""Builds `blockemu.nbd._transmission`: connections that C serves, by cffi in API mode.

The C below it (the poll, the direct map) is compiled in here once more instead of being called
across modules: it keeps all its state in the structures that it is handed, so two copies of its
code work on one poll. All of it is one translation unit, which lets the compiler see through the
layers. Only transmission.h is declared to Python. See also blockemu/loop/_libaio_build.py.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_NBD = Path(__file__).resolve().parent / "native"
_HOUSE = _NBD.parents[2]
_LOOP = _HOUSE / "loop" / "native"
_DRIVERS = _HOUSE / "drivers" / "native"

_CONTRACT = _NBD / "transmission.h"
# In an order in which each finds what it needs.
_PARTS = (
    _LOOP / "aio_queue.h",
    _LOOP / "buffer_pool.h",
    _LOOP / "poll.h",
    _DRIVERS / "direct_map.h",
    _CONTRACT,
    _LOOP / "aio_queue.c",
    _LOOP / "buffer_pool.c",
    _LOOP / "poll_aio.c",
    _LOOP / "poll.c",
    _DRIVERS / "direct_map.c",
    _NBD / "connection.h",
    _NBD / "headers.c",
    _NBD / "requests.c",
    _NBD / "plain_io.c",
    _NBD / "replies.c",
    _NBD / "transmission.c",
)

ffibuilder = FFI()
ffibuilder.cdef(_CONTRACT.read_text())
ffibuilder.set_source(
    "blockemu.nbd._transmission",
    # _GNU_SOURCE for preadv2: cffi includes Python.h first, which defines it.
    "#include <stdint.h>\n" + "".join(part.read_text() for part in _PARTS),
    libraries=["aio"],
    extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
