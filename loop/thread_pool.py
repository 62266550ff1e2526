# SPDX-License-Identifier: Apache-2.0
"""ThreadPool: calls that block (fdatasync, fallocate, a read that misses the page cache), off the
loop.

Waking a thread is what costs here (40-50 us; the job itself is often shorter), so the pool is built
to do little of it:

- Threads are started on demand, when a job finds no idle worker, up to `workers_max`; a worker that
  has had nothing to do for `IDLE_TIMEOUT_S` ends.
- A worker that finishes takes the next job without sleeping. If more jobs are queued than workers
  are idle, and no more workers may be started, it takes several at a time and delivers them
  together.
- Completions collect in a list; one BH, scheduled once per batch, delivers all that are in it. It
  writes to the eventfd only if the loop sleeps.

Two counts decide, both under one lock: `_waiting`, the workers that sleep or are about to look at
the queue, and `_queued`, the jobs that nobody has taken. A submitter starts a worker if there are
more jobs than waiting workers; a worker whose time is up leaves only if no job is queued. So a job
never lies behind a worker that is busy while another one could be started, and never in a queue
that the last worker has just left.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from blockemu.loop.coroutine import Future

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

T = TypeVar("T")

WORKERS_MAX = 16
"""As many requests as a disk's queue is usually worth; each thread costs a stack."""

BATCH_MAX = 8
"""Jobs that a worker takes at once: the first of a batch waits for the last to be delivered."""

IDLE_TIMEOUT_S = 10.0
"""How long a worker waits for its next job before it ends."""


class _Job:
    __slots__ = ("args", "done", "fn", "result")

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], done: Callable[[Any], None]
    ) -> None:
        self.fn = fn
        self.args = args
        self.done = done
        self.result: Any = None

    def run(self) -> None:
        try:
            self.result = self.fn(*self.args)
        except BaseException as error:
            self.result = error


class ThreadPool:
    """Worker threads of one context. Context: its home thread; jobs run in workers."""

    def __init__(
        self,
        ctx: AioContext,
        *,
        workers_max: int = WORKERS_MAX,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        assert workers_max > 0, "a pool needs a worker"
        self._ctx = ctx
        self._workers_max = workers_max
        self._idle_timeout_s = idle_timeout_s
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._workers: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._waiting = 0
        self._queued = 0
        self._started_count = 0
        self._completed: deque[_Job] = deque()
        self._bh = ctx.new_bh(self._deliver, name="thread pool")
        self._closed = False

    @property
    def workers_count(self) -> int:
        """How many threads there are now."""
        return len(self._workers)

    def submit(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        done: Callable[[Any], None],
    ) -> None:
        """Run `fn(*args)` in a worker, then `done(its result, or the exception it raised)` at home.

        Jobs start in the order of submission and may finish in any. A function that returns an
        exception can't be told from one that raises it.
        Context: home thread.
        Raises: RuntimeError when the system refuses to start even one worker.
        """
        assert not self._closed, "the thread pool is closed"
        self._ctx.assert_home()
        with self._lock:
            if self._queued >= self._waiting and len(self._workers) < self._workers_max:
                self._start_worker()
            self._queued += 1
            self._queue.put(_Job(fn, args, done))

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn(*args)` in a worker and return what it returns.

        Suspends: until it has run. Shielded: a cancellation is delivered after that.
        Raises: what `fn` raises.
        """
        future: Future[T] = Future(shielded=True)

        def done(result: Any) -> None:
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

        self.submit(fn, args, done)
        return await future

    def close(self) -> None:
        """Let queued jobs run, end the workers, and deliver what they did. Twice is fine.

        Context: home thread. It blocks for as long as the jobs take.
        """
        if self._closed:
            return
        self._closed = True
        workers = list(self._workers)
        for _ in workers:
            self._queue.put(None)
        for worker in workers:
            worker.join()
        self._workers.clear()
        self._deliver()
        self._bh.delete()

    def _start_worker(self) -> None:
        self._started_count += 1
        worker = threading.Thread(
            target=self._work, name=f"{self._ctx.name}-worker-{self._started_count}", daemon=True
        )
        try:
            worker.start()
        except RuntimeError:
            if not self._workers:
                raise
            return  # Out of threads: those that there are do it.
        self._workers.add(worker)
        self._waiting += 1

    def _deliver(self) -> None:
        completed = self._completed
        for _ in range(len(completed)):
            job = completed.popleft()
            try:
                job.done(job.result)
            except Exception as error:
                self._ctx.exception_handler(f"completion of {job.fn!r}", error)

    # In the workers

    def _work(self) -> None:
        # Whoever started us has counted us as waiting.
        while batch := self._take_batch():
            for job in batch:
                job.run()
            self._completed.extend(batch)
            self._bh.schedule()
            # Let go of the jobs, and of the buffers in them, before a long sleep.
            del job, batch
            with self._lock:
                self._waiting += 1

    def _take_batch(self) -> list[_Job]:
        """Jobs to run now; none when the worker is to end. Waits for them."""
        while True:
            try:
                job = self._queue.get(timeout=self._idle_timeout_s)
            except queue.Empty:
                if self._leave_if_unneeded():
                    return []
                continue
            if job is None:
                return []  # close() joins us, and forgets us then.
            with self._lock:
                self._waiting -= 1
                self._queued -= 1
                batch = [job]
                for _ in range(self._extra_jobs()):
                    # Jobs beyond those that waiting workers can take are ours under the lock.
                    extra = self._queue.get_nowait()
                    assert extra is not None, "a sentinel overtook a job"
                    self._queued -= 1
                    batch.append(extra)
                return batch

    def _leave_if_unneeded(self) -> bool:
        with self._lock:
            if self._queued:
                return False
            self._waiting -= 1
            self._workers.discard(threading.current_thread())
            return True

    def _extra_jobs(self) -> int:
        """This worker's share of a queue that all workers together can't take one by one."""
        if self._queued <= self._waiting or len(self._workers) < self._workers_max:
            return 0
        return min(BATCH_MAX - 1, (self._queued - self._waiting) // self._workers_max)
