# SPDX-License-Identifier: Apache-2.0
"""One job's life: every verb in every state, pauses, cancels, its end, and who may be told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from blockemu.jobs.job import Job, JobCancelled, JobError
from blockemu.jobs.states import JobState, JobVerb, verb_allowed
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Future
from blockemu.loop.iothread import IOThread

STATES = [state for state in JobState if state is not JobState.UNDEFINED]


@pytest.fixture
def ctx() -> Iterator[AioContext]:
    context = AioContext("main")
    context.adopt()
    yield context
    context.close()


class StepJob(Job):
    """Works in steps that the test lets go, one gate each; `None` of a gate is a ready point."""

    kind: ClassVar[str] = "step"

    def __init__(
        self, main_ctx: AioContext, *, steps: int = 1, ready: bool = False, **kwargs: Any
    ) -> None:
        self.log: list[str] = []
        self.states: list[str] = []
        super().__init__(
            "j",
            main_ctx=main_ctx,
            on_state=lambda job: self.states.append(job.state.value),
            **kwargs,
        )
        self.gates: list[Future[None]] = [Future() for _ in range(steps)]
        self.ready = ready
        self.fail_in_prepare = False

    async def work(self) -> None:
        self.add_work(len(self.gates))
        if self.ready:
            await self.become_ready()
        for gate in self.gates:
            await gate
            self.work_done(1)
            await self.pause_point()

    async def prepare(self) -> None:
        self.log.append("prepare")
        if self.fail_in_prepare:
            raise OSError(28, "No space left on device")

    def commit(self) -> None:
        self.log.append("commit")

    def abort(self) -> None:
        self.log.append("abort")

    def clean(self) -> None:
        self.log.append("clean")

    def let_go(self, step: int = 0) -> None:
        self.gates[step].set_result(None)


def settle(ctx: AioContext) -> None:
    while ctx.poll(blocking=False):
        pass


def over(ctx: AioContext, job: Job) -> BaseException | None:
    """Runs until the job has concluded; its error."""

    async def wait() -> BaseException | None:
        try:
            await job.wait()
        except Exception as error:
            return error
        return None

    return ctx.run(wait())


def job_in(ctx: AioContext, state: JobState) -> StepJob:
    """A job that has come to `state` in the ordinary way; its last steps are still to be done."""
    ready = state in (JobState.READY, JobState.STANDBY)
    job = StepJob(
        ctx,
        steps=2,
        ready=ready,
        auto_finalize=state is not JobState.PENDING,
        auto_dismiss=state is not JobState.CONCLUDED,
    )
    if state is JobState.CREATED:
        return job
    job.start()
    settle(ctx)
    if state in (JobState.RUNNING, JobState.READY):
        return job
    if state in (JobState.PAUSED, JobState.STANDBY):
        job.pause()
        job.let_go(0)
        settle(ctx)
    elif state in (JobState.PENDING, JobState.CONCLUDED, JobState.NULL):
        job.let_go(0)
        job.let_go(1)
        settle(ctx)
    else:
        job.state = state  # passed through without a stop: only by hand
    return job


def apply(job: Job, verb: JobVerb) -> None:
    calls: dict[JobVerb, Callable[[], None]] = {
        JobVerb.CANCEL: job.cancel,
        JobVerb.PAUSE: job.pause,
        JobVerb.RESUME: job.resume,
        JobVerb.SET_SPEED: lambda: job.set_speed(1000),
        JobVerb.COMPLETE: job.complete,
        JobVerb.FINALIZE: job.finalize,
        JobVerb.DISMISS: job.dismiss,
    }
    calls[verb]()


@pytest.mark.parametrize(
    ("state", "verb"),
    [p for p in itertools.product(STATES, JobVerb) if not verb_allowed(p[1], p[0])],
    ids=lambda value: value.value,
)
def test_verb_not_in_the_table_is_refused_in_qemus_words(
    ctx: AioContext, state: JobState, verb: JobVerb
) -> None:
    job = job_in(ctx, state)
    assert job.state is state
    with pytest.raises(JobError) as caught:
        apply(job, verb)
    assert str(caught.value) == (
        f"Job 'j' in state '{state.value}' cannot accept command verb '{verb.value}'"
    )
    assert job.state is state


@pytest.mark.parametrize(
    ("state", "verb"),
    [
        p
        for p in itertools.product(STATES, JobVerb)
        if verb_allowed(p[1], p[0]) and p[0] is not JobState.WAITING
    ],
    ids=lambda value: value.value,
)
def test_verb_in_the_table_is_heard(ctx: AioContext, state: JobState, verb: JobVerb) -> None:
    job = job_in(ctx, state)
    if verb is JobVerb.RESUME and state not in (JobState.PAUSED, JobState.STANDBY):
        job.pause()
    if verb is JobVerb.PAUSE and state in (JobState.PAUSED, JobState.STANDBY):
        with pytest.raises(JobError, match="already paused"):
            job.pause()
        return
    apply(job, verb)


def test_job_that_succeeds_walks_the_states_in_order(ctx: AioContext) -> None:
    job = StepJob(ctx)
    job.start()
    job.let_go()
    assert over(ctx, job) is None
    assert job.states == ["created", "running", "waiting", "pending", "concluded", "null"]
    assert job.log == ["prepare", "commit", "clean"]
    assert (job.progress_current, job.progress_total) == (1, 1)


def test_job_that_fails_aborts_and_keeps_its_error(ctx: AioContext) -> None:
    job = StepJob(ctx, auto_dismiss=False)
    job.start()
    job.gates[0].set_exception(OSError(5, "Input/output error"))
    error = over(ctx, job)
    assert isinstance(error, OSError)
    assert job.states == ["created", "running", "aborting", "concluded"]
    assert job.log == ["abort", "clean"]
    assert job.query() == {
        "id": "j",
        "type": "step",
        "status": "concluded",
        "current-progress": 0,
        "total-progress": 1,
        "error": "[Errno 5] Input/output error",
    }
    job.dismiss()
    assert job.states[-1] == "null"


def test_job_whose_prepare_fails_aborts(ctx: AioContext) -> None:
    job = StepJob(ctx)
    job.fail_in_prepare = True
    job.start()
    job.let_go()
    assert isinstance(over(ctx, job), OSError)
    assert job.log == ["prepare", "abort", "clean"]
    assert job.states == [
        "created",
        "running",
        "waiting",
        "pending",
        "aborting",
        "concluded",
        "null",
    ]


def test_pause_takes_hold_at_the_next_pause_point_and_resume_lets_go(ctx: AioContext) -> None:
    job = StepJob(ctx, steps=2)
    job.start()
    job.pause()
    settle(ctx)
    assert job.state is JobState.RUNNING
    job.let_go(0)
    job.let_go(1)
    settle(ctx)
    assert job.state is JobState.PAUSED
    assert job.progress_current == 1
    job.resume()
    assert over(ctx, job) is None
    assert job.states[:5] == ["created", "running", "paused", "running", "waiting"]


def test_pause_before_start_holds_the_work_back(ctx: AioContext) -> None:
    job = StepJob(ctx)
    job.pause()
    job.start()
    settle(ctx)
    assert job.state is JobState.PAUSED
    assert job.progress_total == 0
    job.let_go()
    job.resume()
    assert over(ctx, job) is None


def test_user_pause_and_hold_count_apart(ctx: AioContext) -> None:
    job = StepJob(ctx)
    job.hold()
    job.pause()
    job.start()
    settle(ctx)
    job.resume()
    settle(ctx)
    assert job.state is JobState.PAUSED
    job.release()
    settle(ctx)
    assert job.state is JobState.RUNNING
    job.cancel()
    job.let_go()
    assert isinstance(over(ctx, job), JobCancelled)


def test_resume_and_pause_in_one_breath_leaves_it_paused(ctx: AioContext) -> None:
    job = job_in(ctx, JobState.PAUSED)
    job.resume()
    job.pause()
    job.let_go(1)
    settle(ctx)
    assert job.state is JobState.PAUSED
    job.resume()
    assert over(ctx, job) is None


def test_resume_of_job_that_is_not_paused_is_refused(ctx: AioContext) -> None:
    job = job_in(ctx, JobState.RUNNING)
    with pytest.raises(JobError, match="not paused"):
        job.resume()


@pytest.mark.parametrize(
    "state", [JobState.RUNNING, JobState.PAUSED, JobState.READY, JobState.STANDBY]
)
def test_cancel_ends_the_work_at_its_next_pause_point(ctx: AioContext, state: JobState) -> None:
    job = job_in(ctx, state)
    job.cancel()
    for gate in job.gates:
        if not gate.done():
            gate.set_result(None)
    error = over(ctx, job)
    assert isinstance(error, JobCancelled)
    assert job.query()["error"] == "Operation canceled"
    assert "commit" not in job.log
    assert job.states[-3:] == ["aborting", "concluded", "null"]


def test_cancel_before_start_concludes_at_once(ctx: AioContext) -> None:
    job = StepJob(ctx)
    job.cancel()
    assert job.states == ["created", "aborting", "concluded", "null"]
    assert isinstance(over(ctx, job), JobCancelled)


def test_cancel_of_pending_job_aborts_it(ctx: AioContext) -> None:
    job = job_in(ctx, JobState.PENDING)
    job.cancel()
    assert isinstance(over(ctx, job), JobCancelled)
    assert job.log == ["abort", "clean"]


def test_soft_cancel_of_a_job_that_can_end_well_lets_it(ctx: AioContext) -> None:
    class Mirror(StepJob):
        def cancel_is_forced(self, *, force: bool) -> bool:
            return force

    job = Mirror(ctx, ready=True)
    job.start()
    settle(ctx)
    job.cancel()
    assert job.cancel_requested
    job.let_go()
    assert over(ctx, job) is None
    assert job.log == ["prepare", "commit", "clean"]


def test_force_cancel_of_a_job_that_can_end_well_stops_it(ctx: AioContext) -> None:
    class Mirror(StepJob):
        def cancel_is_forced(self, *, force: bool) -> bool:
            return force

    job = Mirror(ctx, ready=True)
    job.start()
    settle(ctx)
    job.cancel()
    job.cancel(force=True)
    job.let_go()
    assert isinstance(over(ctx, job), JobCancelled)


def test_complete_is_seen_by_the_work(ctx: AioContext) -> None:
    job = job_in(ctx, JobState.READY)
    job.complete()
    assert job.complete_requested


def test_complete_of_paused_job_is_refused(ctx: AioContext) -> None:
    job = job_in(ctx, JobState.READY)
    job.pause()
    with pytest.raises(JobError, match="cannot be completed"):
        job.complete()


def test_finalize_lets_a_pending_job_take_effect(ctx: AioContext) -> None:
    job = job_in(ctx, JobState.PENDING)
    assert job.log == []
    job.finalize()
    assert over(ctx, job) is None
    assert job.log == ["prepare", "commit", "clean"]


def test_negative_speed_is_refused(ctx: AioContext) -> None:
    with pytest.raises(JobError, match="negative"):
        job_in(ctx, JobState.RUNNING).set_speed(-1)


class Sleeper(StepJob):
    async def work(self) -> None:
        await self.sleep_ns(3600 * 10**9)
        self.log.append("awake")


@pytest.mark.parametrize("verb", [JobVerb.CANCEL, JobVerb.SET_SPEED])
def test_sleep_ends_early_when_kicked(ctx: AioContext, verb: JobVerb) -> None:
    job = Sleeper(ctx)
    job.start()
    settle(ctx)
    apply(job, verb)
    error = over(ctx, job)
    assert isinstance(error, JobCancelled) is (verb is JobVerb.CANCEL)


def test_work_runs_in_its_own_context_and_its_state_in_main(ctx: AioContext) -> None:
    thread = IOThread("io")
    thread.start()
    worked_in: list[AioContext | None] = []
    changed_in: list[AioContext | None] = []

    class Here(StepJob):
        async def work(self) -> None:
            worked_in.append(AioContext.current())
            await self.sleep_ns(3600 * 10**9)

    try:
        job = Here(ctx, ctx=thread.ctx)
        job._on_state = lambda job: changed_in.append(AioContext.current())
        job.pause()
        job.start()
        while job.state is not JobState.PAUSED:
            ctx.poll(blocking=True)
        job.resume()
        while job.state is not JobState.RUNNING:
            ctx.poll(blocking=True)
        job.cancel()
        assert isinstance(over(ctx, job), JobCancelled)
    finally:
        thread.stop()
    assert set(worked_in) <= {thread.ctx}
    assert set(changed_in) <= {ctx, None}
