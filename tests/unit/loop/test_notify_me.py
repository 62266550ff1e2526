# SPDX-License-Identifier: Apache-2.0
"""No wake-up is lost, whatever the interleaving: every one of them is tried.

The sleeper's real code (`_poll`, `_timeout_ns`, `prepare`) runs under an opcode tracer. Before each
bytecode, where another thread could be given the GIL, the tracer may do a piece of the waker's
work: all of `BH.schedule()` at one place, or its steps at any two. Pieces that are left when the
sleeper reaches its sleep happen during it. A sleep that nothing would end is a lost wake-up.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from blockemu.loop import BH, AioContext
from blockemu.loop.poller import Notifier

Piece = Callable[[], Any]


class LostWakeUpError(AssertionError):
    pass


class Flag:
    """A notifier that only remembers."""

    def __init__(self) -> None:
        self.fd = 5
        self.is_set = False

    def set(self) -> None:
        self.is_set = True

    def test_and_clear(self) -> bool:
        was_set, self.is_set = self.is_set, False
        return was_set

    def close(self) -> None:
        pass


class Script:
    """Does pieces of work before the bytecodes of given numbers, and the rest in the sleep."""

    def __init__(self, *traced: Callable[..., Any]) -> None:
        self.codes = {function.__code__ for function in traced}
        self.plan: list[tuple[int, Piece]] = []
        self.opcodes_count = 0

    def tracer(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code not in self.codes:
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self.on_opcode

    def on_opcode(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            while self.plan and self.plan[0][0] <= self.opcodes_count:
                self.plan.pop(0)[1]()
            self.opcodes_count += 1
        return self.on_opcode

    def finish(self) -> None:
        while self.plan:
            self.plan.pop(0)[1]()

    def run(self, sleeper: Callable[[], Any], plan: list[tuple[int, Piece]]) -> int:
        self.plan = plan
        self.opcodes_count = 0
        previous = sys.gettrace()
        sys.settrace(self.tracer)
        try:
            sleeper()
        finally:
            sys.settrace(previous)
        return self.opcodes_count


class SleepPoller:
    """Sleeping lets the waker finish; then something must have ended the sleep."""

    def __init__(self) -> None:
        self.flag = Flag()
        self.script = Script(AioContext._poll, AioContext._timeout_ns, AioContext.prepare)

    def set_interest(self, fd: int, events: int) -> None:
        pass

    def wait(self, timeout_ns: int | None) -> list[tuple[int, int]]:
        if timeout_ns is None:
            self.script.finish()
            if not self.flag.is_set:
                raise LostWakeUpError
        return [(self.flag.fd, select.EPOLLIN)] if self.flag.is_set else []

    def has_work(self) -> bool:
        return False

    def set_external_silent(self, silent: bool) -> None:
        pass

    def fileno(self) -> int:
        return 99

    def new_notifier(self) -> Notifier:
        return self.flag

    def close(self) -> None:
        pass


class Rig:
    def __init__(self) -> None:
        self.poller = SleepPoller()
        self.ctx = AioContext("sleeper", poller=self.poller)
        self.ran: list[int] = []
        self.bh: BH = self.ctx.new_bh(lambda: self.ran.append(1))

    def by_poll(self) -> None:
        self.ctx.poll(blocking=True)

    def by_main_context(self) -> None:
        """What a MainContext does, with a poll(2) that only looks at this one."""
        ready, timeout_ns = self.ctx.prepare()
        assert self.ctx._poll_fd is not None
        if not ready:
            found = self.poller.wait(timeout_ns)
            self.ctx._poll_fd.revents = select.POLLIN if found else 0
            if not self.ctx.check():
                return
        self.ctx.dispatch()

    # The steps of BH.schedule, in its order.

    def flag_it(self) -> None:
        self.bh._urgent = True

    def queue_it(self) -> None:
        if self.bh._queued.acquire(blocking=False):
            self.ctx._bh_queue.append(self.bh)

    def wake_up(self) -> None:
        if self.ctx._notify_me:
            self.poller.flag.set()

    def flag_and_queue(self) -> None:
        self.flag_it()
        self.queue_it()

    def queue_and_wake(self) -> None:
        self.queue_it()
        self.wake_up()


def sleeper_length(way: str) -> int:
    """How many places there are in the sleeper's code."""
    rig = Rig()
    rig.bh.schedule()
    full = rig.poller.script.run(getattr(rig, way), [])
    rig = Rig()
    sleeping = rig.poller.script.run(getattr(rig, way), [(10**6, rig.bh.schedule)])
    assert min(full, sleeping) > 10, "the tracer saw nothing of the sleeper's code"
    return max(full, sleeping) + 5


def try_plan(way: str, *plan: tuple[int, str]) -> None:
    rig = Rig()
    pieces = [
        (place, rig.bh.schedule if name == "schedule" else getattr(rig, name))
        for place, name in plan
    ]
    try:
        rig.poller.script.run(getattr(rig, way), pieces)
        rig.poller.script.finish()
        if not rig.ran:
            getattr(rig, way)()  # Scheduled after the look at the queues: the next round's.
    except LostWakeUpError:
        pytest.fail(f"lost wake-up: {plan}")
    assert rig.ran == [1], plan
    assert rig.ctx._notify_me & ~1 == 0


@pytest.mark.parametrize("way", ["by_poll", "by_main_context"])
def test_schedule_at_any_bytecode_of_the_sleeper_is_seen(way: str) -> None:
    for place in range(sleeper_length(way)):
        try_plan(way, (place, "schedule"))


@pytest.mark.parametrize("way", ["by_poll", "by_main_context"])
@pytest.mark.parametrize(
    ("first", "second"), [("flag_and_queue", "wake_up"), ("flag_it", "queue_and_wake")]
)
def test_schedule_split_over_any_two_bytecodes_is_seen(way: str, first: str, second: str) -> None:
    length = sleeper_length(way)
    for early in range(length):
        for late in range(early, length):
            try_plan(way, (early, first), (late, second))


def test_the_wrong_order_of_steps_loses_wake_ups() -> None:
    """The test's own test: looking at the flag before queueing must be caught."""

    def try_all() -> None:
        length = sleeper_length("by_poll")
        for early in range(length):
            for late in range(early, length):
                try_plan("by_poll", (early, "wake_up"), (late, "flag_and_queue"))

    with pytest.raises(pytest.fail.Exception, match="lost wake-up"):
        try_all()
