# SPDX-License-Identifier: Apache-2.0
"""Who may touch which guest clusters: shared for I/O in place, exclusive to change the mapping.

A request that reads or writes a cluster where it lies holds the cluster *shared* from the look-up
of the mapping to the end of the host I/O. A request that allocates, zeroes or discards holds its
clusters *exclusive*. So a host cluster can't be freed, let alone handed out again, under a request
that still uses it, and of two allocating writes to one guest cluster the second finds the first
one's result. A request that finds only then that it must allocate, and that nobody else is at its
clusters, makes its shared hold exclusive (`try_upgrade`); else it lets go and gets in line.

A request locks its whole range of clusters at once and waits only for requests that came before
it: there is no cycle to wait in, and nobody starves. Locks are few (one a request in flight), so
conflicts are found by walking them; the common case, no exclusive lock anywhere, walks nothing.

Context: home thread of the node's AioContext.
"""

from __future__ import annotations

from blockemu.loop.coroutine import Future


class ClusterRange:
    """One request's hold on the guest clusters `first` to `last`, both included."""

    __slots__ = ("exclusive", "first", "last", "waiters")

    def __init__(self, first: int, last: int, *, exclusive: bool) -> None:
        self.first = first
        self.last = last
        self.exclusive = exclusive
        self.waiters: list[Future[None]] | None = None


class ClusterLocks:
    """The ranges that are held or waited for, in order of arrival."""

    __slots__ = ("_exclusive", "_ranges")

    def __init__(self) -> None:
        # A dict for its order and its cheap removal; the values mean nothing.
        self._ranges: dict[ClusterRange, None] = {}
        self._exclusive = 0

    def __len__(self) -> int:
        return len(self._ranges)

    def try_shared(self, first: int, last: int) -> ClusterRange | None:
        """The shared lock if nothing at all is in its way, else None. Suspends: never."""
        if self._exclusive:
            return None
        held = ClusterRange(first, last, exclusive=False)
        self._ranges[held] = None
        return held

    async def shared(self, first: int, last: int) -> ClusterRange:
        """Hold the clusters against changes of their mapping.

        Suspends: while older exclusive holders overlap.
        """
        held = ClusterRange(first, last, exclusive=False)
        await self._enter(held)
        return held

    async def exclusive(self, first: int, last: int) -> ClusterRange:
        """Hold the clusters alone. Suspends: while older holders of any kind overlap."""
        held = ClusterRange(first, last, exclusive=True)
        self._exclusive += 1
        await self._enter(held)
        return held

    def try_upgrade(self, held: ClusterRange) -> bool:
        """Make a shared hold exclusive, if nobody else holds or waits for any of its clusters.

        Suspends: never.
        """
        first, last = held.first, held.last
        for other in self._ranges:
            if other.first <= last and first <= other.last and other is not held:
                return False
        held.exclusive = True
        self._exclusive += 1
        return True

    def may_change(self, first: int, last: int) -> bool:
        """Whether anybody holds any of the clusters alone, or waits to."""
        return self._exclusive > 0 and any(
            held.exclusive and held.first <= last and first <= held.last for held in self._ranges
        )

    def release(self, held: ClusterRange) -> None:
        """Let go; whoever waited for this range looks again."""
        del self._ranges[held]
        self._exclusive -= held.exclusive
        if held.waiters is not None:
            for waiter in held.waiters:
                waiter.set_result(None)

    async def _enter(self, held: ClusterRange) -> None:
        self._ranges[held] = None
        try:
            while (older := self._conflict(held)) is not None:
                waiter: Future[None] = Future()
                if older.waiters is None:
                    older.waiters = []
                older.waiters.append(waiter)
                await waiter
        except BaseException:
            self.release(held)
            raise

    def _conflict(self, held: ClusterRange) -> ClusterRange | None:
        if not self._exclusive:
            return None
        first, last, exclusive = held.first, held.last, held.exclusive
        for other in self._ranges:
            if other is held:
                return None  # the rest came later
            if (exclusive or other.exclusive) and other.first <= last and first <= other.last:
                return other
        raise AssertionError("a range that waits is in the list")
