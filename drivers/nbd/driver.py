# SPDX-License-Identifier: Apache-2.0
"""nbd: an export of an NBD server as a node, in the place of a host file."""

from __future__ import annotations

import errno
from typing import Any, Final, Self

from blockemu.drivers.driver import BlockDriver, BlockStatus, RequestFlags
from blockemu.drivers.errors import ImageError, io_error
from blockemu.drivers.nbd.address import take_address
from blockemu.drivers.nbd.client_connection import ClientConnection
from blockemu.drivers.nbd.link import NbdLink
from blockemu.drivers.nbd.protocol import (
    AllocationState,
    Command,
    CommandFlag,
    TransmissionFlag,
)
from blockemu.drivers.nbd.replies import InFlight
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.sync import gather

TIMEOUT_SECONDS_MAX: Final = 2**32 - 1
TRIM_BYTES_MAX: Final = 1 << 30
STATUS_BYTES_MAX: Final = 0xFFFFFFFF


class NbdDriver(BlockDriver):
    """Options: `server` with `type` inet (`host`, `port`) or unix (`path`); `export` (the name,
    default ""); `open-timeout`: seconds for which opening goes on trying to connect (default 0:
    once); `reconnect-delay`: seconds for which requests wait for a new connection when one was lost
    (default 0: they fail). `host`, `port` and `path` without `server` are QEMU's old spelling."""

    name = "nbd"
    is_protocol = True
    supports_fua = True

    def __init__(self, node: BlockDriverState, link: NbdLink) -> None:
        super().__init__(node)
        self._link = link

    @classmethod
    async def open(cls, node: BlockDriverState, options: dict[str, Any], opener: Opener) -> Self:
        address = take_address(node.node_name, options)
        node.filename = address.uri
        open_timeout_s = _take_seconds(address.uri, options, "open-timeout")
        reconnect_delay_s = _take_seconds(address.uri, options, "reconnect-delay")
        link = NbdLink(
            address,
            node.ctx,
            reconnect_delay_ns=reconnect_delay_s * 1_000_000_000,
            writable=not node.read_only,
        )
        await link.open(timeout_ns=open_timeout_s * 1_000_000_000)
        return cls(node, link)

    @property
    def request_alignment(self) -> int:
        return self._link.facts.block_min

    @property
    def length_bytes(self) -> int:
        return self._link.facts.length

    def _can(self, flag: TransmissionFlag) -> bool:
        return bool(self._link.facts.flags & flag)

    async def preadv(self, offset: int, view: memoryview) -> None:
        inside = max(min(len(view), self.length_bytes - offset), 0)
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)
        pieces = list(self._pieces(offset, inside, self._link.facts.payload_max))
        if len(pieces) == 1:
            await self._request(Command.NBD_CMD_READ, 0, offset, inside, view[:inside])
            return
        await gather(
            *(
                self._request(
                    Command.NBD_CMD_READ, 0, start, length, view[start - offset :][:length]
                )
                for start, length in pieces
            )
        )

    async def pwritev(self, offset: int, view: memoryview, flags: RequestFlags) -> None:
        self._check_end(offset, len(view))
        fua = self._fua(flags)
        pieces = list(self._pieces(offset, len(view), self._link.facts.payload_max))
        if len(pieces) == 1:
            await self._request(Command.NBD_CMD_WRITE, fua, offset, len(view), view)
        else:
            await gather(
                *(
                    self._request(
                        Command.NBD_CMD_WRITE, fua, start, length, view[start - offset :][:length]
                    )
                    for start, length in pieces
                )
            )
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
        await gather(
            *(
                self._request(Command.NBD_CMD_WRITE_ZEROES, command_flags, start, size)
                for start, size in self._pieces(offset, length, self._link.facts.payload_max)
            )
        )
        await self._flush_instead_of_fua(flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        length = min(length, self.length_bytes - offset)
        if length <= 0 or not self._can(TransmissionFlag.NBD_FLAG_SEND_TRIM):
            return
        for start, size in self._pieces(offset, length, TRIM_BYTES_MAX):
            await self._request(Command.NBD_CMD_TRIM, 0, start, size)

    async def flush(self) -> None:
        if self._can(TransmissionFlag.NBD_FLAG_SEND_FLUSH):
            await self._request(Command.NBD_CMD_FLUSH, 0, 0, 0)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        if offset >= self.length_bytes:
            return BlockStatus(length, data=False, zero=True)
        length = min(length, self.length_bytes - offset)
        mask = self.request_alignment - 1
        start = offset & ~mask
        end = min((offset + length + mask) & ~mask, start + (STATUS_BYTES_MAX & ~mask))
        found = await self._link.run(lambda connection: _extent_at(connection, start, end - start))
        if found is None:
            return self._status(offset, length, AllocationState(0))
        extent_bytes, state = found
        count = min(start + (extent_bytes & ~mask), offset + length) - offset
        if count <= 0:  # the server thinks in smaller steps than it lets us: part of it is data
            return self._status(offset, min(length, mask + 1), AllocationState(0))
        return self._status(offset, count, AllocationState(state))

    def _status(self, offset: int, length: int, state: AllocationState) -> BlockStatus:
        data = not state & AllocationState.NBD_STATE_HOLE
        zero = bool(state & AllocationState.NBD_STATE_ZERO)
        return BlockStatus(
            length,
            data=data,
            zero=zero,
            allocated=data or zero,
            host_offset=offset,
            file=self.node.filename,
        )

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        """An export has its size from its server; it can only be used in part."""
        if length > self.length_bytes or preallocation != "off":
            raise io_error(errno.ENOTSUP, f"{self._link.name} has {self.length_bytes} bytes")

    # --- requests ---

    async def _request(
        self,
        command: Command,
        flags: int,
        offset: int,
        length: int,
        view: memoryview | None = None,
    ) -> InFlight:
        answer: InFlight = await self._link.run(
            lambda connection: connection.request(
                command, flags, offset=offset, length=length, view=view
            )
        )
        return answer

    def _pieces(self, offset: int, length: int, bytes_max: int) -> list[tuple[int, int]]:
        """(offset, length) of the requests that make up one."""
        end = offset + length
        return [(start, min(bytes_max, end - start)) for start in range(offset, end, bytes_max)]

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


async def _extent_at(
    connection: ClientConnection, offset: int, length: int
) -> tuple[int, int] | None:
    """Length and state of what is alike from `offset` on; None, when the server doesn't tell."""
    if connection.facts.allocation_context is None:
        return None
    answer = await connection.request(
        Command.NBD_CMD_BLOCK_STATUS,
        CommandFlag.NBD_CMD_FLAG_REQ_ONE,
        offset=offset,
        length=length,
    )
    first, state = answer.extents[0]
    return first, state


def _take_seconds(name: str, options: dict[str, Any], key: str) -> int:
    value = options.pop(key, 0)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ImageError(name, f"option '{key}' takes a number of seconds, not {value!r}")
    if not 0 <= value <= TIMEOUT_SECONDS_MAX:
        raise ImageError(name, f"option '{key}' takes 0 to {TIMEOUT_SECONDS_MAX}, not {value}")
    return value
