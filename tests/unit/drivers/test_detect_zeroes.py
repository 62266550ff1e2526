# SPDX-License-Identifier: Apache-2.0
"""The options `discard` and `detect-zeroes` of every node, and what they mean for direct maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.errors import ImageError
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.drivers.zeroes import is_zero
from blockemu.img.create import CreateRequest, create_image
from blockemu.loop.aio_context import AioContext
from tests.unit.drivers.conftest import ScriptedDriver

KIB = 1024
MIB = 1 << 20
NONE, UNMAP, FUA = RequestFlags.NONE, RequestFlags.MAY_UNMAP, RequestFlags.FUA


class ZeroingDriver(ScriptedDriver):
    """Writes zeroes without being handed them."""

    name = "zeroing"

    async def pwrite_zeroes(self, offset: int, length: int, flags: RequestFlags) -> None:
        await self._turn("zero", offset, length, flags)
        self.content[offset : offset + length] = bytes(length)


def opened(
    ctx: AioContext, driver: type[ScriptedDriver], **options: Any
) -> tuple[BlockDriverState, ScriptedDriver]:
    opener = Opener(files=None, ctx=ctx)  # type: ignore[arg-type]  # no files are opened
    opener.drivers.register(driver)
    named = {key.replace("_", "-"): value for key, value in options.items()}
    node = ctx.run(opener.open({"driver": driver.name, **named}))
    assert isinstance(node.driver, driver)
    node.driver.content[:] = b"o" * len(node.driver.content)
    return node, node.driver


@pytest.mark.parametrize("length", [0, 1, 511, 65536, 65537, 300_000])
def test_is_zero_sees_every_byte(length: int) -> None:
    data = bytearray(length)
    assert is_zero(memoryview(data))
    for position in {0, length // 2, 65535, 65536, length - 1} & set(range(length)):
        data[position] = 1
        assert not is_zero(memoryview(data)), position
        data[position] = 0


@pytest.mark.parametrize(("mode", "flags"), [("on", NONE), ("unmap", UNMAP)])
def test_written_zeroes_become_write_zeroes(
    ctx: AioContext, mode: str, flags: RequestFlags
) -> None:
    node, driver = opened(ctx, ZeroingDriver, detect_zeroes=mode)
    ctx.run(node.pwritev(4096, memoryview(bytes(8192))))
    assert driver.calls == [("zero", 4096, 8192, flags)]


def test_off_is_the_default(ctx: AioContext) -> None:
    node, driver = opened(ctx, ZeroingDriver)
    ctx.run(node.pwritev(0, memoryview(bytes(4096))))
    assert driver.calls == [("write", 0, 4096)]
    assert (node.detect_zeroes, node.unmap) == ("off", True)


def test_one_byte_that_isnt_zero_makes_it_data(ctx: AioContext) -> None:
    node, driver = opened(ctx, ZeroingDriver, detect_zeroes="on")
    ctx.run(node.pwritev(0, memoryview(bytes(4095) + b"x")))
    assert driver.calls == [("write", 0, 4096)]


def test_ragged_ends_of_detected_zeroes_are_written(ctx: AioContext) -> None:
    node, driver = opened(ctx, ZeroingDriver, detect_zeroes="on", alignment=512)
    expected = bytearray(driver.content)
    ctx.run(node.pwritev(100, memoryview(bytes(2000))))
    expected[100:2100] = bytes(2000)
    assert driver.content == expected
    assert [call[0] for call in driver.calls if call[0] != "read"] == ["zero", "write", "write"]


@pytest.mark.parametrize("alignment", [1, 512])
def test_driver_without_write_zeroes_gets_bytes(ctx: AioContext, alignment: int) -> None:
    """They aren't looked at again, which would go round for ever."""
    node, driver = opened(ctx, ScriptedDriver, detect_zeroes="on", alignment=alignment)
    ctx.run(node.pwritev(512, memoryview(bytes(2 * MIB // 4))))
    assert driver.content[511:513] == b"o\0"
    assert driver.calls == [("write", 512, MIB // 2)]


def test_fua_of_detected_zeroes_is_a_flush(ctx: AioContext) -> None:
    node, driver = opened(ctx, ZeroingDriver, detect_zeroes="on")
    ctx.run(node.pwritev(0, memoryview(bytes(4096)), FUA))
    assert [call[0] for call in driver.calls] == ["zero", "flush"]


def test_empty_write_with_detection_does_nothing(ctx: AioContext) -> None:
    node, driver = opened(ctx, ZeroingDriver, detect_zeroes="on")
    ctx.run(node.pwritev(0, memoryview(b"")))
    assert driver.calls == []


def test_ignored_discards_dont_reach_the_driver(ctx: AioContext) -> None:
    node, driver = opened(ctx, ZeroingDriver, discard="ignore")
    ctx.run(node.pdiscard(0, 65536))
    ctx.run(node.pwrite_zeroes(0, 4096, UNMAP))
    assert driver.calls == [("zero", 0, 4096, NONE)]


def test_unmap_without_discard_is_refused(ctx: AioContext) -> None:
    with pytest.raises(ImageError, match="detect-zeroes=unmap goes with discard=unmap only"):
        opened(ctx, ZeroingDriver, detect_zeroes="unmap", discard="ignore")


@pytest.mark.parametrize("option", ["discard", "detect_zeroes"])
def test_other_values_are_refused_with_those_there_are(ctx: AioContext, option: str) -> None:
    with pytest.raises(ImageError, match=r"is one of .*unmap.*, not 'maybe'"):
        opened(ctx, ZeroingDriver, **{option: "maybe"})


# --- real files ---


def tree(kind: str, folder: Path, at: str, options: dict[str, str]) -> dict[str, Any]:
    """The options of `kind` (file, raw, qcow2), with `options` on its top or on its file."""
    path = folder / "disk"
    if kind == "qcow2":
        create_image(CreateRequest.from_user(str(path), "4M", fmt="qcow2"))
    else:
        path.write_bytes(b"o" * (4 * MIB))
    file: dict[str, Any] = {"driver": "file", "filename": str(path)}
    if kind == "file":
        return {**file, **options}
    top: dict[str, Any] = {"driver": kind, "file": file}
    (top if at == "top" else file).update(options)
    return top


CASES = [
    ("file", "top"), ("raw", "top"), ("raw", "file"), ("qcow2", "top"), ("qcow2", "file"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "at"), CASES)
@pytest.mark.parametrize("mode", ["off", "on"])
def test_map_takes_reads_but_no_writes_of_a_node_that_must_see_them(
    ctx: AioContext, opener: Opener, tmp_path: Path, kind: str, at: str, mode: str
) -> None:
    node = ctx.run(opener.open(tree(kind, tmp_path, at, {"detect-zeroes": mode})))
    node.driver.direct_map()
    ctx.run(node.pwritev(0, memoryview(b"w" * 65536)))
    ctx.run(node.preadv(0, memoryview(bytearray(4096))))
    direct_map = node.driver.direct_map()
    assert direct_map is not None
    assert direct_map.lookup_read(0, 4096) >= 0
    assert (direct_map.lookup_write(0, 4096) >= 0) == (mode == "off")
    ctx.run(node.close())


@pytest.mark.parametrize(("kind", "at"), CASES)
@pytest.mark.parametrize("mode", ["on", "unmap"])
def test_detected_zeroes_are_read_back(
    ctx: AioContext, opener: Opener, tmp_path: Path, kind: str, at: str, mode: str
) -> None:
    node = ctx.run(opener.open(tree(kind, tmp_path, at, {"detect-zeroes": mode})))
    model = bytearray(b"w" * (4 * MIB))
    ctx.run(node.pwritev(0, memoryview(bytes(model))))
    for offset, length in ((65536, 131072), (1000, 5000), (3 * MIB - 1, 1), (4 * MIB - 700, 700)):
        ctx.run(node.pwritev(offset, memoryview(bytes(length))))
        model[offset : offset + length] = bytes(length)
    found = bytearray(4 * MIB)
    ctx.run(node.preadv(0, memoryview(found)))
    assert found == model
    ctx.run(node.flush())
    ctx.run(node.close())


def test_zeroes_written_past_the_end_make_a_file_grow(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    node = ctx.run(opener.open(tree("file", tmp_path, "top", {"detect-zeroes": "unmap"})))
    ctx.run(node.pwritev(5 * MIB, memoryview(bytes(4096))))
    assert node.length_bytes == 5 * MIB + 4096
    ctx.run(node.close())
    assert (tmp_path / "disk").stat().st_size == 5 * MIB + 4096


@pytest.mark.parametrize("discard", ["ignore", "unmap"])
def test_space_is_given_back_or_kept(
    ctx: AioContext, opener: Opener, tmp_path: Path, discard: str
) -> None:
    node = ctx.run(opener.open(tree("raw", tmp_path, "top", {"discard": discard})))
    ctx.run(node.pdiscard(0, 2 * MIB))
    ctx.run(node.pwrite_zeroes(2 * MIB, 2 * MIB, UNMAP))
    ctx.run(node.close())
    blocks = (tmp_path / "disk").stat().st_blocks
    assert blocks >= 4 * MIB // 512 if discard == "ignore" else blocks < MIB // 512


def test_qcow2_takes_no_space_for_detected_zeroes(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    node = ctx.run(opener.open(tree("qcow2", tmp_path, "top", {"detect-zeroes": "on"})))
    ctx.run(node.pwritev(0, memoryview(bytes(4 * MIB))))
    status = ctx.run(node.block_status(0, 4 * MIB))
    assert (status.length, status.data, status.zero) == (4 * MIB, False, True)
    ctx.run(node.close())
    assert (tmp_path / "disk").stat().st_size < MIB


def test_qcow2_that_ignores_discards_keeps_the_hosts_space(
    ctx: AioContext, opener: Opener, tmp_path: Path
) -> None:
    node = ctx.run(opener.open(tree("qcow2", tmp_path, "top", {"discard": "ignore"})))
    ctx.run(node.pwritev(0, memoryview(b"w" * MIB)))
    ctx.run(node.pdiscard(0, MIB))
    status = ctx.run(node.block_status(0, MIB))
    assert status.data
    ctx.run(node.flush())
    ctx.run(node.close())
