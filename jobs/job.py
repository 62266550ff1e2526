# SPDX-License-Identifier: Apache-2.0
"""One job: a coroutine that works on an AioContext, and the state that users see and steer.

Two contexts take part. The job's *work* runs in its own context, which is its node's, often an
IOThread. Its *state* belongs to the main context alone: verbs arrive there, and the coroutine hops
there when it wants to stand still (`pause_point`). So no lock is needed, and a verb's answer is
true when it is given. What crosses over are requests, plain attributes that one side sets and the
other reads at its pause points, and a kick: a bottom half that ends the job's sleep early.

The alternative, a state guarded by a mutex that both threads change, is what makes the C model
hard to read; a hop costs some microseconds, and only when somebody pauses.

The end of a job is the main context's, too: `prepare` may still fail it, then either `commit` or
`abort`, then `clean`. The error of a failed job stays readable until the job is dismissed.
"""

from __future__ import annotations

import errno
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from blockemu.jobs.states import JobState, JobVerb, transition_allowed, verb_allowed
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Cancelled, Future, run_in_context
from blockemu.loop.sync import Event

log = logging.getLogger(__name__)


class JobError(Exception):
    """A verb that was refused: `str()` is the line for the user."""


class JobCancelled(Exception):
    """The job was told to stop. Raised at its pause points; the work lets it pass."""

    def __init__(self) -> None:
        super().__init__(os.strerror(errno.ECANCELED))


class Job(ABC):
    """Base of all jobs. Context: main, for all but what is marked as the work's."""

    kind: ClassVar[str]
    """The job type's name, as clients see it."""

    def __init__(
        self,
        job_id: str,
        *,
        main_ctx: AioContext,
        ctx: AioContext | None = None,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_state: Callable[[Job], None] | None = None,
    ) -> None:
        self.job_id = job_id
        self.main_ctx = main_ctx
        self.ctx = ctx or main_ctx
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.state = JobState.UNDEFINED
        self.error: BaseException | None = None
        self.progress_current = 0
        self.progress_total = 0
        self.speed_bytes_per_s = 0
        """What a user set; 0 is as fast as it goes."""
        self.complete_requested = False
        self.cancel_requested = False
        """A user wants an end; the work may still finish in good order."""
        self.cancel_forced = False
        """The next pause point raises JobCancelled."""
        self._on_state = on_state
        self._hold_count = 0
        self._user_paused = False
        self._started = False
        self._released = Event()
        self._finalize = Event()
        self._over = Event()
        self._sleep: Future[None] | None = None
        self._kick_bh = self.ctx.new_bh(self._end_sleep, name=f"job {job_id} kick")
        self._enter(JobState.CREATED)

    # What a job's author writes.

    @abstractmethod
    async def work(self) -> None:
        """Do it. Context: `ctx`. Calls `pause_point` or `sleep_ns` between its steps.

        Raises: anything; OSError and ImageError are the world's fault, others are ours.
        """

    async def prepare(self) -> None:
        """The last step that may fail, after `work` succeeded."""
        return

    def commit(self) -> None:
        """The job succeeded: make it count. Can't fail."""
        return

    def abort(self) -> None:
        """The job failed or was cancelled: undo. Can't fail."""
        return

    def clean(self) -> None:
        """After either of the two: let go of nodes and files."""
        return

    def cancel_is_forced(self, *, force: bool) -> bool:
        """Whether a cancel ends the work at its next pause point.

        A mirror that is ready answers `force`: for it, a soft cancel is one of two good ends.
        """
        return True

    # What the work calls. Context: `ctx`.

    async def pause_point(self) -> None:
        """Stand still here while a pause lasts. Suspends: only then. Raises: JobCancelled."""
        while not self.cancel_forced and self._hold_count > 0:
            await run_in_context(self.main_ctx, self._stand_still)
        if self.cancel_forced:
            raise JobCancelled

    async def sleep_ns(self, duration_ns: int) -> None:
        """A pause point that lasts `duration_ns`, or until somebody kicks. Raises: JobCancelled."""
        self.ctx.assert_home()
        if not self.cancel_forced and self._hold_count == 0:
            self._sleep = Future()
            timer = self.ctx.new_timer(self._end_sleep)
            timer.arm(self.ctx.now_ns() + duration_ns)
            try:
                await self._sleep
            finally:
                timer.cancel()
                self._sleep = None
        await self.pause_point()

    async def become_ready(self) -> None:
        """Tell users that `complete` would be heard now."""
        await run_in_context(self.main_ctx, self._become_ready)

    def add_work(self, amount: int) -> None:
        """There is `amount` more to do than was known."""
        assert amount >= 0
        self.progress_total += amount

    def work_done(self, amount: int) -> None:
        """`amount` of the total is done."""
        assert amount >= 0
        self.progress_current += amount

    # What everybody else calls.

    def kick(self) -> None:
        """Let the work look at its pause point now. Context: any thread."""
        self._kick_bh.schedule()

    def start(self) -> None:
        """Begin. Legal once, on a job that is still CREATED."""
        assert not self._started, self.job_id
        self._started = True
        self._enter(JobState.RUNNING)
        self.main_ctx.spawn(self._live(), name=f"job {self.job_id}")

    async def wait(self) -> None:
        """Return when the job has concluded. Raises: the job's error."""
        await self._over.wait()
        if self.error is not None:
            raise self.error

    def hold(self) -> None:
        """Stop at the next pause point (a drained section does this). Counted."""
        self._hold_count += 1
        self.kick()

    def release(self) -> None:
        """Take back one `hold`."""
        assert self._hold_count > 0, self.job_id
        self._hold_count -= 1
        if self._hold_count == 0:
            self._released.set()

    def query(self) -> dict[str, Any]:
        """The job as query-jobs shows it."""
        shown: dict[str, Any] = {
            "id": self.job_id,
            "type": self.kind,
            "status": self.state.value,
            "current-progress": self.progress_current,
            "total-progress": self.progress_total,
        }
        if self.error is not None:
            shown["error"] = str(self.error)
        return shown

    # The verbs. Raises: JobError.

    def pause(self) -> None:
        """A user's hold: at most one at a time."""
        self._check(JobVerb.PAUSE)
        if self._user_paused:
            raise JobError("Job is already paused")
        self._user_paused = True
        self.hold()

    def resume(self) -> None:
        """Take back a user's hold."""
        self._check(JobVerb.RESUME)
        if not self._user_paused:
            raise JobError("Can't resume a job that was not paused")
        self._user_paused = False
        self.release()

    def set_speed(self, bytes_per_s: int) -> None:
        """Bound the rate of the work; 0 lifts the bound."""
        self._check(JobVerb.SET_SPEED)
        if bytes_per_s < 0:
            raise JobError("Speed must not be negative")
        self.speed_bytes_per_s = bytes_per_s
        self.kick()

    def complete(self) -> None:
        """Ask a ready job to come to its end."""
        self._check(JobVerb.COMPLETE)
        if self._user_paused or self.cancel_requested:
            raise JobError(f"The active block job '{self.job_id}' cannot be completed")
        self.complete_requested = True
        self.kick()

    def cancel(self, *, force: bool = False) -> None:
        """Ask for an end. It has come when `wait` returns, not when this does."""
        self._check(JobVerb.CANCEL)
        self.cancel_requested = True
        if not self._started:
            self._started = True
            self.cancel_forced = True
            self._fail(JobCancelled())
            self._conclude()
        elif self.state in (JobState.WAITING, JobState.PENDING):
            self.cancel_forced = True
            self._finalize.set()
        else:
            self.cancel_forced = self.cancel_forced or self.cancel_is_forced(force=force)
            self._released.set()
            self.kick()

    def finalize(self) -> None:
        """Let a pending job (auto_finalize off) take effect."""
        self._check(JobVerb.FINALIZE)
        self._finalize.set()

    def dismiss(self) -> None:
        """Forget a concluded job (auto_dismiss off)."""
        self._check(JobVerb.DISMISS)
        self._enter(JobState.NULL)

    # The machine.

    def _check(self, verb: JobVerb) -> None:
        self.main_ctx.assert_home()
        if not verb_allowed(verb, self.state):
            raise JobError(
                f"Job '{self.job_id}' in state '{self.state.value}' cannot accept "
                f"command verb '{verb.value}'"
            )

    def _enter(self, new: JobState) -> None:
        """Every change of state goes through here."""
        assert transition_allowed(self.state, new), (self.job_id, self.state, new)
        self.state = new
        if self._on_state is not None:
            self._on_state(self)

    def _end_sleep(self) -> None:
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)

    async def _stand_still(self) -> None:
        """The paused half of a pause point. Context: main."""
        if self._hold_count == 0 or self.cancel_forced:
            return
        before = self.state
        self._enter(JobState.STANDBY if before is JobState.READY else JobState.PAUSED)
        while self._hold_count > 0 and not self.cancel_forced:
            self._released.clear()
            await self._released.wait()
        self._enter(before)

    async def _become_ready(self) -> None:
        self._enter(JobState.READY)

    async def _work_entry(self) -> None:
        await self.pause_point()
        await self.work()

    async def _live(self) -> None:
        """From RUNNING to the end. Context: main."""
        try:
            await run_in_context(self.ctx, self._work_entry)
            await self._succeed()
        except (Exception, Cancelled) as error:
            self._fail(error)
        self._conclude()

    async def _succeed(self) -> None:
        """The work is done; wait for who has to agree, then make it count."""
        if self.cancel_forced:
            raise JobCancelled
        self._enter(JobState.WAITING)
        self._enter(JobState.PENDING)
        if not self.auto_finalize:
            await self._finalize.wait()
        if self.cancel_forced:
            raise JobCancelled
        await self.prepare()
        self.commit()

    def _fail(self, error: BaseException) -> None:
        self.error = JobCancelled() if isinstance(error, Cancelled) else error
        self._enter(JobState.ABORTING)
        self.abort()

    def _conclude(self) -> None:
        self.clean()
        self._kick_bh.delete()
        self._enter(JobState.CONCLUDED)
        if self.auto_dismiss:
            self._enter(JobState.NULL)
        self._over.set()
