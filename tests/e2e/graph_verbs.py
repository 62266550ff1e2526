# SPDX-License-Identifier: Apache-2.0
"""Everything that may change a block graph while clients use it: one coroutine a verb, in `VERBS`.

A new verb is a coroutine here and a line in that table. It gets a `Graph`, whose `lots` are parts
of the disk that it alone writes, though they share blocks and clusters with those of the clients.
What clients own it may change in a drained section only, and must put back.

Each verb also judges: inside a drained section nothing may change or begin, a held map answers
nothing, what is behind the end of a disk that grows is zero, own lots hold what was written.

Context: home thread of the backend's AioContext.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from blockemu.drivers._direct_map import lib
from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.direct_map import DirectMap
from blockemu.drivers.drain import DrainedSection
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.node import BlockDriverState
from blockemu.loop.sync import gather, sleep_ns, yield_now
from tests.e2e import overlay_filter
from tests.e2e.disk_model import DiskModel, Lot, Wrong

KIB = 1 << 10
BURST_MAX = 12
PAUSE_NS = 100_000
# How far a disk may grow beyond what the clients know.
GROWTH_MAX = 600 * KIB
# Snapshots of ours that an image has at once.
SNAPSHOTS_MAX = 3
# Pieces in which a drained section moves data.
PART_BYTES = 64 * KIB


@dataclass(slots=True)
class Graph:
    """A backend that clients use, and what is known of it."""

    backend: BlockBackend
    model: DiskModel
    lots: list[Lot]
    rng: random.Random
    fmt: str
    # Beyond the bytes that clients know: what the device holds there.
    tail: bytearray = field(default_factory=bytearray)
    counts: Counter[str] = field(default_factory=Counter)
    # Snapshots that we have made, and what the image held then, where that is known.
    snapshots: dict[str, bytes | None] = field(default_factory=dict)
    # The verb that is under way, and since when.
    doing: str = ""
    since: float = 0.0
    # Replies that clients have had; counted in their thread.
    replies: int = 0

    @property
    def image(self) -> BlockDriverState:
        """The node of the image's format, below a filter if there is one."""
        node = self.backend.node
        return node.children["file"].node if self.is_filtered else node

    @property
    def file(self) -> BlockDriverState:
        """The node of the host file."""
        return self.image.children["file"].node

    @property
    def is_filtered(self) -> bool:
        """Whether the overlay is there."""
        return isinstance(self.backend.node.driver, overlay_filter.OverlayFilter)

    @property
    def length(self) -> int:
        """Of what clients know."""
        return len(self.model.content)

    def some(self) -> tuple[int, int]:
        """Offset and length of something that is ours."""
        return self.rng.choice(self.lots).some(self.rng)

    def anything(self) -> tuple[int, int]:
        """Offset and length of some bytes that clients know, mostly of others."""
        offset = self.rng.randrange(self.length)
        return offset, self.rng.randint(1, min(64 * KIB, self.length - offset))

    def maps(self) -> list[DirectMap]:
        """Every direct map that leads into the file."""
        return list(self.file.mapped_by)


async def read(node: BlockDriverState, offset: int, length: int) -> bytes:
    """Bytes of a node."""
    found = bytearray(length)
    with memoryview(found) as view:
        await node.preadv(offset, view)
    return bytes(found)


async def pass_time(rng: random.Random) -> None:
    """Some rounds of the loop, or a moment in which it sleeps."""
    for _ in range(rng.choice([0, 1, 2, 6])):
        await yield_now()
    if rng.random() < 0.2:
        await sleep_ns(PAUSE_NS)


# --- drained sections ---


def _serials(maps: list[DirectMap]) -> dict[int, int]:
    """Of each map's native twin: how many requests have begun by it."""
    twins = [direct_map._native for direct_map in maps]
    return {id(twin): twin.serial for twin in twins if twin is not None and twin.serial}


def _check_idle(graph: Graph) -> None:
    busy = [node for node in graph.backend.node.subtree() if node.in_flight]
    if busy:
        raise Wrong(f"{busy} have requests in flight in a drained section")
    for direct_map in graph.maps():
        twin = direct_map._native
        if twin is not None and lib.direct_map_oldest(twin.cdata) <= twin.serial:
            raise Wrong("a native request is under way in a drained section")


async def _stays_quiet(graph: Graph) -> None:
    """Raises: Wrong, if anything happens in a drained section."""
    ranges = [graph.anything() for _ in range(3)]
    node = graph.backend.node
    _check_idle(graph)
    serials = _serials(graph.maps())
    before = [await read(node, *part) for part in ranges]
    await pass_time(graph.rng)
    _check_idle(graph)
    if before != [await read(node, *part) for part in ranges]:
        raise Wrong("the disk has changed in a drained section")
    if serials != _serials(graph.maps()):
        raise Wrong("native requests began in a drained section")


async def drain(graph: Graph) -> None:
    """The whole graph is quiet."""
    async with DrainedSection(graph.rng.choice([graph.file, graph.image, graph.backend.node])):
        await _stays_quiet(graph)


async def drain_nested(graph: Graph) -> None:
    """Sections that overlap: the last one to end opens the doors."""
    sections = [DrainedSection(node) for node in (graph.file, graph.image, graph.backend.node)]
    graph.rng.shuffle(sections)
    for section in sections:
        await section.begin()
        await _stays_quiet(graph)
    graph.rng.shuffle(sections)
    while sections:
        section = sections.pop()
        section.leave_context()
        section.end()
        if sections:
            await _stays_quiet(graph)


async def drain_cancelled(graph: Graph) -> None:
    """A section that is given up while it waits leaves the doors open."""
    task = graph.backend.ctx.spawn(drain(graph))
    for _ in range(graph.rng.randint(0, 3)):
        await yield_now()
    task.cancel()
    while not task.done():
        await yield_now()
    if not task.cancelled():
        task.result()


async def scribble_while_drained(graph: Graph) -> None:
    """Nobody sees what is put back before the section ends."""
    async with DrainedSection(graph.image):
        node = graph.backend.node
        kept = {}
        for _ in range(4):
            offset, length = graph.anything()
            start = offset - offset % PART_BYTES
            kept[start] = await read(node, start, min(length, PART_BYTES, graph.length - start))
        for offset, data in kept.items():
            await node.pwritev(offset, memoryview(bytes(byte ^ 0xFF for byte in data)))
        await pass_time(graph.rng)
        for offset, data in kept.items():
            await node.pwritev(offset, memoryview(data))


async def move_clusters_while_drained(graph: Graph) -> None:
    """Discarded, flushed and written again, data lies elsewhere in a qcow2 image."""
    async with DrainedSection(graph.image):
        node = graph.backend.node
        offset, _ = graph.anything()
        start = offset - offset % PART_BYTES
        end = min(start + PART_BYTES, graph.length)
        data = await read(node, start, end - start)
        await node.pdiscard(start, end - start)
        await node.flush()
        elsewhere, length = graph.some()
        if elsewhere + length <= start or end <= elsewhere:
            await _write(graph, node.pwritev, elsewhere, length)
        for at in range(0, len(data), 16 * KIB):
            piece = data[at : at + 16 * KIB]
            if any(piece) or any(await read(node, start + at, len(piece))):
                await node.pwritev(start + at, memoryview(piece))


# --- the direct map ---


async def hold_maps(graph: Graph) -> None:
    """A map that is held answers nothing, whoever else comes and goes."""
    maps = graph.maps()
    for direct_map in maps:
        direct_map.hold()
    try:
        for direct_map in maps:
            await direct_map.wait_idle()
        serials = _serials(maps)
        await pass_time(graph.rng)
        if serials != _serials(maps):
            raise Wrong("native requests began by a map that is held")
    finally:
        for direct_map in maps:
            direct_map.release()


async def invalidate(graph: Graph) -> None:
    """Ends requests of the old meaning, and costs misses.

    Of a raw file all is one page, so a new map must come.
    """
    for direct_map in graph.maps():
        pins, twin = direct_map._generation, direct_map._native
        serial = twin.serial if twin is not None else 0
        was_pinned = pins.count > 0  # else new requests join that generation, and may
        await direct_map.invalidate(*graph.anything())
        if (was_pinned and pins.count) or (
            twin is not None and lib.direct_map_oldest(twin.cdata) <= serial
        ):
            raise Wrong("requests of the old meaning are under way after an invalidation")
    if graph.fmt == "raw" and graph.rng.random() < 0.5:
        await drop_map(graph)


async def drop_map(graph: Graph) -> None:
    """The next who asks makes a new one."""
    await graph.image.driver.drop_direct_map()  # type: ignore[attr-defined]


# --- filters ---


async def toggle_filter(graph: Graph) -> None:
    """From one request to the next all go through a filter, or none does."""
    if graph.is_filtered:
        async with DrainedSection(graph.image):
            await overlay_filter.remove(graph.backend)
            await _stays_quiet(graph)
    else:
        async with DrainedSection(graph.image):
            await overlay_filter.insert(graph.backend, graph.rng)
            await _stays_quiet(graph)


# --- the size ---


async def resize(graph: Graph) -> None:
    """New bytes are zero, and a map of the old size is history."""
    if graph.is_filtered:
        return
    node, tail, rng = graph.image, graph.tail, graph.rng
    grown = rng.choice([1, 511, 4096, 65536, rng.randint(1, 100_000)])
    if len(tail) + grown > GROWTH_MAX or rng.random() < 0.4:
        grown = -len(tail) if rng.random() < 0.5 else -rng.randint(0, len(tail))
    if graph.fmt == "qcow2":  # whole sectors
        grown -= (graph.length + len(tail) + grown) % 512
        if len(tail) + grown < 0:
            return
    async with DrainedSection(node):
        await node.truncate(graph.length + len(tail) + grown)
        if grown < 0:
            del tail[grown:]
        tail += bytes(max(0, grown))
        await pass_time(rng)
    await _check_tail(graph)


async def use_tail(graph: Graph) -> None:
    """The part of the device that clients don't know of."""
    tail, rng = graph.tail, graph.rng
    if tail:
        start = rng.randrange(len(tail))
        data = graph.model.noise(rng.randint(1, len(tail) - start), rng)
        await graph.backend.pwritev(graph.length + start, memoryview(data))
        tail[start : start + len(data)] = data
    await _check_tail(graph)


async def _check_tail(graph: Graph) -> None:
    length = graph.backend.length_bytes
    if length != graph.length + len(graph.tail):
        raise Wrong(f"the device has {length} bytes, not {graph.length} + {len(graph.tail)}")
    found = bytearray(len(graph.tail))
    with memoryview(found) as view:
        await graph.backend.preadv(graph.length, view)
    if found != graph.tail:
        raise Wrong("bytes behind those that clients know are wrong")


# --- snapshots ---


async def change_snapshots(graph: Graph) -> None:
    """They are made and deleted while clients write, or while the image is drained."""
    if graph.fmt != "qcow2":
        return
    driver, kept, rng = graph.image.driver, graph.snapshots, graph.rng
    if kept and (len(kept) >= SNAPSHOTS_MAX or rng.random() < 0.4):
        name = rng.choice(list(kept))
        await driver.snapshot_delete(name)
        del kept[name]
        return
    name, content = f"verb{graph.counts.total()}", None
    if rng.random() < 0.5:
        async with DrainedSection(graph.image):
            content = await read(graph.image, 0, graph.image.length_bytes)
            await driver.snapshot_create(name)
    else:
        await driver.snapshot_create(name)
    kept[name] = content


async def visit_snapshot(graph: Graph) -> None:
    """The image goes back, is written to and returns, and nobody sees it."""
    if not graph.snapshots:
        return
    node, driver, rng = graph.image, graph.image.driver, graph.rng
    async with DrainedSection(node):
        before = await read(node, 0, node.length_bytes)
        await driver.snapshot_create("now")
        name = rng.choice(list(graph.snapshots))
        await driver.snapshot_apply(name)
        content = graph.snapshots[name]
        if content is not None and content != await read(node, 0, node.length_bytes):
            raise Wrong(f"snapshot {name} has changed")
        await node.pwritev(rng.randrange(graph.length - PART_BYTES), bytes_of(PART_BYTES))
        await pass_time(rng)
        await driver.snapshot_apply("now")
        await driver.snapshot_delete("now")
        if before != await read(node, 0, node.length_bytes):
            raise Wrong("the disk isn't what it was when it returned from a snapshot")


def bytes_of(length: int) -> memoryview:
    """Something that is nowhere on the disk."""
    return memoryview(b"gone" * (length // 4))


# --- a user of the graph beside the clients ---

PieceOfWork = Callable[[Graph, int, int], Awaitable[None]]


async def _write(
    graph: Graph, pwritev: Callable[..., Awaitable[None]], offset: int, length: int
) -> None:
    data = graph.model.noise(length, graph.rng)
    flags = graph.rng.choice([RequestFlags.NONE, RequestFlags.NONE, RequestFlags.FUA])
    graph.model.note(offset, length, "graph: write begins")
    await pwritev(offset, memoryview(data), flags)
    graph.model.write(offset, data)


async def _write_own(graph: Graph, offset: int, length: int) -> None:
    await _write(graph, graph.backend.pwritev, offset, length)


async def _zero_own(graph: Graph, offset: int, length: int) -> None:
    flags = graph.rng.choice([RequestFlags.NONE, RequestFlags.MAY_UNMAP])
    graph.model.note(offset, length, "graph: write-zeroes begins")
    await graph.backend.pwrite_zeroes(offset, length, flags)
    graph.model.write(offset, bytes(length))


async def _discard_own(graph: Graph, offset: int, length: int) -> None:
    graph.model.note(offset, length, "graph: discard begins")
    await graph.backend.pdiscard(offset, length)
    graph.model.trim(offset, length)


async def _check_own(graph: Graph, offset: int, length: int) -> None:
    found = bytearray(length)
    with memoryview(found) as view:
        await graph.backend.preadv(offset, view)
    graph.model.check(offset, bytes(found))


async def _burst(graph: Graph, *pieces: PieceOfWork) -> None:
    """Some pieces of work at once, on ranges that don't meet."""
    taken: list[tuple[int, int]] = []
    for _ in range(graph.rng.randint(1, BURST_MAX)):
        offset, length = graph.some()
        if all(offset + length <= start or start + count <= offset for start, count in taken):
            taken.append((offset, length))
    await gather(*(_start(graph, graph.rng.choice(pieces), *part) for part in taken))
    await gather(*(_check_own(graph, *part) for part in taken))


async def _start(graph: Graph, piece: PieceOfWork, offset: int, length: int) -> None:
    await piece(graph, offset, length)


async def write(graph: Graph) -> None:
    """Read-modify-writes in blocks that clients write, too; allocation of clusters."""
    await _burst(graph, _write_own)


async def write_zeroes(graph: Graph) -> None:
    """Also the parts of blocks and clusters that aren't whole."""
    await _burst(graph, _zero_own)


async def discard(graph: Graph) -> None:
    """Frees clusters, which come back as another's after a flush."""
    await _burst(graph, _discard_own)
    if graph.rng.random() < 0.5:
        await graph.backend.flush()


async def everything_at_once(graph: Graph) -> None:
    """Requests of all kinds."""
    await _burst(graph, _write_own, _zero_own, _discard_own, _check_own)


async def flush(graph: Graph) -> None:
    """Writes back what the image caches; clusters that were let go become free."""
    await graph.backend.flush()


async def write_under_a_dropped_map(graph: Graph) -> None:
    """Read-modify-writes, beside which the map goes and comes."""
    task = graph.backend.ctx.spawn(write(graph))
    while not task.done():
        await drop_map(graph)
        await yield_now()
    task.result()


VERBS: tuple[Callable[[Graph], Awaitable[None]], ...] = (
    drain,
    drain_nested,
    drain_cancelled,
    scribble_while_drained,
    move_clusters_while_drained,
    hold_maps,
    invalidate,
    drop_map,
    toggle_filter,
    resize,
    use_tail,
    change_snapshots,
    visit_snapshot,
    write,
    write_zeroes,
    discard,
    everything_at_once,
    flush,
    write_under_a_dropped_map,
)
"""What may happen to the graph while clients use it."""


async def change(graph: Graph, rounds: int) -> None:
    """`rounds` verbs in random order, with replies to clients in between. Raises: Wrong."""
    for _ in range(rounds):
        verb = graph.rng.choice(VERBS)
        graph.doing, graph.since = verb.__name__, time.monotonic()
        await verb(graph)
        graph.counts[graph.doing] += 1
        graph.doing, graph.since = "", time.monotonic()
        enough = graph.replies + graph.rng.choice([0, 0, 1, 50, 400])
        while graph.replies < enough:
            await sleep_ns(PAUSE_NS)


async def check_everything(graph: Graph) -> None:
    """The whole disk against the model. No client is there."""
    for offset in range(0, graph.length, 256 * KIB):
        length = min(256 * KIB, graph.length - offset)
        graph.model.check(offset, await read(graph.backend.node, offset, length))
    await _check_tail(graph)
