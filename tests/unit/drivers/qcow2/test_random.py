# SPDX-License-Identifier: Apache-2.0
"""Random requests, one after the other, against a plain byte array; QEMU has the last word."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.driver import RequestFlags
from blockemu.loop.aio_context import AioContext
from tests.unit.drivers.qcow2.support import KIB, Disk, Images

DISK_BYTES = 300 * KIB + 512


class Step(NamedTuple):
    kind: str
    offset: int
    length: int
    fill: int


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(
            ["write", "write", "write", "compress", "compress"]
            + ["zero", "unmap", "discard", "flush", "reopen"]
        ),
        st.integers(0, DISK_BYTES - 1),
        st.one_of(st.integers(1, 3000), st.integers(1, 200_000), st.just(4096)),
        st.integers(1, 255),
    ),
    max_size=25,
)
FORMATS = st.one_of(
    st.fixed_dictionaries(
        {
            "cluster_size": st.sampled_from([512, 1024, 4096, 65536, 1 << 21]),
            "compression_type": st.sampled_from(["zlib", "zstd"]),
            "refcount_bits": st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
        }
    ),
    st.fixed_dictionaries(
        {
            "cluster_size": st.sampled_from([16384, 65536, 1 << 21]),
            "extended_l2": st.just("on"),
            "compression_type": st.sampled_from(["zlib", "zstd"]),
        }
    ),
    st.fixed_dictionaries(
        {"cluster_size": st.sampled_from([512, 4096, 65536]), "compat": st.just("0.10")}
    ),
    st.fixed_dictionaries(
        {
            "cluster_size": st.sampled_from([512, 4096, 65536, 1 << 21]),
            "data_file": st.just("data"),
            "data_file_raw": st.booleans(),
        }
    ),
    st.fixed_dictionaries(
        {
            "cluster_size": st.sampled_from([16384, 65536]),
            "extended_l2": st.just("on"),
            "data_file": st.just("data"),
            "data_file_raw": st.booleans(),
        }
    ),
)


def filling(seed: int, length: int) -> bytes:
    """Stretches of bytes that compress well, badly, and (below 512) not at all; some zeroes."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    while sum(map(len, parts)) < length:
        count = rng.choice((300, 5000, 70_000))
        entropy = rng.choice((0, 1, 16, min(700, count), count))
        parts.append(rng.randbytes(entropy) * (count // entropy) if entropy else bytes(count))
    return b"".join(parts)[:length]


def play(disk: Disk, model: bytearray, base: bytes, step: Step) -> None:
    end = min(step.offset + step.length, DISK_BYTES)
    offset, length = step.offset, end - step.offset
    if step.kind == "write":
        data = bytes((step.fill,)) * length
        disk.write(offset, data)
        model[offset:end] = data
    elif step.kind == "compress":
        if not disk.driver.supports_compressed_writes:
            return
        size = disk.driver.cluster_size
        offset -= offset % size
        end = min(-(-end // size) * size, DISK_BYTES)
        data = filling(step.fill, end - offset)
        disk.write_compressed(offset, data)
        model[offset:end] = data
    elif step.kind in ("zero", "unmap"):
        flags = RequestFlags.MAY_UNMAP if step.kind == "unmap" else RequestFlags.NONE
        disk.ctx.run(disk.node.pwrite_zeroes(offset, length, flags))
        model[offset:end] = bytes(length)
    elif step.kind == "discard":
        disk.ctx.run(disk.node.pdiscard(offset, length))
        found = disk.read(offset, length)
        for at, (now, before) in enumerate(zip(found, model[offset:end], strict=True)):
            assert now in (0, before), f"byte {offset + at} after a discard"
        model[offset:end] = found
    elif step.kind == "flush":
        disk.flush()


@given(options=FORMATS, steps=STEPS, with_base=st.booleans(), tiny_caches=st.booleans())
def test_image_holds_what_a_byte_array_holds(
    options: dict[str, int | str], steps: list[Step], with_base: bool, tiny_caches: bool
) -> None:
    ctx = AioContext("test")
    ctx.adopt()
    try:
        run(Images(ctx), options, steps, with_base=with_base, tiny_caches=tiny_caches)
    finally:
        ctx.close()


def run(
    images: Images,
    options: dict[str, int | str],
    steps: list[Step],
    *,
    with_base: bool,
    tiny_caches: bool,
) -> None:
    base = bytes(range(1, 256)) * 700 if with_base else b""
    with_base = with_base and not options.get("data_file_raw")
    base = base if with_base else b""
    if with_base:
        images.files.add("base", base)
        options = {**options, "backing_file": "base", "backing_fmt": "raw"}
    images.create("image", DISK_BYTES, **options)
    caches: dict[str, Any] = {
        "l2_cache_size": 2048,
        "refcount_cache_size": 2048,
        "l2_cache_entry_size": 512,
    }
    own = caches if tiny_caches else {}
    model = bytearray(base + bytes(DISK_BYTES - len(base)))
    disk = images.open("image", **own)
    for step in steps:
        if step.kind == "reopen":
            disk.close()
            disk = images.open("image", **own)
        else:
            play(disk, model, base, step)
    assert disk.read(0, DISK_BYTES) == model
    disk.close()
    with tempfile.TemporaryDirectory() as folder:
        if with_base:
            (Path(folder) / "base").write_bytes(base)
        images.check("image", Path(folder))
        images.compare("image", model, Path(folder))
    if options.get("data_file_raw"):
        assert images["data"].content == model
