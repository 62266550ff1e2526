# SPDX-License-Identifier: Apache-2.0
"""BLOCK_STATUS on the wire, over a fake disk whose runs a test decides."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any, cast

import pytest

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.dirty_bitmap import DirtyBitmap
from blockemu.drivers.nbd.protocol import ChunkType, Command, CommandFlag, NbdError
from blockemu.drivers.status_runs import ALLOCATED, DATA, DEPTH_SHIFT, ZERO, StatusRuns
from blockemu.exports import Export
from blockemu.limits import Limits
from blockemu.loop.aio_context import AioContext
from blockemu.nbd.meta_context import MetaContext, contexts_of
from blockemu.nbd.reply_style import STYLES
from blockemu.nbd.session import Session
from tests.unit.nbd.client import Chunk, Client
from tests.unit.nbd.conftest import STYLE_NAMES, Serve, Served
from tests.unit.nbd.fakes import FakeBackend

pytestmark = pytest.mark.style_only("structured", "extended")

STATUS = Command.NBD_CMD_BLOCK_STATUS
REQ_ONE = CommandFlag.NBD_CMD_FLAG_REQ_ONE
PAYLOAD_LEN = CommandFlag.NBD_CMD_FLAG_PAYLOAD_LEN
BLOCK = 4096
BLOCKS = 256

STATES = [
    # state in the graph, base:allocation, qemu:allocation-depth
    (ALLOCATED | DATA | 1 << DEPTH_SHIFT, 0, 1),
    (ALLOCATED | DATA | ZERO | 1 << DEPTH_SHIFT, 2, 1),
    (ALLOCATED | ZERO | 2 << DEPTH_SHIFT, 3, 2),
    (ALLOCATED | DATA | 300 << DEPTH_SHIFT, 0, 300),
    (ZERO, 3, 0),
    (0, 1, 0),
]


class MappedBackend(FakeBackend):
    """Every BLOCK of it is in the next one of `states`. From `broken_at` on nobody knows."""

    def __init__(self, ctx: AioContext, states: list[int]) -> None:
        super().__init__(ctx, BLOCKS * BLOCK)
        self.states = states
        self.broken_at = len(self.disk)
        self.per_call = BLOCKS
        self.asked: list[tuple[int, int, int]] = []

    async def status_runs(self, offset: int, length: int, *, runs_max: int) -> StatusRuns:
        await self._enter("status_runs", offset, length)
        self.asked.append((offset, length, runs_max))
        assert 0 < length <= self.length_bytes - offset
        if offset >= self.broken_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        runs, position = StatusRuns(), offset
        end = min(offset + length, self.broken_at, offset + self.per_call * BLOCK)
        while position < end and len(runs) < runs_max:
            step = min(BLOCK - position % BLOCK, end - position)
            runs.add(step, self.states[position // BLOCK % len(self.states)])
            position += step
        return runs


class Asker:
    """A client that has chosen all contexts of an export."""

    def __init__(self, served: Served, contexts: tuple[MetaContext, ...], style: str) -> None:
        self.client: Client = served.client
        self.export = served.export
        self.contexts = contexts
        self.extended = style == "extended"

    def send(self, *, offset: int = 0, length: int, flags: int = 0, ids: Any = None) -> None:
        """Ask; with `ids`, by a payload."""
        if ids is None:
            self.client.request(STATUS, flags=flags, cookie=7, offset=offset, length=length)
            return
        payload = struct.pack(f">Q{len(ids)}I", length, *ids)
        self.client.request(
            STATUS, flags=flags | PAYLOAD_LEN, cookie=7, offset=offset, payload=payload
        )

    def extents(self, **request: Any) -> dict[int, list[tuple[int, int]]]:
        """The answer: (length, state) of each extent, by context id."""
        self.send(**request)
        found: dict[int, list[tuple[int, int]]] = {}
        while True:
            chunk = self.client.chunk()
            assert chunk.cookie == 7
            number, extents = self.parse(chunk)
            assert number not in found
            found[number] = extents
            if chunk.done:
                return found

    def parse(self, chunk: Chunk) -> tuple[int, list[tuple[int, int]]]:
        """A status chunk, as the document has it for the style."""
        if self.extended:
            assert chunk.kind == ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS_EXT
            number, count = struct.unpack_from(">II", chunk.payload)
            assert len(chunk.payload) == 8 + 16 * count > 8
            return number, list(struct.iter_unpack(">QQ", chunk.payload[8:]))
        assert chunk.kind == ChunkType.NBD_REPLY_TYPE_BLOCK_STATUS
        (number,) = struct.unpack_from(">I", chunk.payload)
        assert len(chunk.payload) > 4
        return number, list(struct.iter_unpack(">II", chunk.payload[4:]))

    def error(self, **request: Any) -> tuple[int, str, int | None]:
        """The error that is the answer."""
        self.send(**request)
        chunk = self.client.chunk()
        assert chunk.done
        return chunk.error


class Start:
    """`start(backend)`: a connection that has chosen contexts."""

    def __init__(self, serve: Serve, style: str) -> None:
        self._serve, self._style = serve, style

    def __call__(
        self, backend: MappedBackend, *, limits: Limits | None = None, bitmaps: Any = (),
        names: Any = None,
    ) -> Asker:  # fmt: skip
        export = Export("disk", cast("BlockBackend", backend))
        export.allocation_depth, export.bitmaps = True, tuple(bitmaps)
        contexts = tuple(
            context for context in contexts_of(export) if names is None or context.name in names
        )
        session = Session(export, STYLES[STYLE_NAMES.index(self._style)], contexts)
        served = self._serve(export=export, backend=backend, limits=limits, session=session)
        return Asker(served, contexts, self._style)


@pytest.fixture
def start(serve: Serve, style: str) -> Start:
    return Start(serve, style)


def merged(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for length, state in pairs:
        if found and found[-1][1] == state:
            length += found.pop()[0]
        found.append((length, state))
    return found


def test_each_context_gets_its_chunk_with_extents_merged(ctx: AioContext, start: Start) -> None:
    asker = start(MappedBackend(ctx, [state for state, _, _ in STATES]))
    found = asker.extents(offset=0, length=BLOCKS * BLOCK)
    states = [STATES[block % len(STATES)] for block in range(BLOCKS)]
    assert found == {
        0: merged([(BLOCK, base) for _, base, _ in states]),
        1: merged([(BLOCK, depth) for _, _, depth in states]),
    }


def test_extents_begin_and_end_with_the_request(ctx: AioContext, start: Start) -> None:
    asker = start(MappedBackend(ctx, [STATES[0][0], STATES[4][0]]), names={"base:allocation"})
    assert asker.extents(offset=100, length=BLOCK) == {0: [(BLOCK - 100, 0), (100, 3)]}
    assert asker.extents(offset=BLOCKS * BLOCK - 1, length=1) == {0: [(1, 3)]}


@pytest.mark.parametrize("per_call", [7, 16, 100])
def test_answers_of_many_turns_are_joined(ctx: AioContext, start: Start, per_call: int) -> None:
    backend = MappedBackend(ctx, [STATES[0][0]] * 5 + [STATES[4][0]] * 3)
    backend.per_call = per_call
    asker = start(backend, names={"base:allocation"})
    found = asker.extents(length=BLOCKS * BLOCK)
    assert found == {0: merged([(5 * BLOCK, 0), (3 * BLOCK, 3)] * (BLOCKS // 8))}
    assert len(backend.asked) == -(-BLOCKS // per_call)


def test_req_one_gets_the_first_extent_whole(ctx: AioContext, start: Start) -> None:
    backend = MappedBackend(ctx, [STATES[0][0], STATES[3][0], STATES[4][0]])
    backend.per_call = 1
    asker = start(backend)
    found = asker.extents(length=BLOCKS * BLOCK, flags=REQ_ONE)
    assert found == {0: [(2 * BLOCK, 0)], 1: [(BLOCK, 1)]}
    assert asker.extents(length=10, flags=REQ_ONE) == {0: [(10, 0)], 1: [(10, 1)]}


def test_one_answer_has_a_bounded_length_and_the_client_gets_on(
    ctx: AioContext, start: Start, style: str
) -> None:
    backend = MappedBackend(ctx, [STATES[0][0], STATES[4][0]])
    extent_bytes = 16 if style == "extended" else 8
    asker = start(backend, limits=Limits(status_reply_bytes_max=2 * 10 * extent_bytes))
    position, seen = 0, []
    while position < BLOCKS * BLOCK:
        found = asker.extents(offset=position, length=BLOCKS * BLOCK - position)
        assert [len(extents) for extents in found.values()] == [10, 10] or position > 240 * BLOCK
        seen += found[0]
        position += sum(length for length, _ in found[0])
    assert seen == [(BLOCK, 0), (BLOCK, 3)] * (BLOCKS // 2)


def test_one_answer_takes_a_bounded_number_of_turns(ctx: AioContext, start: Start) -> None:
    backend = MappedBackend(ctx, [STATES[0][0]])
    backend.per_call = 1
    limits = Limits(status_turns_max=5)
    asker = start(backend, limits=limits, names={"base:allocation"})
    assert asker.extents(length=BLOCKS * BLOCK) == {0: [(5 * BLOCK, 0)]}


def test_others_are_served_between_the_turns(ctx: AioContext, start: Start) -> None:
    backend = MappedBackend(ctx, [STATES[0][0], STATES[4][0]])
    backend.per_call = 1
    asker = start(backend)
    asker.send(length=BLOCKS * BLOCK)
    asker.client.request(Command.NBD_CMD_READ, cookie=8, length=16)
    assert asker.client.reply(16) == (8, 0, bytes(16))
    assert len(backend.asked) < BLOCKS // 2
    asker.client.rounds(2 * BLOCKS)
    assert asker.client.chunk().cookie == 7


# --- bitmaps ---


def test_a_bitmap_is_told_as_far_as_it_reaches(ctx: AioContext, start: Start) -> None:
    bitmap = DirtyBitmap("b", 10 * BLOCK + 5, granularity=BLOCK, enabled=False)
    bitmap.set(BLOCK, 1)
    bitmap.set(2 * BLOCK, BLOCK)
    bitmap.set(10 * BLOCK, 5)
    asker = start(
        MappedBackend(ctx, [0]), bitmaps=[bitmap], names={"qemu:dirty-bitmap:b", "base:allocation"}
    )
    rest = (BLOCKS - 10) * BLOCK - 5
    assert asker.extents(length=BLOCKS * BLOCK) == {
        0: [(BLOCKS * BLOCK, 1)],
        2: [(BLOCK, 0), (2 * BLOCK, 1), (7 * BLOCK, 0), (5, 1), (rest, 0)],
    }
    assert asker.extents(offset=BLOCK + 7, length=1)[2] == [(1, 1)]
    assert asker.extents(offset=100 * BLOCK, length=9)[2] == [(9, 0)]


# --- errors ---


def test_what_is_not_known_ends_the_answer_or_fails_it(ctx: AioContext, start: Start) -> None:
    backend = MappedBackend(ctx, [STATES[0][0]])
    backend.broken_at = 3 * BLOCK
    asker = start(backend, names={"base:allocation"})
    assert asker.extents(offset=BLOCK, length=9 * BLOCK) == {0: [(2 * BLOCK, 0)]}
    value, text, _ = asker.error(offset=3 * BLOCK, length=BLOCK)
    assert (value, text) == (NbdError.NBD_EIO, os.strerror(errno.EIO))
    assert asker.extents(length=1) == {0: [(1, 0)]}, "the connection goes on"


@pytest.mark.parametrize(
    "request_",
    [
        {"length": 0},
        {"length": BLOCKS * BLOCK + 1},
        {"offset": BLOCKS * BLOCK, "length": 1},
        {"offset": 2**64 - 1, "length": 1},
        {"length": 512, "flags": CommandFlag.NBD_CMD_FLAG_DF},
        {"length": 512, "flags": CommandFlag.NBD_CMD_FLAG_NO_HOLE},
    ],
)
def test_invalid_requests_are_refused(
    ctx: AioContext, start: Start, request_: dict[str, Any]
) -> None:
    backend = MappedBackend(ctx, [0])
    asker = start(backend)
    assert asker.error(**request_)[0] == NbdError.NBD_EINVAL
    assert not backend.asked
    assert asker.extents(length=512)


# --- requests that choose contexts ---


@pytest.mark.style_only("extended")
def test_a_payload_chooses_contexts(ctx: AioContext, start: Start) -> None:
    asker = start(MappedBackend(ctx, [STATES[0][0], STATES[4][0]]))
    assert asker.extents(length=BLOCK, ids=[1]) == {1: [(BLOCK, 1)]}
    assert asker.extents(offset=BLOCK, length=BLOCK, ids=[0]) == {0: [(BLOCK, 3)]}
    assert asker.extents(length=2 * BLOCK, ids=[1, 0], flags=REQ_ONE) == {
        1: [(BLOCK, 1)], 0: [(BLOCK, 0)],
    }  # fmt: skip


@pytest.mark.style_only("extended")
@pytest.mark.parametrize(
    ("length", "ids"),
    [
        (BLOCK, []),
        (BLOCK, [9]),
        (BLOCK, [0, 0]),
        (BLOCK, [0, 1, 0]),
        (BLOCK, [0] * 50_000),
        (0, [0]),
        (BLOCKS * BLOCK + 1, [0]),
        (2**64 - 1, [0]),
    ],
)
def test_a_wrong_payload_is_taken_and_refused(
    ctx: AioContext, start: Start, length: int, ids: list[int]
) -> None:
    asker = start(MappedBackend(ctx, [0]))
    assert asker.error(length=length, ids=ids)[0] == NbdError.NBD_EINVAL
    assert asker.extents(length=512)


@pytest.mark.style_only("extended")
@pytest.mark.parametrize("payload", [b"x", bytes(9), bytes(14)])
def test_a_payload_of_odd_length_is_refused(ctx: AioContext, start: Start, payload: bytes) -> None:
    asker = start(MappedBackend(ctx, [0]))
    asker.client.request(STATUS, flags=PAYLOAD_LEN, cookie=1, payload=payload)
    assert asker.client.chunk().error[0] == NbdError.NBD_EINVAL
    assert asker.extents(length=512)


# --- what it may cost ---


def test_answers_count_as_memory_in_flight(ctx: AioContext, start: Start) -> None:
    backend = MappedBackend(ctx, [0])
    backend.held = True
    mib = 1 << 20
    limits = Limits(request_length_max=mib, in_flight_bytes_max=4 * mib, status_reply_bytes_max=mib)
    asker = start(backend, limits=limits)
    for _ in range(9):
        asker.send(length=512)
    asker.client.rounds()
    assert len(backend.waiting) == 1
    assert len(asker.export.status_turn._waiters) == 3, "four have begun, the others aren't read"
    answered = 0
    while backend.waiting:
        backend.end()
        asker.client.rounds()
        answered += 1
    assert answered == 9
