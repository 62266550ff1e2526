# SPDX-License-Identifier: Apache-2.0
"""TRIM, WRITE_ZEROES and CACHE of ranges that are longer than any request with data."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.nbd.protocol import Command, CommandFlag, NbdError
from blockemu.loop.aio_context import AioContext
from blockemu.nbd.long_range import PIECE_BYTES, PIECES_MAX, PREFETCH_BYTES, PREFETCH_BYTES_MAX
from tests.unit.nbd.conftest import Serve, Served
from tests.unit.nbd.fakes import FakeBackend

READ = Command.NBD_CMD_READ
TRIM = Command.NBD_CMD_TRIM
CACHE = Command.NBD_CMD_CACHE
WRITE_ZEROES = Command.NBD_CMD_WRITE_ZEROES
FUA = CommandFlag.NBD_CMD_FLAG_FUA
FAST_ZERO = CommandFlag.NBD_CMD_FLAG_FAST_ZERO
GIB = 1 << 30
UNMAP = RequestFlags.MAY_UNMAP


class HugeBackend(FakeBackend):
    """A disk too large for memory: zeroes, which nothing changes. It keeps a diary all the same."""

    size = 1 << 62

    @property
    def length_bytes(self) -> int:
        return self.size

    async def preadv(self, offset: int, view: memoryview) -> None:
        await self._enter("preadv", offset, len(view))
        view[:] = bytes(len(view))

    async def pwrite_zeroes(
        self, offset: int, length: int, flags: RequestFlags = RequestFlags.NONE
    ) -> None:
        await self._enter("pwrite_zeroes", offset, length, flags)


@pytest.fixture
def served(serve: Serve, ctx: AioContext) -> Served:
    """A connection to one."""
    return serve(backend=HugeBackend(ctx, 0))


def ask(served: Served, command: int, *, flags: int = 0, offset: int = 0, length: int) -> int:
    """A request that the backend is called for many times: the error of its reply."""
    served.client.request(command, cookie=5, flags=flags, offset=offset, length=length)
    done = -1
    while len(served.backend.calls) != done:
        done = len(served.backend.calls)
        served.client.rounds(500)
    cookie, error, _ = served.client.reply()
    assert cookie == 5
    return error


def covered(calls: list[tuple[Any, ...]], offset: int, length: int) -> bool:
    """The calls cover the range, in order and without gaps."""
    for _, at, size, *_ in calls:
        if at != offset:
            return False
        offset += size
        length -= size
    return not length


@pytest.mark.parametrize(("command", "call"), [(TRIM, "pdiscard"), (WRITE_ZEROES, "pwrite_zeroes")])
def test_range_is_worked_through_in_pieces(served: Served, command: int, call: str) -> None:
    assert ask(served, command, offset=4096, length=3 * GIB) == 0
    calls = served.backend.calls
    assert {made[0] for made in calls} == {call}
    assert covered(calls, 4096, 3 * GIB)
    assert all(made[2] <= PIECE_BYTES for made in calls)
    assert all(made[1] % PIECE_BYTES == 0 for made in calls[1:])


@pytest.mark.style_only("extended")
@pytest.mark.parametrize(("command", "call"), [(TRIM, "pdiscard"), (WRITE_ZEROES, "pwrite_zeroes")])
def test_pieces_grow_so_that_their_number_is_bounded(
    served: Served, command: int, call: str
) -> None:
    assert ask(served, command, length=1 << 62) == 0
    assert covered(served.backend.calls, 0, 1 << 62)
    assert len(served.backend.calls) <= PIECES_MAX + 1


@pytest.mark.parametrize(("command", "call"), [(TRIM, "pdiscard"), (WRITE_ZEROES, "pwrite_zeroes")])
def test_others_get_their_turn_between_the_pieces(served: Served, command: int, call: str) -> None:
    client = served.client
    client.request(command, cookie=1, length=3 * GIB)
    client.request(READ, cookie=2, length=8)
    assert client.reply(8) == (2, 0, bytes(8))
    client.rounds(100)
    assert client.reply() == (1, 0, b"")


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_fua_of_a_long_range_is_one_flush(served: Served, command: int) -> None:
    assert ask(served, command, flags=FUA, length=3 * GIB) == 0
    assert served.backend.calls[-1] == ("flush",)
    assert [made[0] for made in served.backend.calls].count("flush") == 1
    if command == WRITE_ZEROES:
        assert {made[3] for made in served.backend.calls[:-1]} == {UNMAP}


def test_fast_zero_that_isnt_fast_ends_with_the_first_piece(served: Served) -> None:
    served.backend.fail("pwrite_zeroes", errno.ENOTSUP)
    assert ask(served, WRITE_ZEROES, flags=FAST_ZERO, length=3 * GIB) == NbdError.NBD_ENOTSUP
    flags = UNMAP | RequestFlags.NO_FALLBACK
    assert served.backend.calls == [("pwrite_zeroes", 0, PIECE_BYTES, flags)]


def test_client_that_goes_ends_its_long_range(served: Served) -> None:
    served.backend.held = True
    served.client.request(TRIM, length=3 * GIB)
    served.client.until(lambda: bool(served.backend.waiting))
    served.connection.drop("it has gone")
    served.backend.held = False
    served.backend.end()
    served.client.rounds(100)
    assert served.closed == [True]
    assert len(served.backend.calls) == 1


# --- CACHE ---


def test_cache_reads_and_sends_nothing(serve: Serve) -> None:
    served = serve()
    served.client.request(CACHE, cookie=7, offset=4096, length=100_000)
    assert served.client.reply() == (7, 0, b"")
    assert served.backend.calls == [("preadv", 4096, 100_000)]
    assert served.client.silent()


def test_cache_of_a_long_range_reads_its_beginning_in_pieces(served: Served) -> None:
    assert ask(served, CACHE, offset=4096, length=3 * GIB) == 0
    assert covered(served.backend.calls, 4096, PREFETCH_BYTES_MAX)
    assert {made[2] for made in served.backend.calls} == {PREFETCH_BYTES}


def test_cache_that_fails_says_so(serve: Serve) -> None:
    served = serve()
    served.backend.fail("preadv", errno.EIO)
    served.client.request(CACHE, cookie=7, length=512)
    assert served.client.reply() == (7, NbdError.NBD_EIO, b"")
