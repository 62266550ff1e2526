# SPDX-License-Identifier: Apache-2.0
"""What a server says of a range, as runs: cut, aligned, and never further than it said."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from blockemu.drivers.nbd.client_handshake import ExportFacts
from blockemu.drivers.nbd.protocol import TransmissionFlag
from blockemu.drivers.nbd.remote_status import FIRST_SPAN_BYTES, RemoteStatus
from blockemu.drivers.nbd.replies import InFlight
from blockemu.drivers.status_runs import ALLOCATED, DATA, ZERO
from blockemu.loop.aio_context import AioContext

MEANING = [DATA | ALLOCATED, 0, DATA | ZERO | ALLOCATED, ZERO | ALLOCATED]


class Link:
    """A server of these extents, which says as much as it likes."""

    def __init__(self, extents: list[tuple[int, int]], block: int, *, extended: bool) -> None:
        self.extents = extents
        self.asked: list[tuple[int, int, int]] = []
        self.said_max = 1000
        self.facts = ExportFacts(
            length=sum(length for length, _ in extents),
            flags=TransmissionFlag(1),
            block_min=block,
            block_preferred=4096,
            payload_max=1 << 25,
            structured=True,
            context=1,
            extended=extended,
        )

    async def request(self, command: int, flags: int, offset: int, length: int) -> InFlight:
        self.asked.append((flags, offset, length))
        assert not (offset | length) % self.facts.block_min
        answer = InFlight(1, command, offset=offset, length=length, view=None)
        position = 0
        for extent, state in self.extents:
            start, position = max(position, offset), position + extent
            if position > start and start < offset + length:
                answer.extents.append((position - start, state))
        answer.extents = answer.extents[: 1 if flags else self.said_max]
        return answer


def ask(link: Any, offset: int, length: int, *, only_one: bool) -> list[tuple[int, int]]:
    ctx = AioContext("test")
    ctx.adopt()
    runs = ctx.run(RemoteStatus(link).ask(offset, length, only_one=only_one))
    ctx.close()
    return list(zip(runs.lengths, runs.states, strict=True))


@given(st.data())
def test_runs_are_what_the_extents_are(data: st.DataObject) -> None:
    """Byte by byte, for any range, whatever the server's blocks."""
    block = data.draw(st.sampled_from([1, 4, 16]))
    step = data.draw(st.sampled_from([1, block]))
    lengths = st.integers(1, 8).map(lambda count: count * step)
    extents = data.draw(st.lists(st.tuples(lengths, st.integers(0, 3)), min_size=1, max_size=9))
    size = sum(length for length, _ in extents)
    if size % block:
        extents.append((block - size % block, 0))
        size += extents[-1][0]
    states = [state for length, state in extents for _ in range(length)]
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    link = Link(extents, block, extended=data.draw(st.booleans()))
    link.said_max = data.draw(st.integers(1, 9))
    position = offset
    for run, state in ask(link, offset, length, only_one=data.draw(st.booleans())):
        for byte in range(position, position + run):
            # A block whose end the server doesn't tell is data: no more is said of it than that.
            cautious = step < block and state == DATA | ALLOCATED
            assert state == MEANING[states[byte]] or cautious
        position += run
    assert offset < position <= offset + length


def test_behind_the_end_are_zeroes_and_without_a_context_all_is_data() -> None:
    link = Link([(4096, 1)], 512, extended=False)
    assert ask(link, 4096, 512, only_one=True) == [(512, ZERO | ALLOCATED)]
    link.facts = dataclasses.replace(link.facts, context=None)
    assert ask(link, 0, 8192, only_one=False) == [(4096, DATA | ALLOCATED)]
    assert not link.asked


def test_the_span_follows_what_comes_back() -> None:
    """Halved where a gigabyte has too many extents, doubled where it has few."""
    ctx = AioContext("test")
    ctx.adopt()
    few: Any = Link([(1 << 40, 1)], 512, extended=True)
    status = RemoteStatus(few)
    for _ in range(3):
        ctx.run(status.ask(0, 1 << 40, only_one=False))
    spans = [FIRST_SPAN_BYTES, FIRST_SPAN_BYTES * 2, FIRST_SPAN_BYTES * 4]
    assert few.asked == [(0, 0, span) for span in spans]
    many: Any = Link([(512, index % 2) for index in range(20_000)], 512, extended=True)
    many.facts = dataclasses.replace(many.facts, length=1 << 40)
    many.said_max = 20_000
    status = RemoteStatus(many)
    for _ in range(3):
        ctx.run(status.ask(0, 1 << 40, only_one=False))
    spans = [FIRST_SPAN_BYTES, FIRST_SPAN_BYTES // 2, FIRST_SPAN_BYTES // 4]
    assert many.asked == [(0, 0, span) for span in spans]
    ctx.run(status.ask(0, 1 << 40, only_one=True))
    assert many.asked[-1] == (8, 0, 1 << 40)
    ctx.close()
