# SPDX-License-Identifier: Apache-2.0
"""Futures and tasks: plain `async def`, driven by an AioContext.

A coroutine runs in its context's home thread until it awaits a Future that isn't done. Then its
Task is hung on that future, and the future's completion, in whichever thread it happens, puts the
task on the context's `_woken` queue. The loop steps what is there in the same round. Nothing else
is ever queued: a coroutine that never has to wait runs from its first to its last line inside
`spawn`.

How a completion can't get lost between threads. The completer stores the result, then sets `_done`,
then pops waiters one by one. A waiter appends itself, then looks at `_done` again; if it is set by
now, it tries to remove itself, which either succeeds (nobody woke it, and it goes on by itself) or
fails (the completer popped it, and its wake-up is under way). Appending to, popping from and
removing from a list are atomic in CPython, so exactly one of the two happens.

Cancellation is an exception, Cancelled, thrown at the place where the task waits. It is not an
Exception, so that `except Exception` lets it through. A future may be shielded: then Cancelled
arrives when the future completes, not before. I/O futures are: the kernel goes on writing into a
buffer whether or not somebody lost interest, so whoever owns the buffer must not leave before.
Awaiting another task leaves that task alone: who cancels the waiter doesn't cancel the worker.

A task that fails while nobody looks would fail silently. Its exception is kept in a small object
that reports it to the context's `exception_handler` when it dies unread.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from blockemu.loop.current import running, running_context

if TYPE_CHECKING:
    from blockemu.loop.aio_context import AioContext

T = TypeVar("T")


class Cancelled(BaseException):
    """Thrown into a coroutine whose task is cancelled. Clean up, and let it through."""


class NotDoneError(RuntimeError):
    """The result of a future was asked for before there was one."""


class Waiter(Protocol):
    """Something that hangs on a future."""

    def _wake(self) -> None:
        """The future is done. Context: any thread."""


class Future(Generic[T]):
    """A result that is not there yet. `await` it, or have it call back.

    Context: `set_result`, `set_exception`, `done` and `result`: any thread. Whoever waits resumes
    in the context where it waits: in this round, if the completion happens in its home thread's
    round.
    """

    __slots__ = ("__weakref__", "_done", "_exception", "_value", "_waiters", "shielded")

    def __init__(self, *, shielded: bool = False) -> None:
        self.shielded = shielded
        self._done = False
        self._value: T | None = None
        self._exception: BaseException | None = None
        self._waiters: list[Waiter] = []

    def done(self) -> bool:
        """Whether there is a result or an exception."""
        return self._done

    def set_result(self, value: T) -> None:
        """Complete it, and wake who waits.

        Raises: RuntimeError when it is done already.
        """
        if self._done:
            raise RuntimeError("this future is done already")
        self._value = value
        self._done = True
        if self._waiters:
            self._wake_waiters()

    def set_exception(self, exception: BaseException) -> None:
        """Complete it with an exception, which is raised in who waits.

        Raises: RuntimeError when it is done already.
        """
        if self._done:
            raise RuntimeError("this future is done already")
        self._exception = exception
        self._done = True
        if self._waiters:
            self._wake_waiters()

    def result(self) -> T:
        """The result.

        Raises: the exception that it was completed with; NotDoneError when it isn't done.
        """
        if not self._done:
            raise NotDoneError("this future is not done")
        if self._exception is not None:
            raise self._exception
        return cast(T, self._value)

    def exception(self) -> BaseException | None:
        """The exception that it was completed with, None when it has a result.

        Raises: NotDoneError when it isn't done.
        """
        if not self._done:
            raise NotDoneError("this future is not done")
        return self._exception

    def add_done_callback(self, callback: Callable[[Future[T]], None]) -> None:
        """Call `callback(self)` when it is done, once.

        If this is called while a context runs, the callback runs there as a woken coroutine does
        (also if the future is done already). Outside of any, it is called by the completing thread,
        inside `set_result`, or at once.
        """
        waiter = _DoneCallback(running.ctx, self, callback)
        self._waiters.append(waiter)
        if self._done:
            self._wake_if_unwoken(waiter)

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            yield self
        return self.result()

    def _wake_waiters(self) -> None:
        waiters = self._waiters
        while waiters:
            try:
                waiter = waiters.pop(0)
            except IndexError:
                break  # A waiter in another thread has just removed itself.
            waiter._wake()

    def _wake_if_unwoken(self, waiter: Waiter) -> None:
        try:
            self._waiters.remove(waiter)
        except ValueError:
            return  # The completer was faster.
        waiter._wake()


class _DoneCallback:
    """A callback that hangs on a future, and on the woken queue when the future is done."""

    __slots__ = ("_callback", "_ctx", "_future")

    def __init__(
        self,
        ctx: AioContext | None,
        future: Future[T],
        callback: Callable[[Future[T]], None],
    ) -> None:
        self._ctx = ctx
        self._future: Future[Any] = future
        self._callback: Callable[[Future[Any]], None] = callback

    def _wake(self) -> None:
        ctx = self._ctx
        if ctx is None:
            self._callback(self._future)
            return
        ctx._woken.append(self)
        if ctx._notify_me:
            ctx._notifier.set()

    def _step(self) -> None:
        assert self._ctx is not None
        try:
            self._callback(self._future)
        except Exception as error:
            self._ctx.exception_handler(f"done callback {self._callback!r}", error)


class _Unread:
    """Dies together with a failed task, unless somebody has read the exception before."""

    __slots__ = ("_ctx", "_exception", "_name")

    def __init__(self, ctx: AioContext, name: str, exception: Exception) -> None:
        self._ctx = ctx
        self._name = name
        self._exception: Exception | None = exception

    def disarm(self) -> None:
        self._exception = None

    def __del__(self) -> None:
        exception = self._exception
        if exception is not None:
            # Any thread, any moment: the handler must run in a round, where it may raise.
            self._ctx.report_later(f"task {self._name}, which nobody awaited", exception)


class Task(Future[T]):
    """A coroutine under way. It is the Future of what the coroutine returns.

    Made by `AioContext.spawn` and `spawn_threadsafe`.
    """

    __slots__ = (
        "_awaiting", "_cancel_pending", "_coro", "_factory", "_send", "_unread", "ctx", "name",
    )  # fmt: skip

    def __init__(
        self,
        ctx: AioContext,
        coro: Coroutine[Any, Any, T] | None,
        name: str = "",
    ) -> None:
        self.shielded = False
        self._done = False
        self._value = None
        self._exception = None
        self._waiters = []
        self.ctx = ctx
        self.name = name
        self._coro = coro
        self._factory: Callable[[], Coroutine[Any, Any, T]] | None = None
        self._awaiting: Future[Any] | None = None
        self._cancel_pending = False
        self._unread: _Unread | None = None
        if coro is not None:
            self._send = coro.send

    def __repr__(self) -> str:
        coro = self._coro
        name = self.name or getattr(coro, "__qualname__", "task")
        return f"<Task {name} in {self.ctx.name}{', done' if self._done else ''}>"

    def cancel(self) -> None:
        """Throw Cancelled into the coroutine where it waits, or where it waits next.

        If it waits for a shielded future, Cancelled arrives when that completes. A coroutine may
        catch it and go on; then it has been cancelled in vain, and may be cancelled again. Nothing
        happens to a task that is done.
        Context: any thread; outside the home thread it takes effect in a later round.
        """
        if self._done:
            return
        if self.ctx.is_home():
            self._cancel_at_home()
        else:
            self.ctx.schedule_oneshot(self._cancel_at_home)

    def cancelled(self) -> bool:
        """Whether it is done, and ended by Cancelled."""
        return self._done and isinstance(self._exception, Cancelled)

    def result(self) -> T:
        if self._unread is not None:
            self._unread.disarm()
        return super().result()

    def exception(self) -> BaseException | None:
        if self._unread is not None:
            self._unread.disarm()
        return super().exception()

    def abandon(self) -> None:
        """Close the coroutine where it waits, because its context goes away; it ends as cancelled.

        Context: home thread, while it isn't running.
        """
        coro = self._coro
        if self._done or coro is None:
            return
        if self._awaiting is not None and self in self._awaiting._waiters:
            self._awaiting._waiters.remove(self)
        try:
            coro.close()
        except Exception as error:
            self.ctx.exception_handler(f"{self!r} when it was abandoned", error)
        self.ctx._tasks.discard(self)
        self.set_exception(Cancelled())

    def _cancel_at_home(self) -> None:
        if self._done:
            return
        self._cancel_pending = True
        awaiting = self._awaiting
        if awaiting is not None and not awaiting.shielded:
            awaiting._wake_if_unwoken(self)

    def _wake(self) -> None:
        ctx = self.ctx
        ctx._woken.append(self)
        if ctx._notify_me:
            ctx._notifier.set()

    def _start(self) -> None:
        """First step of a task that another thread made: only now is there a coroutine."""
        factory = self._factory
        assert factory is not None
        self._factory = None
        if self._cancel_pending:
            self.set_exception(Cancelled())
            return
        try:
            self._coro = factory()
        except BaseException as error:
            self._fail(error)
            return
        self._send = self._coro.send
        self._step()

    def _step(self) -> None:
        """Run the coroutine until it waits or ends. Context: home thread, ctx running."""
        ctx = self.ctx
        outer = ctx._task
        ctx._task = self
        self._awaiting = None
        try:
            if self._cancel_pending:
                self._cancel_pending = False
                assert self._coro is not None
                awaited = self._coro.throw(Cancelled())
            else:
                awaited = self._send(None)
        except StopIteration as stop:
            ctx._task = outer
            if ctx._tasks:
                ctx._tasks.discard(self)
            self._value = stop.value
            self._done = True
            if self._waiters:
                self._wake_waiters()
        except BaseException as error:
            ctx._task = outer
            self._fail(error)
        else:
            ctx._task = outer
            self._suspend(awaited)

    def _suspend(self, awaited: Any) -> None:
        ctx = self.ctx
        if not isinstance(awaited, Future):
            # Somebody else's awaitable, asyncio's say. Tell the coroutine where it stands.
            self._send = _ThrowOnce(self, TypeError(f"blockemu tasks can't await {awaited!r}"))
            ctx._tasks.add(self)
            ctx._woken.append(self)
            return
        ctx._tasks.add(self)
        self._awaiting = awaited
        awaited._waiters.append(self)
        if awaited._done or (self._cancel_pending and not awaited.shielded):
            awaited._wake_if_unwoken(self)

    def _fail(self, error: BaseException) -> None:
        if error.__traceback__ is not None:
            # The first frame is `_step`, whose locals hold the task: a cycle that would keep an
            # unread exception from being reported until the garbage collector comes by.
            error.__traceback__ = error.__traceback__.tb_next
        self.ctx._tasks.discard(self)
        if isinstance(error, Exception):
            self._unread = _Unread(self.ctx, repr(self), error)
        self.set_exception(error)
        if not isinstance(error, Exception | Cancelled):
            raise error  # KeyboardInterrupt and its like stop the loop as well.


class _ThrowOnce:
    """Stands in for `send` for one step, and throws instead."""

    __slots__ = ("_error", "_task")

    def __init__(self, task: Task[Any], error: Exception) -> None:
        self._task = task
        self._error = error

    def __call__(self, value: None) -> Any:
        coro = self._task._coro
        assert coro is not None
        self._task._send = coro.send
        return coro.throw(self._error)


def current_task() -> Task[Any] | None:
    """The task whose coroutine is running in this thread right now.

    Context: any thread.
    """
    ctx = running.ctx
    return ctx._task if ctx is not None else None


async def run_in_context(ctx: AioContext, factory: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `factory()` in `ctx`'s home thread, and come back here with its result.

    Cancelling the caller cancels what runs over there, and waits until it has ended.
    Context: any task.
    Suspends: until it is done over there, unless `ctx` is the running context already.
    """
    if running_context() is ctx:
        return await factory()
    return await _await_remote(ctx, factory)


async def run_on_fresh_stack(factory: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `factory()` in this context, but from its loop: its calls don't nest in the caller's.

    For recursion whose depth is somebody else's choice: done every so many levels, it keeps each
    stack short of the interpreter's limit. Cancelling the caller cancels it, and waits for its end.
    Suspends: until it is done.
    """
    return await _await_remote(running_context(), factory)


async def _await_remote(ctx: AioContext, factory: Callable[[], Coroutine[Any, Any, T]]) -> T:
    remote = ctx.spawn_threadsafe(factory)
    try:
        return await remote
    except Cancelled:
        if remote.done():
            raise
        remote.cancel()
        await settled(remote)
        raise


async def settled(future: Future[Any]) -> None:
    """Wait until `future` is done, whatever its result, and even if the waiter is cancelled.

    Suspends: until `future` is done. A cancellation in the meantime is delivered then.
    """
    latch: Future[None] = Future(shielded=True)
    future.add_done_callback(lambda _: latch.set_result(None))
    await latch
