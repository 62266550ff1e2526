# SPDX-License-Identifier: Apache-2.0
"""The create job: what it makes, what it refuses before it touches anything, what it cleans up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockemu.drivers.errors import ImageError
from blockemu.drivers.registry import Opener
from blockemu.jobs.create import CreateJob, NewImage
from blockemu.jobs.job import JobCancelled
from blockemu.loop.aio_context import AioContext
from blockemu.loop.host_file import PosixFiles
from blockemu.loop.memory_file import MemoryFiles


@pytest.fixture
def opener() -> Iterator[Opener]:
    ctx = AioContext("main")
    ctx.adopt()
    yield Opener(files=PosixFiles(), ctx=ctx)
    ctx.close()


def run(opener: Opener, path: Path, fmt: str, size_bytes: int, **options: Any) -> CreateJob:
    image = NewImage(path=str(path), fmt=fmt, size_bytes=size_bytes, options=options)
    job = CreateJob("c", image, opener=opener, auto_dismiss=False)
    job.start()
    opener.ctx.run(job.wait())
    return job


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_created_image_opens_with_its_size_and_reads_zeroes(
    opener: Opener, tmp_path: Path, fmt: str
) -> None:
    async def read() -> tuple[int, bytes]:
        node = await opener.open_image(
            str(tmp_path / "x"), fmt=fmt, read_only=True, direct=False, aio="threads"
        )
        data = bytearray(b"x" * 4096)
        await node.preadv(node.length_bytes - 4096, memoryview(data))
        length = node.length_bytes
        await node.close()
        return length, bytes(data)

    job = run(opener, tmp_path / "x", fmt, 1 << 20)
    assert job.query()["status"] == "concluded"
    assert (job.progress_current, job.progress_total) == (1, 1)
    assert opener.ctx.run(read()) == (1 << 20, bytes(4096))
    assert opener.nodes == {}


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_size_is_rounded_up_to_sectors(opener: Opener, tmp_path: Path, fmt: str) -> None:
    async def length() -> int:
        node = await opener.open_image(
            str(tmp_path / "x"), fmt=fmt, read_only=True, direct=False, aio="threads"
        )
        size_bytes = node.length_bytes
        await node.close()
        return size_bytes

    run(opener, tmp_path / "x", fmt, 1001)
    assert opener.ctx.run(length()) == 1024


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("raw", {"preallocation": "metadata"}),
        ("raw", {"nope": 1}),
        ("qcow2", {"cluster_size": 1000}),
        ("qcow2", {"nope": 1}),
        ("vmdk", {}),
    ],
)
def test_bad_options_fail_the_job_before_the_file_is_touched(
    opener: Opener, tmp_path: Path, fmt: str, options: dict[str, Any]
) -> None:
    path = tmp_path / "x"
    path.write_text("precious")
    with pytest.raises(ImageError, match="x: "):
        run(opener, path, fmt, 1 << 20, **options)
    assert path.read_text() == "precious"


def test_failed_job_removes_the_file_that_it_made(opener: Opener, tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        run(opener, tmp_path / "x", "raw", 2**63 - 512)
    assert list(tmp_path.iterdir()) == []


def test_failed_job_keeps_a_file_that_was_there(opener: Opener, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(ImageError):
        run(opener, tmp_path / "x", "raw", 2**63 - 512)
    assert (tmp_path / "x").exists()


def test_cancel_before_start_touches_nothing(opener: Opener, tmp_path: Path) -> None:
    image = NewImage(path=str(tmp_path / "x"), fmt="raw", size_bytes=512)
    job = CreateJob("c", image, opener=opener)
    job.cancel()
    with pytest.raises(JobCancelled):
        opener.ctx.run(job.wait())
    assert list(tmp_path.iterdir()) == []


def test_cancel_while_paused_removes_the_file_and_closes_the_node(
    opener: Opener, tmp_path: Path
) -> None:
    image = NewImage(path=str(tmp_path / "x"), fmt="raw", size_bytes=512)
    job = CreateJob("c", image, opener=opener)
    job.pause()
    job.start()
    job.cancel()
    with pytest.raises(JobCancelled):
        opener.ctx.run(job.wait())
    assert list(tmp_path.iterdir()) == []
    assert opener.nodes == {}


def test_image_that_is_open_is_refused_and_kept(opener: Opener, tmp_path: Path) -> None:
    path = tmp_path / "x"
    run(opener, path, "qcow2", 1 << 20)
    before = path.read_bytes()

    async def hold() -> Any:
        return await opener.open_image(
            str(path), fmt="qcow2", read_only=False, direct=False, aio="threads"
        )

    node = opener.ctx.run(hold())
    with pytest.raises(ImageError, match="x: is in use"):
        run(opener, path, "raw", 1 << 20)
    opener.ctx.run(node.close())
    assert path.read_bytes() == before


@pytest.mark.parametrize("no_flush", [False, True])
def test_image_that_may_be_lost_is_not_flushed(no_flush: bool) -> None:
    ctx = AioContext("main")
    ctx.adopt()
    files = MemoryFiles()
    image = NewImage(path="x", fmt="qcow2", size_bytes=1 << 20, cache={"no-flush": no_flush})
    job = CreateJob("c", image, opener=Opener(files=files, ctx=ctx))
    job.start()
    ctx.run(job.wait())
    assert bool(files.images["x"].operations("flush")) != no_flush
    ctx.close()
