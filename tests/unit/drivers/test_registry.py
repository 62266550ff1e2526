# SPDX-License-Identifier: Apache-2.0
"""Opening by name: drivers, probing, context moves, a driver of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.errors import ImageError
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.iothread import IOThread
from tests.unit.drivers.conftest import ScriptedDriver


def test_unknown_driver_is_refused_with_those_there_are(ctx: AioContext, opener: Opener) -> None:
    with pytest.raises(ImageError, match=r"there is no driver 'vmdk'; known: file, .*qcow2, raw"):
        ctx.run(opener.open({"driver": "vmdk"}))


def test_missing_driver_is_refused(ctx: AioContext, opener: Opener) -> None:
    with pytest.raises(ImageError, match="option 'driver' is missing"):
        ctx.run(opener.open({}))


def test_driver_of_the_users_own_is_opened_by_name(ctx: AioContext, opener: Opener) -> None:
    opener.drivers.register(ScriptedDriver)
    node = ctx.run(opener.open({"driver": "scripted", "size": 4096, "node-name": "mine"}))
    assert node.length_bytes == 4096
    assert opener.nodes["mine"] is node


def test_name_in_use_is_refused(ctx: AioContext, opener: Opener) -> None:
    ctx.run(opener.open({"driver": "null-co", "node-name": "n"}))
    with pytest.raises(ImageError, match="n: a node of this name exists already"):
        ctx.run(opener.open({"driver": "null-co", "node-name": "n"}))


def test_null_co_reads_zeroes(ctx: AioContext, opener: Opener) -> None:
    node = ctx.run(opener.open({"driver": "null-co", "size": "1M"}))
    target = bytearray(b"x" * 512)
    ctx.run(node.preadv(0, memoryview(target)))
    ctx.run(node.pwritev(0, memoryview(b"y" * 512)))
    assert node.length_bytes == 1 << 20
    assert target == bytes(512)


def test_image_without_magic_is_probed_as_raw(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    assert ctx.run(opener.probe(str(path))) == "raw"


def test_format_that_is_no_image_format_is_refused(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    for fmt in ("file", "vmdk"):
        with pytest.raises(ImageError, match=f"{path}: there is no image format '{fmt}'"):
            ctx.run(
                opener.open_image(str(path), fmt=fmt, read_only=True, direct=False, aio="native")
            )


@pytest.mark.parametrize("direct", [False, True])
def test_graph_moves_to_an_iothread_and_back(
    ctx: AioContext, opener: Opener, tmp_path: Path, direct: bool
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"m" * 8192)
    node = ctx.run(
        opener.open_image(str(path), fmt="raw", read_only=False, direct=direct, aio="native")
    )
    backend = BlockBackend("b", node, writable=True)
    thread = IOThread("io0")
    thread.start()
    try:
        ctx.run(backend.move_to(thread.ctx))
        assert {below.ctx for below in node.subtree()} == {thread.ctx}

        async def write_and_read() -> bytes:
            target = bytearray(4096)
            await backend.pwritev(4096, memoryview(b"n" * 4096))
            await backend.preadv(4096, memoryview(target))
            return bytes(target)

        from blockemu.loop.coroutine import run_in_context

        assert ctx.run(run_in_context(thread.ctx, write_and_read)) == b"n" * 4096
        ctx.run(backend.move_to(ctx))
        assert ctx.run(write_and_read()) == b"n" * 4096
        ctx.run(backend.close())
    finally:
        thread.stop()
    assert path.read_bytes() == b"m" * 4096 + b"n" * 4096
