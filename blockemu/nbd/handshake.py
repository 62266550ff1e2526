# SPDX-License-Identifier: Apache-2.0
"""Fixed newstyle negotiation: from a fresh connection to an export that the client has chosen.

Source: doc/proto.md of NetworkBlockDevice/nbd, "Newstyle negotiation", "Option types", "Option
reply types". Old style isn't offered: the document asks servers on the registered port to refuse
it.

The client sends options, one after the other; each handler below answers one, and says by what it
returns whether haggling goes on. A client that breaks a rule it was told is answered where the
protocol has an answer (ERR_INVALID, ERR_TOO_BIG), so that it can try something else; where it has
none (wrong magic, unknown client flags, a bad EXPORT_NAME) the connection ends.

Context: the main loop's. Nothing here waits for anything but the client.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockemu.drivers.nbd.negotiation_stream import NegotiationError, NegotiationStream
from blockemu.drivers.nbd.protocol import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBD_REP_MAGIC,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    Reply,
)
from blockemu.loop.sync import yield_now
from blockemu.nbd import meta_context
from blockemu.nbd.reply_style import EXTENDED, SIMPLE, STRUCTURED, ReplyStyle
from blockemu.nbd.session import Session, transmission_flags
from blockemu.nbd.tls import BEFORE_TLS, TlsPolicy

if TYPE_CHECKING:
    from blockemu.exports import Export, ExportTable
    from blockemu.limits import Limits
    from blockemu.nbd.meta_context import MetaContext

BLOCK_SIZE_MIN = 1
"""The node aligns requests itself, so clients may address any byte."""

BLOCK_SIZE_PREFERRED = 4096

OPTIONS_PER_ROUND = 8
"""Options answered before the loop's other work gets a turn, should a client send many at once."""


@dataclass(frozen=True, slots=True)
class InfoRequest:
    """The data of INFO and GO."""

    name: str
    items: frozenset[int]


class InvalidOption(Exception):
    """An option's data breaks the rules of the option: ERR_INVALID, with this text."""


def parse_info_request(data: bytes, *, name_length_max: int) -> InfoRequest:
    """Take apart the data of an INFO or GO option.

    Layout ("NBD_OPT_INFO and NBD_OPT_GO"): u32 length of name, name, u16 n, n times u16.
    Raises: InvalidOption.
    """
    if len(data) < 6:
        raise InvalidOption("too short for a name and a list")
    (name_length,) = struct.unpack_from(">I", data)
    if name_length > len(data) - 6:
        raise InvalidOption("the name is longer than the option")
    name = parse_name(data[4 : 4 + name_length], name_length_max=name_length_max)
    (count,) = struct.unpack_from(">H", data, 4 + name_length)
    items = data[6 + name_length :]
    if len(items) != 2 * count:
        raise InvalidOption("the list of information requests has another length than it says")
    return InfoRequest(name, frozenset(struct.unpack(f">{count}H", items)))


def parse_name(data: bytes, *, name_length_max: int) -> str:
    """An export's name as the client wrote it. Raises: InvalidOption."""
    if len(data) > name_length_max:
        raise InvalidOption(f"the name is longer than {name_length_max} bytes")
    if b"\0" in data:
        raise InvalidOption("the name has a NUL in it")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidOption("the name isn't UTF-8") from None


class Negotiation:
    """One client's way through negotiation: `run` it once.

    `lists`: clients of this listener may ask what there is (LIST). All others must know.
    """

    def __init__(
        self,
        stream: NegotiationStream,
        exports: ExportTable,
        limits: Limits,
        *,
        lists: bool = True,
        tls: TlsPolicy | None = None,
    ) -> None:
        """`tls`: None is a server without."""
        self._stream = stream
        self._lists = lists
        self._exports = exports
        self._limits = limits
        self._tls = tls
        self._no_zeroes = False
        self._fixed = False
        self._style: ReplyStyle = SIMPLE
        self._contexts = meta_context.Choice()
        self._session: Session | None = None
        self._handlers: dict[int, Callable[[int, bytes], Awaitable[bool]]] = {
            Option.NBD_OPT_EXPORT_NAME: self._export_name,
            Option.NBD_OPT_ABORT: self._abort,
            Option.NBD_OPT_LIST: self._list,
            Option.NBD_OPT_STARTTLS: self._start_tls,
            Option.NBD_OPT_INFO: self._info,
            Option.NBD_OPT_GO: self._go,
            Option.NBD_OPT_STRUCTURED_REPLY: self._structured_reply,
            Option.NBD_OPT_EXTENDED_HEADERS: self._extended_headers,
            Option.NBD_OPT_LIST_META_CONTEXT: self._meta_context,
            Option.NBD_OPT_SET_META_CONTEXT: self._meta_context,
        }

    async def run(self) -> Session | None:
        """What was agreed on, or None when the client took its leave.

        With a session comes one of its export's places for clients: whoever gets it gives that back
        (`export.clients`) at the client's end.
        Suspends: whenever the client is waited for. Raises: NegotiationError.
        """
        try:
            return await self._haggle()
        except BaseException:
            if self._session is not None:
                self._session.export.clients -= 1
            raise

    async def _haggle(self) -> Session | None:
        flags = HandshakeFlag.NBD_FLAG_FIXED_NEWSTYLE | HandshakeFlag.NBD_FLAG_NO_ZEROES
        await self._stream.send(GREETING.pack(NBDMAGIC, IHAVEOPT, flags))
        (client_flags,) = CLIENT_FLAGS.unpack(
            await self._stream.receive(CLIENT_FLAGS.size, at_rest=True)
        )
        # As plain numbers: inverting an IntFlag yields named bits only.
        known = int(ClientFlag.NBD_FLAG_C_FIXED_NEWSTYLE | ClientFlag.NBD_FLAG_C_NO_ZEROES)
        if client_flags & ~known:
            raise NegotiationError(f"unknown client flags {client_flags:#x}")
        self._fixed = bool(client_flags & ClientFlag.NBD_FLAG_C_FIXED_NEWSTYLE)
        self._no_zeroes = bool(client_flags & ClientFlag.NBD_FLAG_C_NO_ZEROES)
        answered = 0
        while await self._one_option():
            answered += 1
            if answered % OPTIONS_PER_ROUND == 0:
                await yield_now()
        return self._session

    async def _one_option(self) -> bool:
        """Answer the next option. False ends negotiation."""
        header = await self._stream.receive(OPTION.size, at_rest=True)
        magic, option, length = OPTION.unpack(header)
        if magic != IHAVEOPT:
            raise NegotiationError(f"bad option magic {magic:#x}")
        if not self._fixed and option != Option.NBD_OPT_EXPORT_NAME:
            raise NegotiationError(f"option {option} without fixed newstyle")
        if self._needs_tls(option):
            return await self._refuse_without_tls(option, length)
        if length > self._limits.option_length_max:
            return await self._too_big(option, length)
        data = await self._stream.receive(length)
        if self._stream.ending and option != Option.NBD_OPT_ABORT:
            return await self._refuse_at_shutdown(option)
        handler = self._handlers.get(option)
        if handler is None:
            await self._reply(option, Reply.NBD_REP_ERR_UNSUP, b"option not supported")
            return True
        try:
            return await handler(option, data)
        except InvalidOption as error:
            await self._reply(option, Reply.NBD_REP_ERR_INVALID, str(error).encode())
            return True

    async def _too_big(self, option: int, length: int) -> bool:
        if option == Option.NBD_OPT_EXPORT_NAME:
            raise NegotiationError(f"export name of {length} bytes")
        await self._stream.discard(length)
        if option == Option.NBD_OPT_SET_META_CONTEXT:
            self._contexts.forget()
        # Negotiation ends with ABORT whatever comes with it.
        if option == Option.NBD_OPT_ABORT:
            return await self._abort(option, b"")
        await self._reply(option, Reply.NBD_REP_ERR_TOO_BIG, b"option data too long")
        return True

    def _needs_tls(self, option: int) -> bool:
        if self._tls is None or not self._tls.required or self._stream.secure:
            return False
        return option not in BEFORE_TLS

    async def _refuse_without_tls(self, option: int, length: int) -> bool:
        """Whatever it says: nothing is learnt, and nothing told, before TLS ("FORCEDTLS mode")."""
        if option == Option.NBD_OPT_EXPORT_NAME:
            raise NegotiationError("EXPORT_NAME without TLS, which is required")
        await self._stream.discard(length)
        await self._reply(option, Reply.NBD_REP_ERR_TLS_REQD, b"this server requires TLS")
        return True

    async def _refuse_at_shutdown(self, option: int) -> bool:
        """What a client had begun to ask for is answered still; then it is hung up on."""
        if option == Option.NBD_OPT_EXPORT_NAME:
            raise NegotiationError("EXPORT_NAME while the server is shutting down")
        await self._reply(option, Reply.NBD_REP_ERR_SHUTDOWN, b"the server is shutting down")
        return True

    async def _reply(self, option: int, reply: Reply, data: bytes = b"") -> None:
        await self._stream.send(self._encode(option, reply, data))

    @staticmethod
    def _encode(option: int, reply: Reply, data: bytes = b"") -> bytes:
        return OPTION_REPLY.pack(NBD_REP_MAGIC, option, reply, len(data)) + data

    # --- one handler an option: True goes on, False ends negotiation ---

    async def _export_name(self, option: int, data: bytes) -> bool:
        if self._style.extended:
            raise NegotiationError("EXPORT_NAME after extended headers were agreed on")
        try:
            name = parse_name(data, name_length_max=self._limits.name_length_max)
        except InvalidOption as error:
            raise NegotiationError(f"EXPORT_NAME: {error}") from None
        export = self._exports.get(name)
        if export is None:
            raise NegotiationError(f"no export {name!r}")
        refusal = export.refusal(self._limits.export_connections_max)
        if refusal is not None:
            raise NegotiationError(refusal)
        session = self._choose(export)
        flags = transmission_flags(export, self._style, session.contexts)
        reply = EXPORT_NAME_REPLY.pack(export.backend.length_bytes, flags)
        await self._stream.send(reply if self._no_zeroes else reply + EXPORT_NAME_ZEROES)
        return False

    def _choose(self, export: Export) -> Session:
        """The client gets in, on these terms, unless it doesn't live to hear of it."""
        export.clients += 1
        contexts = self._contexts.on(export)
        self._session = Session(export, self._style, contexts, tls=self._stream.tls)
        return self._session

    async def _abort(self, option: int, data: bytes) -> bool:
        try:
            await self._reply(option, Reply.NBD_REP_ACK)
        except NegotiationError:
            pass  # The client need not wait for our farewell.
        return False

    async def _start_tls(self, option: int, data: bytes) -> bool:
        if self._tls is None:
            await self._reply(option, Reply.NBD_REP_ERR_POLICY, b"TLS isn't configured here")
            return True
        if data:
            raise InvalidOption("STARTTLS takes no data")
        if self._stream.secure:
            raise InvalidOption("TLS has been started already")
        if self._stream.has_input():
            # A client waits for our answer. Who doesn't wants it taken for what came through TLS.
            raise NegotiationError("something came in the clear behind STARTTLS")
        await self._reply(option, Reply.NBD_REP_ACK)
        self._forget_agreed()
        await self._tls.start(self._stream)
        return True

    def _forget_agreed(self) -> None:
        """What was agreed on before TLS may have been somebody else's wish ("NBD_OPT_STARTTLS")."""
        self._style = SIMPLE
        self._contexts.forget()

    async def _list(self, option: int, data: bytes) -> bool:
        if data:
            raise InvalidOption("LIST takes no data")
        if not self._lists:
            await self._reply(option, Reply.NBD_REP_ERR_POLICY, b"exports aren't listed here")
            return True
        for export in self._exports.list():
            if export.hidden:
                continue
            name = export.name.encode()
            entry = struct.pack(">I", len(name)) + name + export.description.encode()
            await self._reply(option, Reply.NBD_REP_SERVER, entry)
        await self._reply(option, Reply.NBD_REP_ACK)
        return True

    async def _structured_reply(self, option: int, data: bytes) -> bool:
        if data:
            raise InvalidOption("STRUCTURED_REPLY takes no data")
        if self._style.extended:
            text = b"extended headers were agreed on, which take precedence"
            await self._reply(option, Reply.NBD_REP_ERR_EXT_HEADER_REQD, text)
            return True
        return await self._agree_on(option, STRUCTURED)

    async def _extended_headers(self, option: int, data: bytes) -> bool:
        if data:
            raise InvalidOption("EXTENDED_HEADERS takes no data")
        return await self._agree_on(option, EXTENDED)

    async def _agree_on(self, option: int, style: ReplyStyle) -> bool:
        if self._style is style:
            raise InvalidOption(f"{style.name} replies were agreed on before")
        self._style = style
        await self._reply(option, Reply.NBD_REP_ACK)
        return True

    async def _meta_context(self, option: int, data: bytes) -> bool:
        """LIST_META_CONTEXT and SET_META_CONTEXT."""
        setting = option == Option.NBD_OPT_SET_META_CONTEXT
        if setting:
            self._contexts.forget()
        if not self._style.structured:
            raise InvalidOption("structured replies must be agreed on first")
        try:
            query = meta_context.parse_query(data, queries_max=self._limits.meta_queries_max)
        except meta_context.TooManyQueries as error:
            await self._reply(option, Reply.NBD_REP_ERR_TOO_BIG, str(error).encode())
            return True
        except meta_context.BadQuery as error:
            raise InvalidOption(str(error)) from None
        name = parse_name(query.export_name, name_length_max=self._limits.name_length_max)
        export = self._exports.get(name)
        if export is None:
            await self._unknown(option, name)
            return True
        found: Iterable[MetaContext]
        if setting:
            found = self._contexts.choose(export, query.queries)
        else:
            found = meta_context.listed(export, query.queries)
        replies = [
            self._encode(
                option,
                Reply.NBD_REP_META_CONTEXT,
                meta_context.encode_reply(context, listing=not setting),
            )
            for context in found
        ]
        replies.append(self._encode(option, Reply.NBD_REP_ACK))
        await self._stream.send(b"".join(replies))
        return True

    async def _info(self, option: int, data: bytes) -> bool:
        await self._describe(option, data)
        return True

    async def _go(self, option: int, data: bytes) -> bool:
        return not await self._describe(option, data, enter=True)

    async def _describe(self, option: int, data: bytes, *, enter: bool = False) -> bool:
        """Tell about an export, and let the client in if it wants to `enter`; whether that went
        well."""
        request = parse_info_request(data, name_length_max=self._limits.name_length_max)
        export = self._exports.get(request.name)
        if export is None:
            await self._unknown(option, request.name)
            return False
        if enter:
            refusal = export.refusal(self._limits.export_connections_max)
            if refusal is not None:
                await self._reply(option, Reply.NBD_REP_ERR_POLICY, refusal.encode())
                return False
            self._choose(export)
        replies = [
            self._encode(option, Reply.NBD_REP_INFO, item)
            for item in self._info_items(export, request.items)
        ]
        replies.append(self._encode(option, Reply.NBD_REP_ACK))
        await self._stream.send(b"".join(replies))
        return True

    async def _unknown(self, option: int, name: str) -> None:
        text = f"no export named '{name[:64]}'" if name else "no default export"
        await self._reply(option, Reply.NBD_REP_ERR_UNKNOWN, text.encode())

    def _info_items(self, export: Export, wanted: frozenset[int]) -> list[bytes]:
        """NBD_INFO_EXPORT is always told, the rest to those who ask."""
        size = export.backend.length_bytes
        flags = transmission_flags(export, self._style, self._contexts.on(export))
        items = [INFO_EXPORT.pack(Info.NBD_INFO_EXPORT, size, flags)]
        if Info.NBD_INFO_NAME in wanted:
            items.append(struct.pack(">H", Info.NBD_INFO_NAME) + export.name.encode())
        if Info.NBD_INFO_DESCRIPTION in wanted and export.description:
            head = struct.pack(">H", Info.NBD_INFO_DESCRIPTION)
            items.append(head + export.description.encode())
        if Info.NBD_INFO_BLOCK_SIZE in wanted:
            sizes = BLOCK_SIZE_MIN, BLOCK_SIZE_PREFERRED, self._limits.request_length_max
            items.append(INFO_BLOCK_SIZE.pack(Info.NBD_INFO_BLOCK_SIZE, *sizes))
        return items
