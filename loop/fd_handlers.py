# SPDX-License-Identifier: Apache-2.0
"""The fd handlers of an AioContext, and the walk that calls them.

Handlers come and go while they are called, by their own hand and by others', and a nested poll may
walk them in the middle of a walk. The rules that keep this right:

- The walk goes over the poller's list of events and looks each descriptor up, so one that has been
  removed meanwhile is not found, and is not called.
- Each handler remembers the last round in which it was set or called (its fence). A walk skips
  handlers whose fence is its own round or a later one: they were set during the walk, perhaps for
  another file with the same number, or a nested poll has called them since. Skipping is safe,
  because pollers are level-triggered: what is still ready is reported again.

The poller hears of a change only when what is wanted of a descriptor really differs.
"""

from __future__ import annotations

import select
from collections.abc import Callable

from blockemu.loop.poller import Poller

_IN = select.EPOLLIN
_OUT = select.EPOLLOUT
# Errors and hang-ups go to whoever listens: the system call that follows says what happened.
_READ_MASK = select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP
_WRITE_MASK = select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP


class _Handler:
    __slots__ = ("external", "fence", "read", "write")

    def __init__(
        self,
        read: Callable[[], None] | None,
        write: Callable[[], None] | None,
        external: bool,
        fence: int,
    ) -> None:
        self.read = read
        self.write = write
        self.external = external
        self.fence = fence

    def interest(self) -> int:
        return (_IN if self.read is not None else 0) | (_OUT if self.write is not None else 0)


class FdHandlers:
    """Which callbacks belong to which descriptor. Context: home thread of its AioContext."""

    __slots__ = ("_handlers", "_poller", "external_disable_count")

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._handlers: dict[int, _Handler] = {}
        self.external_disable_count = 0

    def set(
        self,
        fd: int,
        read: Callable[[], None] | None,
        write: Callable[[], None] | None,
        *,
        external: bool,
        round_: int,
    ) -> None:
        """What `AioContext.set_fd_handler` says; `round_` is the latest round that was begun."""
        if read is None and write is None:
            if self._handlers.pop(fd, None) is not None:
                self._poller.set_interest(fd, 0)
            return
        handler = _Handler(read, write, external, round_)
        silent = external and self.external_disable_count > 0
        self._poller.set_interest(fd, 0 if silent else handler.interest())
        self._handlers[fd] = handler

    def disable_external(self) -> None:
        """Silence external handlers; calls nest."""
        self.external_disable_count += 1
        if self.external_disable_count == 1:
            self._poller.set_external_silent(True)
            for fd, handler in self._handlers.items():
                if handler.external:
                    self._poller.set_interest(fd, 0)

    def enable_external(self) -> None:
        """Undo one `disable_external`."""
        assert self.external_disable_count > 0, "enable_external without disable_external"
        self.external_disable_count -= 1
        if self.external_disable_count == 0:
            self._poller.set_external_silent(False)
            for fd, handler in self._handlers.items():
                if handler.external:
                    self._poller.set_interest(fd, handler.interest())

    def dispatch(
        self,
        events: list[tuple[int, int]],
        round_: int,
        report: Callable[[str, Exception], None],
    ) -> bool:
        """Call the handlers that `events` names. True when one was called."""
        lookup = self._handlers.get
        progress = False
        for fd, revents in events:
            handler = lookup(fd)
            if handler is None or handler.fence >= round_:
                continue
            if handler.external and self.external_disable_count:
                continue
            handler.fence = round_
            progress = True
            write = handler.write
            read = handler.read
            try:
                if read is not None and revents & _READ_MASK:
                    read()
                    if write is not None and lookup(fd) is not handler:
                        continue
                    # A drained section may have begun in `read`.
                    if handler.external and self.external_disable_count:
                        continue
                if write is not None and revents & _WRITE_MASK:
                    write()
            except Exception as error:
                report(f"handler of fd {fd}", error)
        return progress
