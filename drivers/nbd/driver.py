# SPDX-License-Identifier: Apache-2.0
"""nbd: an export of an NBD server as a node, in the place of a host file."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, Self

from blockemu.drivers.driver import BlockDriver, BlockStatus, RequestFlags
from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.nbd.address import U32_MAX, take_address
from blockemu.drivers.nbd.client_handshake import BASE_ALLOCATION
from blockemu.drivers.nbd.client_tls import with_tls
from blockemu.drivers.nbd.connector import Connector
from blockemu.drivers.nbd.link import NbdLink
from blockemu.drivers.nbd.protocol import (
    STRING_LENGTH_MAX,
    Command,
    CommandFlag,
    TransmissionFlag,
)
from blockemu.drivers.nbd.remote_status import EXTENDED_BYTES_MAX, RemoteStatus
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.options import take_number, take_str
from blockemu.drivers.registry import Opener
from blockemu.drivers.status_runs import ALLOCATED, DATA, ZERO, StatusRuns
from blockemu.drivers.zeroes import fill_zeroes
from blockemu.loop.aio_context import AioContext
from blockemu.loop.sync import gather

SECOND_NS: Final = 1_000_000_000

CONNECTIONS_MAX: Final = 16
"""Of one node. More gain nothing even with servers that give each a thread."""

TRIM_BYTES_MAX: Final = 1 << 30
"""Of one TRIM where headers have 32 bits."""

FEW_RUNS: Final = 4
"""Who wants no more of a block status than this gets one run, which costs the server least."""

PIECES_AT_ONCE: Final = 8
"""Of one request that is more than the server takes at once."""


class NbdDriver(BlockDriver):
    """Options: `server` with `type` inet (`host`, `port`, `ipv4`, `ipv6`, `keep-alive`), unix
    (`path`), vsock (`cid`, `port`) or fd (`str`: the number of a connected socket); `export` (the
    name, default ""); `open-timeout`: seconds for which opening goes on trying to connect (default
    0: once); `reconnect-delay`: seconds for which requests wait for a new connection when the last
    one was lost (default 0: they fail); `multi-conn`: connections to a server that allows several
    (default 1); `x-dirty-bitmap`: a meta context of dirty bits, whose 1 is shown as not allocated
    and 0 as data; `tls-creds`, `tls-hostname`, and more of client_tls.py. `host`, `port` and
    `path` without `server` are QEMU's old spelling."""

    name = "nbd"
    is_protocol = True
    supports_fua = True

    def __init__(self, node: BlockDriverState, link: NbdLink) -> None:
        super().__init__(node)
        self._link = link
        self._status = RemoteStatus(link)

    @classmethod
    async def open(cls, node: BlockDriverState, options: dict[str, Any], opener: Opener) -> Self:
        address = take_address(node.node_name, options)
        address = await with_tls(address.uri, address, options, opener)
        name = node.filename = address.uri
        open_timeout_s = _take_seconds(name, options, "open-timeout")
        reconnect_delay_s = _take_seconds(name, options, "reconnect-delay")
        connections_max = take_number(
            name, options, "multi-conn", lowest=1, highest=CONNECTIONS_MAX, default=1
        )
        context = take_str(name, options, "x-dirty-bitmap", BASE_ALLOCATION)
        if not 0 < len(context.encode(errors="surrogateescape")) <= STRING_LENGTH_MAX:
            raise ImageError(name, f"option 'x-dirty-bitmap' has 1 to {STRING_LENGTH_MAX} bytes")
        link = NbdLink(
            name,
            Connector(address, meta_context=context),
            node.ctx,
            reconnect_delay_ns=reconnect_delay_s * SECOND_NS,
            connections_max=connections_max,
            writable=not node.read_only,
        )
        await link.open(timeout_ns=open_timeout_s * SECOND_NS)
        return cls(node, link)

    @property
    def request_alignment(self) -> int:
        return self._link.facts.block_min

    @property
    def length_bytes(self) -> int:
        return self._link.facts.length

    @property
    def multi_conn(self) -> bool:  # type: ignore[override]
        """As the server says of itself."""
        return self._can(TransmissionFlag.NBD_FLAG_CAN_MULTI_CONN)

    def _can(self, flag: TransmissionFlag) -> bool:
        return bool(self._link.facts.flags & flag)

    # --- requests ---

    async def preadv(self, offset: int, view: memoryview) -> None:
        facts = self._link.facts
        inside = min(len(view), facts.length - offset)
        if inside < len(view):
            fill_zeroes(view[max(inside, 0) :])
            if inside <= 0:
                return
            view = view[:inside]
        if inside <= facts.payload_max:
            await self._link.request(Command.NBD_CMD_READ, 0, offset, inside, view)
            return

        async def read(start: int, length: int) -> None:
            part = view[start - offset :][:length]
            await self._link.request(Command.NBD_CMD_READ, 0, start, length, part)

        await self._in_pieces(offset, inside, facts.payload_max, read)

    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        self._check_end(offset, len(view))
        fua = self._fua(flags) if flags else 0
        payload_max = self._link.facts.payload_max
        if len(view) <= payload_max:
            await self._link.request(Command.NBD_CMD_WRITE, fua, offset, len(view), view)
        else:

            async def write(start: int, length: int) -> None:
                part = view[start - offset :][:length]
                await self._link.request(Command.NBD_CMD_WRITE, fua, start, length, part)

            await self._in_pieces(offset, len(view), payload_max, write)
        if flags:
            await self._flush_instead_of_fua(flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: RequestFlags) -> None:
        self._check_end(offset, length)
        if not self._can(TransmissionFlag.NBD_FLAG_SEND_WRITE_ZEROES):
            raise io_error(errno.ENOTSUP, f"{self._link.name} has no write zeroes")
        command_flags = self._fua(flags)
        if not flags & RequestFlags.MAY_UNMAP:
            command_flags |= CommandFlag.NBD_CMD_FLAG_NO_HOLE
        if flags & RequestFlags.NO_FALLBACK:
            if not self._can(TransmissionFlag.NBD_FLAG_SEND_FAST_ZERO):
                raise io_error(errno.ENOTSUP, f"{self._link.name} can't say if zeroes are fast")
            command_flags |= CommandFlag.NBD_CMD_FLAG_FAST_ZERO

        async def write_zeroes(start: int, size: int) -> None:
            await self._link.request(Command.NBD_CMD_WRITE_ZEROES, command_flags, start, size)

        facts = self._link.facts
        bytes_max = EXTENDED_BYTES_MAX if facts.extended else facts.payload_max
        await self._in_pieces(offset, length, bytes_max, write_zeroes)
        await self._flush_instead_of_fua(flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        length = min(length, self.length_bytes - offset)
        if length <= 0 or not self._can(TransmissionFlag.NBD_FLAG_SEND_TRIM):
            return

        async def trim(start: int, size: int) -> None:
            await self._link.request(Command.NBD_CMD_TRIM, 0, start, size)

        bytes_max = EXTENDED_BYTES_MAX if self._link.facts.extended else TRIM_BYTES_MAX
        await self._in_pieces(offset, length, bytes_max, trim)

    async def flush(self) -> None:
        if self._can(TransmissionFlag.NBD_FLAG_SEND_FLUSH):
            await self._link.request(Command.NBD_CMD_FLUSH, 0, 0, 0)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        runs = await self._status.ask(offset, length, only_one=True)
        state = runs.states[0]
        return BlockStatus(
            runs.lengths[0],
            data=bool(state & DATA),
            zero=bool(state & ZERO),
            allocated=bool(state & ALLOCATED),
            host_offset=offset if state & ALLOCATED and offset < self.length_bytes else None,
            file=self.node.filename,
        )

    async def status_runs(self, offset: int, length: int, *, runs_max: int) -> StatusRuns:
        return await self._status.ask(offset, length, only_one=runs_max <= FEW_RUNS)

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        """An export has its size from its server, where it may have grown since we asked; it can
        also be used in part."""
        if length > self.length_bytes and preallocation == "off":
            await self._link.look_again()
        if length > self.length_bytes or preallocation != "off":
            raise io_error(errno.ENOTSUP, f"{self._link.name} has {self.length_bytes} bytes")

    # --- what they share ---

    async def _in_pieces(
        self,
        offset: int,
        length: int,
        bytes_max: int,
        make: Callable[[int, int], Coroutine[Any, Any, None]],
    ) -> None:
        """`make(offset, length)` for each piece; after one fails, no more are begun."""
        if length <= bytes_max:
            await make(offset, length)
            return
        pieces = split(offset, length, bytes_max, preferred=self._link.facts.block_preferred)
        failed = False

        async def work() -> None:
            nonlocal failed
            for start, size in pieces:
                if failed:
                    return
                try:
                    await make(start, size)
                except OSError:
                    failed = True
                    raise

        await gather(*(work() for _ in range(PIECES_AT_ONCE)))

    def _check_end(self, offset: int, length: int) -> None:
        if offset + length > self.length_bytes:
            raise io_error(errno.ENOSPC, f"{self._link.name} ends at {self.length_bytes}")

    def _fua(self, flags: RequestFlags) -> int:
        wanted = flags & RequestFlags.FUA and self._can(TransmissionFlag.NBD_FLAG_SEND_FUA)
        return CommandFlag.NBD_CMD_FLAG_FUA if wanted else 0

    async def _flush_instead_of_fua(self, flags: RequestFlags) -> None:
        if flags & RequestFlags.FUA and not self._can(TransmissionFlag.NBD_FLAG_SEND_FUA):
            await self.flush()

    # --- its life ---

    def cancel_in_flight(self, reason: str) -> None:
        self._link.give_up(reason)

    async def close(self) -> None:
        await self._link.close()

    def attach_aio_context(self, ctx: AioContext) -> None:
        self._link.attach(ctx)

    def detach_aio_context(self) -> None:
        self._link.detach()


def split(offset: int, length: int, bytes_max: int, *, preferred: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces of a request: at most `bytes_max` each, cut where a block of
    the `preferred` size ends, if there is room for one."""
    end = offset + length
    while offset < end:
        cut = min(offset + bytes_max, end)
        if cut < end and cut & ~(preferred - 1) > offset:
            cut &= ~(preferred - 1)
        yield offset, cut - offset
        offset = cut


def _take_seconds(name: str, options: dict[str, Any], key: str) -> int:
    return take_number(name, options, key, lowest=0, highest=U32_MAX, default=0)
