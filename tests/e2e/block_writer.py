# SPDX-License-Identifier: Apache-2.0
"""A writer that knows, block by block, what the disk may hold after the server's end.

Every 4 KiB block carries its own number and a generation that grows with each write of it. The
writer keeps three facts per block: the generation that was acknowledged before a flush that
succeeded (`flushed`: must survive a kill), the last one acknowledged (`acknowledged`: must
survive a clean stop), and the last one sent (`sent`: nothing newer can be there). Several writes
are in flight at a time, never two on one block, as their order would be undefined.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from tests.e2e.raw_nbd import (
    CMD_FLUSH,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    FLAG_FUA,
    FLAG_NO_HOLE,
    NBD_OK,
    RawNbd,
    Reply,
)

BLOCK_BYTES = 4096
# Nothing promises that more than a sector is written whole or not at all.
SECTOR_BYTES = 512
READ_BLOCKS = 256
RUN_BLOCKS_MAX = 32
DEPTH = 16
FLUSH_EVERY = 40
FUA_SHARE = 0.05
ZEROES_SHARE = 0.15


def block_content(block: int, generation: int) -> bytes:
    """What a block holds after its `generation`-th write, if that wasn't one of zeroes."""
    return struct.pack(">QQ", block, generation) * (BLOCK_BYTES // 16)


def sector_generations(block: int, content: bytes, *, zeroes: int) -> list[int]:
    """The generation of each sector of a block; `zeroes` is the one that zeroes stand for."""
    found = []
    for start in range(0, BLOCK_BYTES, SECTOR_BYTES):
        sector = content[start : start + SECTOR_BYTES]
        if not any(sector):
            found.append(zeroes)
            continue
        generation = int.from_bytes(sector[8:16], "big")
        expected = block_content(block, generation)[:SECTOR_BYTES]
        assert sector == expected, f"block {block} holds foreign bytes at {start}: {sector[:32]!r}"
        found.append(generation)
    return found


class ReadsDisk(Protocol):
    """A client, or an image that has been copied out."""

    def read(self, offset: int, length: int) -> bytes: ...


class InFlight(NamedTuple):
    """A write that hasn't been answered yet."""

    blocks: range
    generations: list[int]
    fua: bool
    is_trim: bool = False
    """What it leaves, zeroes or what was there, nobody promises."""


class BlockWriter:
    """Random writes over one export, and the bookkeeping of what must have survived."""

    def __init__(self, blocks: int, rng: random.Random, *, trims_share: float = 0.0) -> None:
        self.blocks = blocks
        self.trims_share = trims_share
        # With all in flight there must be room for one more.
        self._run_blocks_max = min(RUN_BLOCKS_MAX, blocks // (2 * DEPTH))
        self.sent = [0] * blocks
        self.acknowledged = [0] * blocks
        self.flushed = [0] * blocks
        # Generations that were written as zeroes; 0 is what the block held before its first write.
        self.zeroed: list[set[int]] = [{0} for _ in range(blocks)]
        self._rng = rng
        self._in_flight: dict[int, InFlight] = {}

    def run(self, client: RawNbd, *, writes: int, at_end: Callable[[], None]) -> None:
        """Send `writes` writes and some flushes; then call `at_end` with requests still in flight.

        `at_end` ends the server; replies that still come are counted.
        """
        self._in_flight.clear()
        for number in range(writes):
            self._send_write(client)
            while len(self._in_flight) >= DEPTH:
                self._take_reply(client)
            if number % FLUSH_EVERY == FLUSH_EVERY - 1:
                self._flush(client)
        at_end()
        try:
            while self._in_flight:
                self._take_reply(client)
        except OSError:
            pass

    def _free_run(self) -> range:
        """Blocks that no request in flight touches."""
        busy = {block for write in self._in_flight.values() for block in write.blocks}
        while True:
            start = self._rng.randrange(self.blocks)
            length = min(self._rng.randint(1, self._run_blocks_max), self.blocks - start)
            blocks = range(start, start + length)
            if busy.isdisjoint(blocks):
                return blocks

    def _send_write(self, client: RawNbd) -> None:
        blocks = self._free_run()
        for block in blocks:
            self.sent[block] += 1
        generations = [self.sent[block] for block in blocks]
        offset, length = blocks.start * BLOCK_BYTES, len(blocks) * BLOCK_BYTES
        fua = self._rng.random() < FUA_SHARE
        flags = FLAG_FUA if fua else 0
        is_trim = self._rng.random() < self.trims_share
        if is_trim:
            cookie = client.send(CMD_TRIM, offset, length)
            for block in blocks:
                self.zeroed[block].add(self.sent[block])
        elif self._rng.random() < ZEROES_SHARE:
            flags |= self._rng.choice([0, FLAG_NO_HOLE])
            cookie = client.send(CMD_WRITE_ZEROES, offset, length, flags=flags)
            for block in blocks:
                self.zeroed[block].add(self.sent[block])
        else:
            pairs = zip(blocks, generations, strict=True)
            data = b"".join(block_content(block, generation) for block, generation in pairs)
            cookie = client.send(CMD_WRITE, offset, length, flags=flags, payload=data)
        self._in_flight[cookie] = InFlight(blocks, generations, fua, is_trim)

    def _take_reply(self, client: RawNbd) -> None:
        self._account(client.reply())

    def _account(self, reply: Reply) -> None:
        blocks, generations, fua, is_trim = self._in_flight.pop(reply.cookie)
        if reply.error != NBD_OK or is_trim:
            return
        for block, generation in zip(blocks, generations, strict=True):
            self.acknowledged[block] = generation
            if fua:
                self.flushed[block] = generation

    def _flush(self, client: RawNbd) -> None:
        """A flush covers what was acknowledged before it was sent; more writes may be in flight."""
        covered = list(self.acknowledged)
        cookie = client.send(CMD_FLUSH)
        while (reply := client.reply()).cookie != cookie:
            self._account(reply)
        assert reply.error == NBD_OK, reply
        self.flushed = [max(old, new) for old, new in zip(self.flushed, covered, strict=True)]

    def adopt(self, generations: list[int]) -> None:
        """Go on after a restart from what the disk turned out to hold."""
        self.acknowledged = list(generations)
        self.flushed = list(generations)

    def find_generations(self, client: ReadsDisk, at_least: list[int]) -> list[int]:
        """Read every block; each sector's generation lies between `at_least` and the last one sent.

        A block that was being written may be a mix of both, sector by sector: its lowest counts.
        """
        found = []
        for start in range(0, self.blocks, READ_BLOCKS):
            count = min(READ_BLOCKS, self.blocks - start)
            data = client.read(start * BLOCK_BYTES, count * BLOCK_BYTES)
            for index in range(count):
                content = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                block = start + index
                possible = range(at_least[block], self.sent[block] + 1)
                zeroes = [generation for generation in possible if generation in self.zeroed[block]]
                # Zeroes don't say when they were written: the oldest write of them that may be.
                generations = sector_generations(block, content, zeroes=min(zeroes, default=0))
                assert all(generation in possible for generation in generations), (
                    f"block {block} holds {generations}, expected {possible}"
                )
                found.append(min(generations))
        return found
