# SPDX-License-Identifier: Apache-2.0
"""The native poll: its C half under sanitizers, and what Python makes of its events.

Here a test posts events itself, by the library's poll_post. tests/unit/loop/test_poller.py has the
promises that this poller shares with the others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockemu.loop import AioContext, EpollPoller, MainContext, MemoryPoller, VirtualClock
from blockemu.loop._poll import ffi, lib
from blockemu.loop.native_poller import EVENTS_FD, NativePoller
from blockemu.loop.poller import PollParams

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "loop" / "native"
IN = 1


def post(poller: NativePoller, token: int, what: int, value: int = 0) -> None:
    library: Any = lib
    library.poll_post(poller.handle, token, what, value)


@pytest.fixture
def native() -> Iterator[NativePoller]:
    made = NativePoller()
    yield made
    made.close()


@pytest.fixture
def native_ctx(native: NativePoller) -> Iterator[AioContext]:
    made = AioContext("native", poller=native)
    yield made
    made.close()


# The C half


@pytest.mark.parametrize(
    ("harness", "sanitizers"),
    [
        ("native_poll_harness.c", "address,undefined"),
        ("native_poll_harness.c", "thread"),
        ("native_poll_aio_harness.c", "address,undefined"),
    ],
)
def test_c_part_keeps_its_contract_under_sanitizers(
    tmp_path: Path, harness: str, sanitizers: str
) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path / "harness"
    build = subprocess.run(
        [
            compiler,
            "-std=gnu11",
            "-D_GNU_SOURCE",
            "-DNDEBUG",  # as distutils compiles; assertions hold all the same
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-fsanitize={sanitizers}",
            "-fno-sanitize-recover=all",
            f"-I{NATIVE}",
            str(HERE / harness),
            "-o",
            str(program),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in build.stderr and "san" in build.stderr:
        pytest.skip("the compiler has no sanitizers installed")
    assert build.returncode == 0, build.stderr
    image = tmp_path / "image"
    image.write_bytes(b"".join(bytes([page]) * 4096 for page in range(64)))
    run = subprocess.run(
        [str(program), str(image)], capture_output=True, text=True, check=False, timeout=50
    )
    assert run.returncode == 0, run.stdout + run.stderr


# Which poller


@pytest.mark.parametrize(
    ("variable", "argument", "expected"),
    [
        (None, None, True),
        ("1", None, True),
        ("0", None, False),
        ("0", True, True),
        ("1", False, False),
    ],
)
def test_native_poller_is_chosen_by_argument_then_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, argument: bool | None, expected: bool
) -> None:
    if variable is None:
        monkeypatch.delenv("BLOCKEMU_NATIVE", raising=False)
    else:
        monkeypatch.setenv("BLOCKEMU_NATIVE", variable)
    ctx = AioContext(native=argument)
    assert (ctx.native is not None) == expected
    assert isinstance(ctx._poller, NativePoller if expected else EpollPoller)
    ctx.adopt()
    ctx.set_poll_params(PollParams(max_ns=1000))
    if ctx.native is not None:
        assert ctx.native.handle.poll_max_ns == 1000
    ctx.close()


def test_given_poller_wins(clock: VirtualClock) -> None:
    ctx = AioContext(clock=clock, poller=MemoryPoller(clock), native=True)
    assert ctx.native is None
    ctx.close()


# Events


def test_events_reach_the_callback_of_their_token_in_order(
    native_ctx: AioContext, native: NativePoller
) -> None:
    seen: list[tuple[str, int, int]] = []
    one = native.add_native(lambda what, value: seen.append(("one", what, value)))
    two = native.add_native(lambda what, value: seen.append(("two", what, value)))
    post(native, one, 1, 2**64 - 1)
    post(native, two, 2, 5)
    post(native, one, 3)
    assert native_ctx.poll(blocking=True)
    assert seen == [("one", 1, 2**64 - 1), ("two", 2, 5), ("one", 3, 0)]
    assert not native_ctx.poll(blocking=False)


def test_events_of_a_removed_token_go_nowhere(native_ctx: AioContext, native: NativePoller) -> None:
    token = native.add_native(lambda what, value: pytest.fail("it was removed"))
    post(native, token, 1)
    native.remove_native(token)
    native_ctx.poll(blocking=True)
    assert native.add_native(lambda what, value: None) != token


def test_callback_may_remove_one_whose_events_wait(
    native_ctx: AioContext, native: NativePoller
) -> None:
    seen: list[int] = []

    def callback(what: int, value: int) -> None:
        seen.append(what)
        if what == 1:
            native.remove_native(other)

    token = native.add_native(callback)
    other = native.add_native(lambda what, value: pytest.fail("it was removed"))
    post(native, token, 1)
    post(native, other, 2)
    post(native, token, 3)
    native_ctx.poll(blocking=True)
    assert seen == [1, 3]


def test_events_behind_one_whose_callback_raises_come_in_the_next_round(
    native_ctx: AioContext, native: NativePoller
) -> None:
    seen: list[int] = []
    errors: list[str] = []

    def callback(what: int, value: int) -> None:
        if what == 2:
            raise RuntimeError("broken")
        seen.append(what)

    native_ctx.exception_handler = lambda what, error: errors.append(str(error))
    token = native.add_native(callback)
    for what in (1, 2, 3):
        post(native, token, what)
    native_ctx.poll(blocking=True)
    assert (seen, errors) == ([1], ["broken"])
    assert native.has_work()
    native_ctx.poll(blocking=True)
    assert seen == [1, 3]
    assert not native.has_work()


def test_nested_poll_hands_out_the_rest_once(native_ctx: AioContext, native: NativePoller) -> None:
    seen: list[int] = []

    def callback(what: int, value: int) -> None:
        seen.append(what)
        if what == 1:
            post(native, token, 4)
            native_ctx.poll(blocking=True)
            assert seen == [1, 2, 3, 4]

    token = native.add_native(callback)
    for what in (1, 2, 3):
        post(native, token, what)
    native_ctx.poll(blocking=True)
    assert seen == [1, 2, 3, 4]


def test_events_come_with_ready_descriptors(native: NativePoller) -> None:
    notifier = native.new_notifier()
    native.set_interest(notifier.fd, IN)
    notifier.set()
    post(native, 7, 1)
    assert native.wait(None) == [(notifier.fd, IN), (EVENTS_FD, IN)]
    native.set_interest(notifier.fd, 0)
    assert native.wait(10**9) == [(EVENTS_FD, IN)]  # not handed out yet
    notifier.close()


def test_events_are_not_external(native_ctx: AioContext, native: NativePoller) -> None:
    seen: list[int] = []
    token = native.add_native(lambda what, value: seen.append(what))
    native_ctx.disable_external()
    assert native.handle.external_disabled
    native_ctx.disable_external()
    post(native, token, 1)
    native_ctx.poll(blocking=True)
    assert seen == [1]
    native_ctx.enable_external()
    assert native.handle.external_disabled
    native_ctx.enable_external()
    assert not native.handle.external_disabled


def test_attached_context_does_not_sleep_on_events(
    clock: VirtualClock, native: NativePoller
) -> None:
    """They have no descriptor that a MainContext could poll."""

    def poll(poll_fds: object, timeout_ns: int | None) -> None:
        assert timeout_ns == 0, "it would sleep"

    main = MainContext(clock=clock, poll=poll)
    ctx = AioContext(clock=clock, poller=native)
    ctx.attach(main)
    seen: list[int] = []
    token = native.add_native(lambda what, value: seen.append(what))
    post(native, token, 1)
    assert main.iteration(may_block=True)
    assert seen == [1]
    assert not main.iteration(may_block=False)
    ctx.close()
    main.close()


# The rest of the Python side


def test_address_is_the_structure_for_other_libraries(native: NativePoller) -> None:
    assert ffi.cast("struct native_poll *", native.address) == native.handle


def test_adaptive_polling_is_set_in_qemus_terms(native: NativePoller) -> None:
    native.set_poll_params(PollParams(max_ns=10**12, grow=3, shrink=4))
    poll = native.handle
    assert (poll.poll_max_ns, poll.poll_grow, poll.poll_shrink) == (10**12, 3, 4)
    poll.poll_ns = 10**12
    assert native.wait(20_000_000) == []
    assert native.counters()["spins_missed"] == 1
    assert native.counters()["sleeps"] == 0
    native.set_poll_params(PollParams())
    assert poll.poll_ns == 0
    assert native.wait(20_000_000) == []
    assert native.counters()["sleeps"] == 1
    assert native.counters()["passes"] == 2


def test_aio_is_enabled_once(native: NativePoller) -> None:
    if not native.enable_aio():
        pytest.skip("the kernel has no Linux AIO to give")
    aio = native.handle.aio
    assert native.enable_aio()
    assert native.handle.aio == aio
    assert not native.has_work()
    assert native.wait(0) == []


def test_close_gives_the_descriptors_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    poller = NativePoller()
    poller.enable_aio()
    poller.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_gil_is_free_while_it_waits(native_ctx: AioContext) -> None:
    """Two threads wake each other in turns, through notify_me and the notifier."""
    turns = 2000
    ran = 0
    answered = threading.Semaphore(0)

    def answer() -> None:
        nonlocal ran
        ran += 1
        answered.release()

    def ask() -> None:
        for _ in range(turns):
            native_ctx.schedule_oneshot(answer)
            assert answered.acquire(timeout=30)

    native_ctx.adopt()
    thread = threading.Thread(target=ask)
    thread.start()
    native_ctx.run_until(lambda: ran == turns)
    thread.join()
