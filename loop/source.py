# SPDX-License-Identifier: Apache-2.0
"""Source: something that a MainContext watches, after glib's GSource.

A subclass overrides up to three methods, which a MainContext calls in each iteration, always in the
thread that owns the context:

- `prepare()` before polling: is there something to do without polling, and if not, how long may the
  poll last for this source's sake?
- `check()` after polling, unless `prepare` said yes already: is there something to do now?
- `dispatch()` when either said yes; it returns False to be removed.

Beside these, a source is ready when its `ready_time_ns` has come, or when a descriptor that was
added with `add_unix_fd` has an event. Descriptors added with `add_poll` are polled, but judging
their `revents` is up to `check()`, as in glib.

Lower numbers are more urgent. While a source is ready, less urgent ones are neither polled nor
dispatched in that iteration.

A source that is being dispatched is not looked at by a nested iteration unless `can_recurse` is
set.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockemu.loop.main_context import MainContext

PRIORITY_HIGH = -100
PRIORITY_DEFAULT = 0
PRIORITY_HIGH_IDLE = 100
PRIORITY_DEFAULT_IDLE = 200
PRIORITY_LOW = 300

UNASKED_EVENTS = select.POLLERR | select.POLLHUP | select.POLLNVAL
"""Events that poll(2) reports whether or not they were asked for."""


class PollFD:
    """A descriptor, the events asked of it, and those that the last poll found.

    poll(2)'s bits; epoll's EPOLLIN, EPOLLOUT, EPOLLERR and EPOLLHUP have the same values.
    """

    __slots__ = ("events", "fd", "revents")

    def __init__(self, fd: int, events: int) -> None:
        self.fd = fd
        self.events = events
        self.revents = 0

    def __repr__(self) -> str:
        return f"PollFD(fd={self.fd}, events={self.events:#x}, revents={self.revents:#x})"


class Source:
    """An event source. It belongs to no context until `attach()`, and to at most one in its life.

    Context: a source that isn't attached belongs to whoever made it. Once attached, `destroy`,
    `set_ready_time` and `set_priority` may be called in any thread, the rest in the owner's.
    """

    def __init__(self, *, priority: int = PRIORITY_DEFAULT, name: str = "") -> None:
        self.name = name
        self.priority = priority
        self.can_recurse = False
        self.context: MainContext | None = None
        self.is_destroyed = False
        self.is_ready = False
        self.is_blocked = False
        self.is_dispatching = False
        self.sequence = 0
        self.ready_time_ns: int | None = None
        self.poll_fds: list[PollFD] = []
        self.unix_fds: list[PollFD] = []

    def prepare(self) -> tuple[bool, int | None]:
        """(ready, timeout_ns): None for no opinion on how long the poll may last."""
        return False, None

    def check(self) -> bool:
        """Whether there is something to dispatch, now that the poll is over."""
        return False

    def dispatch(self) -> bool:
        """Do what is to do. False removes the source from its context."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Called once, when the source has been destroyed and is not being dispatched any more."""

    def attach(self, context: MainContext) -> int:
        """Have `context` watch this source from its next iteration on. Returns an id above 0.

        Context: any thread.
        """
        return context.add_source(self)

    def destroy(self) -> None:
        """Never dispatch it again. A dispatch that is under way finishes. Twice is fine.

        Context: any thread.
        """
        context = self.context
        if context is not None:
            context.remove_source(self)
        else:
            self.is_destroyed = True

    def add_poll(self, poll_fd: PollFD) -> None:
        """Poll `poll_fd` in each iteration; `check()` looks at its `revents`."""
        assert not self.is_destroyed, f"source {self.name!r} is destroyed"
        self.poll_fds.append(poll_fd)
        self._polls_changed()

    def remove_poll(self, poll_fd: PollFD) -> None:
        """Undo `add_poll` of the same object."""
        self.poll_fds.remove(poll_fd)
        self._polls_changed()

    def add_unix_fd(self, fd: int, events: int) -> PollFD:
        """Poll `fd`, and be ready whenever it has one of `events`, an error or a hang-up."""
        assert not self.is_destroyed, f"source {self.name!r} is destroyed"
        poll_fd = PollFD(fd, events)
        self.unix_fds.append(poll_fd)
        self._polls_changed()
        return poll_fd

    def remove_unix_fd(self, poll_fd: PollFD) -> None:
        """Undo `add_unix_fd`, given what it returned."""
        self.unix_fds.remove(poll_fd)
        self._polls_changed()

    def set_ready_time(self, ready_time_ns: int | None) -> None:
        """Be ready once the context's clock reaches `ready_time_ns`; 0 for at once, None for never.

        It stays as it is until it is set anew: a dispatch that doesn't change it is called again.
        Context: any thread.
        """
        self.ready_time_ns = ready_time_ns
        context = self.context
        if context is not None:
            context.wakeup_if_foreign()

    def set_priority(self, priority: int) -> None:
        """Change the urgency; within its priority the source goes to the end of the line."""
        context = self.context
        if context is not None:
            context.reorder_source(self, priority)
        else:
            self.priority = priority

    def _polls_changed(self) -> None:
        context = self.context
        if context is not None and not self.is_blocked:
            context.polls_changed()
