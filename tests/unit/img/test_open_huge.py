# SPDX-License-Identifier: Apache-2.0
"""A huge image opens at the price of its tables' first entries: time and memory don't follow its
length. How long it takes is the benchmark's to say (`make bench ARGS='--only img'`)."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from blockemu.drivers.registry import Opener
from blockemu.img.session import open_image, run_session
from tests.unit.img.side_by_side import our_output

MIB = 1 << 20
PEAK_BYTES_MAX = 6 * MIB
"""A cluster of 2 MiB is read where a table lies in one; the L1 table at 64 KiB clusters has 256
KiB, and for a moment there are two of it."""


async def _open_and_look(opener: Opener, path: Path) -> tuple[int, bytes]:
    async with open_image(opener, str(path), fmt="qcow2") as backend:
        length = backend.length_bytes
        view = memoryview(bytearray(4096))
        await backend.preadv(length - len(view), view)
        return length, bytes(view)


@pytest.mark.parametrize("cluster_size", ["64k", "2M"])
def test_sixteen_tebibytes_open_in_little_memory(tmp_path: Path, cluster_size: str) -> None:
    huge = tmp_path / "huge.qcow2"
    our_output("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", huge, "16T")
    run_session(lambda opener: _open_and_look(opener, huge))  # what is loaded once isn't the image
    tracemalloc.start()
    try:
        length, end = run_session(lambda opener: _open_and_look(opener, huge))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (length, end) == (16 << 40, bytes(4096))
    assert peak < PEAK_BYTES_MAX
