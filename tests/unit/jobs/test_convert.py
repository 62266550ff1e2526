# SPDX-License-Identifier: Apache-2.0
"""The convert job on images in memory: order, pause, cancel, failure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.errors import ImageError
from blockemu.drivers.registry import Opener
from blockemu.jobs.convert import PIECE_BYTES, ConvertJob, ConvertPlan
from blockemu.jobs.job import JobCancelled
from blockemu.jobs.states import JobState
from blockemu.loop.aio_context import AioContext
from blockemu.loop.memory_file import MemoryFiles

SIZE = 4 * PIECE_BYTES + 4096


class World:
    """A source full of data and an empty target, both raw, in memory."""

    def __init__(self) -> None:
        self.ctx = AioContext("main")
        self.ctx.adopt()
        self.files = MemoryFiles()
        self.opener = Opener(files=self.files, ctx=self.ctx)
        self.data = bytes(range(1, 256)) * (SIZE // 255 + 1)
        self.files.add("source", self.data[:SIZE])
        self.files.add("target", bytes(SIZE))
        self.source = self.open("source", writable=False)
        self.target = self.open("target", writable=True)
        self.told: list[tuple[int, int]] = []

    def open(self, path: str, *, writable: bool) -> BlockBackend:
        node = self.ctx.run(
            self.opener.open(
                {
                    "driver": "raw",
                    "read-only": not writable,
                    "file": {"driver": "file", "filename": path},
                }
            )
        )
        return BlockBackend(path, node, writable=writable)

    def job(self, **plan: Any) -> ConvertJob:
        return ConvertJob(
            "c",
            ConvertPlan(sources=[self.source], target=self.target, **plan),
            main_ctx=self.ctx,
            on_progress=lambda done, total: self.told.append((done, total)),
            auto_dismiss=False,
        )

    def run(self, job: ConvertJob) -> None:
        job.start()
        self.ctx.run(job.wait())

    def close(self) -> None:
        for backend in (self.source, self.target):
            self.ctx.run(backend.close())
        self.ctx.close()


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    yield found
    found.close()


@pytest.mark.parametrize("requests_max", [1, 8, 16])
@pytest.mark.parametrize("in_order", [True, False])
def test_all_is_copied_and_told(world: World, requests_max: int, in_order: bool) -> None:
    job = world.job(requests_max=requests_max, in_order=in_order)
    world.run(job)
    assert world.files.images["target"].content == world.data[:SIZE]
    assert job.query()["status"] == "concluded"
    assert world.told[-1] == (SIZE, SIZE)
    assert [done for done, _ in world.told] == sorted(done for done, _ in world.told)


def test_writes_are_begun_in_order(world: World) -> None:
    world.files.images["target"].log.clear()
    world.run(world.job(requests_max=16))
    starts = [entry[1] for entry in world.files.images["target"].log if entry[0] == "write"]
    assert starts == sorted(starts)
    assert len(starts) == 5


def test_cancel_ends_the_job_at_its_next_piece(world: World) -> None:
    job = world.job(requests_max=2)
    job.pause()
    job.start()
    while job.state is not JobState.PAUSED:
        world.ctx.poll(blocking=True)
    job.cancel()
    with pytest.raises(JobCancelled):
        world.ctx.run(job.wait())
    assert world.told == []


def test_pause_in_the_middle_stands_still_and_goes_on(world: World) -> None:
    job = world.job(requests_max=2)
    job.start()
    while not world.told:
        world.ctx.poll(blocking=True)
    job.pause()
    while job.state is not JobState.PAUSED:
        world.ctx.poll(blocking=True)
    job.resume()
    world.ctx.run(job.wait())
    assert world.files.images["target"].content == world.data[:SIZE]


@pytest.mark.parametrize(("name", "kind"), [("source", "read"), ("target", "write")])
@pytest.mark.parametrize("in_order", [True, False])
def test_failure_names_the_image(world: World, name: str, kind: str, in_order: bool) -> None:
    def fault(found: str, offset: int, length: int) -> int:
        return 5 if found == kind and offset >= PIECE_BYTES else 0

    world.files.images[name].fault = fault
    with pytest.raises(ImageError, match=f"{name}: Input/output error"):
        world.run(world.job(in_order=in_order))
    world.files.images[name].fault = None


def test_target_that_is_too_small_is_refused_before_it_is_written(world: World) -> None:
    plan = ConvertPlan(sources=[world.source, world.source], target=world.target)
    job = ConvertJob("c", plan, main_ctx=world.ctx)
    with pytest.raises(ImageError, match="target: has"):
        world.run(job)
    assert world.files.images["target"].content == bytes(SIZE)
