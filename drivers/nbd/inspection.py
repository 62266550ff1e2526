# SPDX-License-Identifier: Apache-2.0
"""Asking an NBD server what it offers, without using it: its exports, what each can do, and which
meta contexts it has.

Everything is asked in negotiation (LIST, INFO, LIST_META_CONTEXT), so it costs the server no client
of an export; then ABORT. A server without INFO has its export chosen (GO, EXPORT_NAME) and left
again. Facts are handed on as the server stated them: what can't be used to do I/O can be shown.

What a server may send is bounded, and so is how long it may be silent.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from blockemu.drivers.errors import ImageError
from blockemu.drivers.nbd.client_handshake import (
    LENGTH_MAX,
    REPLIES_MAX,
    Negotiation,
    RefusedError,
    refusal,
)
from blockemu.drivers.nbd.connector import open_socket
from blockemu.drivers.nbd.negotiation_stream import NegotiationError, NegotiationStream
from blockemu.drivers.nbd.protocol import (
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    REQUEST,
    Command,
    Info,
    Option,
    Reply,
    TransmissionFlag,
    request_word,
)
from blockemu.drivers.nbd.status_reader import Extent, read_statuses
from blockemu.loop.coroutine import Cancelled, settled
from blockemu.loop.stream_socket import PlainSocket

if TYPE_CHECKING:
    from blockemu.drivers.nbd.address import NbdAddress
    from blockemu.drivers.nbd.client_tls import ClientTls
    from blockemu.loop.aio_context import AioContext
    from blockemu.loop.coroutine import Task

SILENCE_NS: Final = 30_000_000_000
"""How long a server may take to accept a connection, or for one reply."""

EXPORTS_MAX: Final = 65536
"""Exports of one server that are listed."""

INSPECTED_BYTES_MAX: Final = 64 * 1024 * 1024
"""All that a server may say of itself: EXPORTS_MAX with a kilobyte each."""

_SILENT = f"the server says nothing for {SILENCE_NS // 1_000_000_000} s"
_ERROR_BIT = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """How a server speaks. `protocol` is nbdinfo's name for it."""

    protocol: str
    tls: bool
    structured: bool


@dataclass(frozen=True, slots=True)
class ListedExport:
    """What LIST tells of an export."""

    name: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInfo:
    """An export in its server's words.

    `canonical`: what the server calls it, if it says so. `blocks`: minimum, preferred and maximum,
    if it states them. `contexts`: names of its meta contexts.
    """

    name: str
    canonical: str | None = None
    description: str | None = None
    size: int
    flags: TransmissionFlag
    blocks: tuple[int, int, int] | None = None
    contexts: tuple[str, ...] = ()


class Inspection(Negotiation):
    """One negotiation that asks and chooses nothing. `begin` it, then ask.

    Context: home thread of the stream's. Every method suspends for the server, and raises
    NegotiationError; RefusedError, where the server said no.
    """

    def __init__(self, stream: NegotiationStream, *, tls: bool = False) -> None:
        super().__init__(stream, b"")
        self.server = ServerFacts(protocol="newstyle", tls=tls, structured=False)
        self.over = False
        """An export was chosen: nothing more can be asked."""

    async def begin(self) -> None:
        """Greet, and agree on structured replies where the server has them."""
        if await self._greet():
            self._structured = await self._ask_plain(Option.NBD_OPT_STRUCTURED_REPLY)
            self.server = replace(
                self.server, protocol="newstyle-fixed", structured=self._structured
            )

    @property
    def is_fixed(self) -> bool:
        """Whether anything can be asked at all."""
        return self.server.protocol == "newstyle-fixed"

    async def exports(self) -> list[ListedExport]:
        """The exports that the server tells of."""
        if not self.is_fixed:
            raise RefusedError("the server speaks too old a protocol to list exports")
        option = Option.NBD_OPT_LIST
        await self._send(option)
        found: list[ListedExport] = []
        while True:
            kind, data = await self._reply(option)
            if kind == Reply.NBD_REP_ACK:
                return found
            if kind & _ERROR_BIT:
                raise RefusedError(f"listing its exports: {refusal(kind, data)}")
            if kind != Reply.NBD_REP_SERVER or len(data) < 4:
                raise NegotiationError(f"server answers LIST with reply type {kind:#x}")
            length = int.from_bytes(data[:4], "big")
            if length > len(data) - 4:
                raise NegotiationError("server lists an export whose name is cut off")
            if len(found) >= EXPORTS_MAX:
                raise NegotiationError(f"server lists more than {EXPORTS_MAX} exports")
            found.append(ListedExport(_text(data[4 : 4 + length]), _text(data[4 + length :])))

    async def info(self, name: str) -> ExportInfo:
        """What the server tells of the export `name`. A server that has no INFO gives us the export
        instead, after which we are `over`."""
        found = None
        if self.is_fixed:
            contexts = await self.contexts(name)
            found = await self._ask(Option.NBD_OPT_INFO, name)
            if found is None:
                self.over = True
                found = await self._ask(Option.NBD_OPT_GO, name)
            if found is not None:
                return replace(found, contexts=contexts)
        return await self._by_name(name)

    async def contexts(self, name: str) -> tuple[str, ...]:
        """The meta contexts of an export; none, where the server doesn't say."""
        if not self._structured:
            return ()
        option = Option.NBD_OPT_LIST_META_CONTEXT
        await self._send(option, _sized(name) + bytes(4))
        found = await self._contexts_of(option)
        return tuple(context for _, context in found or ())

    async def _contexts_of(self, option: Option) -> list[tuple[int, str]] | None:
        """(number, name) of the replies' contexts; None, when the server refuses."""
        found: list[tuple[int, str]] = []
        for _ in range(REPLIES_MAX):
            kind, data = await self._reply(option)
            if kind == Reply.NBD_REP_ACK:
                return found
            if kind & _ERROR_BIT:
                return None
            if kind != Reply.NBD_REP_META_CONTEXT or len(data) < 4:
                raise NegotiationError(f"server answers {option.name} with reply type {kind:#x}")
            found.append((int.from_bytes(data[:4], "big"), _text(data[4:])))
        raise NegotiationError(f"server answers {option.name} without end")

    async def choose(self, name: str, context: str) -> tuple[ExportInfo, int]:
        """The export for BLOCK_STATUS in this meta context, and the context's number. We are
        `over`."""
        number = None
        if self._structured:
            option = Option.NBD_OPT_SET_META_CONTEXT
            await self._send(option, _sized(name) + struct.pack(">I", 1) + _sized(context))
            found = await self._contexts_of(option) or []
            number = next((number for number, said in found if said == context), None)
        if number is None:
            await self.info(name)  # an export that isn't there is the better reason
            raise RefusedError(f"the server has no meta context '{context}' for this export")
        self.over = True
        info = await self._ask(Option.NBD_OPT_GO, name)
        if info is None:
            raise RefusedError("the server has meta contexts, and no GO to use them")
        return info, number

    async def _ask(self, option: Option, name: str) -> ExportInfo | None:
        """INFO or GO. None: the server doesn't know it."""
        kinds = (Info.NBD_INFO_NAME, Info.NBD_INFO_DESCRIPTION, Info.NBD_INFO_BLOCK_SIZE)
        await self._send(option, _sized(name) + struct.pack(">4H", len(kinds), *kinds))
        said: dict[int, bytes] = {}
        for _ in range(REPLIES_MAX):
            kind, data = await self._reply(option)
            if kind == Reply.NBD_REP_ACK:
                return _export_info(name, said)
            if kind == Reply.NBD_REP_ERR_UNSUP:
                return None
            if kind & _ERROR_BIT:
                raise RefusedError(refusal(kind, data))
            if kind != Reply.NBD_REP_INFO or len(data) < 2:
                raise NegotiationError(f"server answers {option.name} with reply type {kind:#x}")
            said[int.from_bytes(data[:2], "big")] = data
        raise NegotiationError(f"server answers {option.name} without end")

    async def _by_name(self, name: str) -> ExportInfo:
        self.over = True
        await self._send(Option.NBD_OPT_EXPORT_NAME, _bytes(name))
        try:
            head = await self._stream.receive(EXPORT_NAME_REPLY.size)
        except NegotiationError as error:
            reason = f"{error} when asked for export '{name}': it may have none"
            raise NegotiationError(reason) from None
        if not self._no_zeroes:
            await self._stream.receive(len(EXPORT_NAME_ZEROES))
        size, flags = EXPORT_NAME_REPLY.unpack(head)
        return _export_info(name, {Info.NBD_INFO_EXPORT: INFO_EXPORT.pack(0, size, flags)})

    async def statuses(self, info: ExportInfo, number: int) -> AsyncIterator[list[Extent]]:
        """What BLOCK_STATUS says of the whole export that `choose` gave us, a reply at a time."""
        self._stream.lift_bound()
        async for extents in read_statuses(self._stream, info, number):
            yield extents

    async def leave(self) -> None:
        """Take our leave in the way that the protocol has for where we are."""
        try:
            if self.over:
                word = request_word(Command.NBD_CMD_DISC)
                await self._stream.send(REQUEST.pack(word, bytes(8), 0, 0))
            elif self.is_fixed:
                await self._send(Option.NBD_OPT_ABORT)
        except NegotiationError:
            pass  # it has gone first


@asynccontextmanager
async def inspecting(
    address: NbdAddress, ctx: AioContext, *, shown: str
) -> AsyncIterator[Inspection]:
    """A connection on which to ask. `shown` is the server's name for messages.

    Context: a task of `ctx`. Raises: ImageError, also for what goes wrong inside the block.
    """
    watch = _Watch(ctx)
    try:
        stream = _WatchedStream(await watch.connect(address), ctx, watch, address.tls)
        try:
            inspection = Inspection(stream, tls=address.tls is not None)
            await inspection.begin()
            try:
                yield inspection
            except RefusedError:
                await inspection.leave()
                raise
            await inspection.leave()
        finally:
            stream.close()
    except NegotiationError as error:
        raise ImageError(shown, str(error)) from error
    finally:
        watch.stop()


class _Watch:
    """Looks at the clock while the server is waited for."""

    def __init__(self, ctx: AioContext) -> None:
        self._ctx = ctx
        self._timer = ctx.new_timer(self._expire)
        self._expired = False
        self.waiting: Task[PlainSocket] | NegotiationStream | None = None

    def renew(self) -> None:
        """Whoever waits has SILENCE_NS from now on."""
        self._timer.arm(self._ctx.now_ns() + SILENCE_NS)

    def stop(self) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        self._expired = True
        if isinstance(self.waiting, NegotiationStream):
            self.waiting.abort(_SILENT)
        elif self.waiting is not None:
            self.waiting.cancel()

    async def connect(self, address: NbdAddress) -> PlainSocket:
        """Suspends: until the connection is there. Raises: NegotiationError."""
        task = self._ctx.spawn(open_socket(address))
        self.waiting = task
        self.renew()
        try:
            return await task
        except OSError as error:
            said = error.strerror or os.strerror(error.errno or errno.EIO)
            raise NegotiationError(f"connecting to {address.server} failed: {said}") from error
        except Cancelled:
            if self._expired:
                raise NegotiationError(_SILENT) from None
            task.cancel()
            await settled(task)
            if task.exception() is None:
                task.result().close()
            raise


class _WatchedStream(NegotiationStream):
    """Each of its waits has SILENCE_NS."""

    def __init__(
        self, sock: PlainSocket, ctx: AioContext, watch: _Watch, tls: ClientTls | None
    ) -> None:
        super().__init__(
            sock, ctx, bytes_max=INSPECTED_BYTES_MAX, peer="the server", external=False,
            wants_tls=tls,
        )  # fmt: skip
        self._watch = watch
        watch.waiting = self

    async def receive(self, length: int, *, at_rest: bool = False) -> bytes:
        self._watch.renew()
        return await super().receive(length, at_rest=at_rest)


def _export_info(name: str, said: dict[int, bytes]) -> ExportInfo:
    if Info.NBD_INFO_EXPORT not in said:
        raise NegotiationError("server tells of an export, and not how long it is")
    size, flags = _fields(INFO_EXPORT, said[Info.NBD_INFO_EXPORT])
    if size > LENGTH_MAX:
        raise NegotiationError(f"server says that the export has {size} bytes")
    blocks = None
    if Info.NBD_INFO_BLOCK_SIZE in said:
        minimum, preferred, maximum = _fields(INFO_BLOCK_SIZE, said[Info.NBD_INFO_BLOCK_SIZE])
        blocks = minimum, preferred, maximum
    texts = [said.get(kind) for kind in (Info.NBD_INFO_NAME, Info.NBD_INFO_DESCRIPTION)]
    canonical, description = (None if text is None else _text(text[2:]) for text in texts)
    return ExportInfo(
        name=name,
        canonical=canonical,
        description=description,
        size=size,
        flags=TransmissionFlag(flags),
        blocks=blocks,
    )


def _fields(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise NegotiationError(f"server's information has {len(data)} bytes, not {layout.size}")
    fields: tuple[int, ...] = layout.unpack(data)[1:]
    return fields


def _sized(text: str) -> bytes:
    data = _bytes(text)
    return struct.pack(">I", len(data)) + data


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")
