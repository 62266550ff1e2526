# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom on guest clusters."""

from __future__ import annotations

import random

import pytest

from blockemu.drivers.qcow2.cluster_lock import ClusterLocks
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Cancelled
from blockemu.loop.sync import gather, sleep_ns


def test_shared_holders_do_not_wait(ctx: AioContext) -> None:
    locks = ClusterLocks()
    one, two = locks.try_shared(0, 5), locks.try_shared(3, 9)
    assert one is not None
    assert two is not None


def test_exclusive_waits_for_all_who_overlap_and_nobody_else(ctx: AioContext) -> None:
    locks = ClusterLocks()
    one, two, other = locks.try_shared(0, 1), locks.try_shared(2, 3), locks.try_shared(9, 9)
    assert one is not None
    assert two is not None
    assert other is not None
    waiting = ctx.spawn(locks.exclusive(1, 2))
    locks.release(one)
    ctx.poll(blocking=False)
    assert not waiting.done()
    locks.release(two)
    while ctx.poll(blocking=False):
        pass
    assert waiting.done()
    assert locks.try_shared(7, 7) is None  # only the fast way is shut


def test_shared_hold_is_upgraded_unless_somebody_else_is_there(ctx: AioContext) -> None:
    locks = ClusterLocks()
    one, two = locks.try_shared(0, 5), locks.try_shared(5, 9)
    assert one is not None
    assert two is not None
    assert not locks.try_upgrade(one)
    locks.release(two)
    assert locks.try_upgrade(one)
    reader = ctx.spawn(locks.shared(5, 5))
    writer = ctx.spawn(locks.exclusive(6, 6))
    assert not reader.done()
    assert writer.done()
    locks.release(one)
    while ctx.poll(blocking=False):
        pass
    assert reader.done()


def test_upgrade_does_not_overtake_who_waits(ctx: AioContext) -> None:
    locks = ClusterLocks()
    held = locks.try_shared(0, 0)
    assert held is not None
    waiting = ctx.spawn(locks.exclusive(0, 0))
    assert not locks.try_upgrade(held)
    locks.release(held)
    while ctx.poll(blocking=False):
        pass
    assert waiting.done()


def test_newcomer_does_not_overtake_a_waiting_exclusive(ctx: AioContext) -> None:
    locks = ClusterLocks()
    one = locks.try_shared(0, 0)
    assert one is not None
    exclusive = ctx.spawn(locks.exclusive(0, 0))
    late = ctx.spawn(locks.shared(0, 0))
    locks.release(one)
    while ctx.poll(blocking=False):
        pass
    assert exclusive.done()
    assert not late.done()
    locks.release(exclusive.result())
    while ctx.poll(blocking=False):
        pass
    assert late.done()


def test_cancelled_waiter_leaves_nothing_behind(ctx: AioContext) -> None:
    locks = ClusterLocks()
    one = locks.try_shared(0, 0)
    assert one is not None
    waiting = ctx.spawn(locks.exclusive(0, 0))
    waiting.cancel()
    while ctx.poll(blocking=False):
        pass
    with pytest.raises(Cancelled):
        waiting.result()
    assert len(locks) == 1
    assert locks.try_shared(0, 0) is not None
    locks.release(one)


def test_random_holders_never_clash(ctx: AioContext, seed: int) -> None:
    rng = random.Random(seed)
    locks = ClusterLocks()
    held: list[list[bool]] = [[] for _ in range(10)]

    async def user() -> None:
        first = rng.randrange(10)
        last = min(first + rng.randrange(4), 9)
        exclusive = rng.random() < 0.4
        await sleep_ns(rng.randrange(1, 50))
        lock = await (locks.exclusive if exclusive else locks.shared)(first, last)
        for cluster in range(first, last + 1):
            assert not any(held[cluster])
            assert not (exclusive and held[cluster])
            held[cluster].append(exclusive)
        await sleep_ns(rng.randrange(1, 20))
        for cluster in range(first, last + 1):
            held[cluster].remove(exclusive)
        locks.release(lock)

    ctx.run(gather(*(user() for _ in range(300))))
    assert not len(locks)
