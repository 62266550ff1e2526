# SPDX-License-Identifier: Apache-2.0
"""The client's side of fixed newstyle negotiation: from a connected socket to an export.

Extended headers, or else structured replies, and a meta context are asked for first, since all must
be settled before the export is chosen. Then GO, with a wish to hear of block sizes; a server that
doesn't know GO gets EXPORT_NAME, which can't say why it refuses: it hangs up.

What a server may send is bounded: the stream that is handed in has a bound on bytes, and each reply
one on its length.
"""

from __future__ import annotations

import struct
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
    TransmissionFlag,
)

if TYPE_CHECKING:
    from blockemu.drivers.nbd.client_tls import ClientTls

OLDSTYLE_MAGIC = 0x00420281861253

REPLY_BYTES_MAX = 16 * 1024
"""An option's reply. Longer ones have nothing in them that we asked for."""

REPLIES_MAX = 1024
"""Replies to one option: those to GO are one for each kind of information."""

NEGOTIATION_BYTES_MAX = 1024 * 1024
"""All that a server may send before it has given us the export."""

BLOCK_BYTES_MAX = 64 * 1024
"""The largest minimum block size; the document's own bound."""

PAYLOAD_BYTES_MAX = 32 * 1024 * 1024
"""The most that one READ or WRITE carries, whatever more a server would take."""

LENGTH_MAX = 2**63 - 1
BASE_ALLOCATION = "base:allocation"
_ERROR_BIT = 1 << 31

_REFUSALS = {
    Reply.NBD_REP_ERR_POLICY: "the server's policy forbids it",
    Reply.NBD_REP_ERR_INVALID: "the server calls the request invalid",
    Reply.NBD_REP_ERR_TLS_REQD: "the server wants TLS: it takes tls-creds=, or a nbds:// URI",
    Reply.NBD_REP_ERR_UNKNOWN: "the server has no such export",
    Reply.NBD_REP_ERR_SHUTDOWN: "the server is shutting down",
    Reply.NBD_REP_ERR_BLOCK_SIZE_REQD: "the server wants block sizes to be obeyed",
    Reply.NBD_REP_ERR_TOO_BIG: "the server calls the request too big",
}


_MAY_PASS = (Reply.NBD_REP_ERR_UNKNOWN, Reply.NBD_REP_ERR_POLICY, Reply.NBD_REP_ERR_SHUTDOWN)
"""Refusals of a server that is being stopped, or was started and hasn't all its exports yet."""


class RefusedError(NegotiationError):
    """The server answered with an error of its own. `may_pass`: it may be another answer soon;
    otherwise trying again won't help."""

    def __init__(self, reason: str, *, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFacts:
    """What was agreed on. Sizes in bytes; `block_min` is a power of two that divides `length`.

    `context`: the number that stands for the meta context in block status replies; None when the
    server has none. `extended`: headers have lengths of 64 bits.
    """

    length: int
    flags: TransmissionFlag
    block_min: int
    block_preferred: int
    payload_max: int
    structured: bool
    context: int | None
    extended: bool = False

    @property
    def read_only(self) -> bool:
        """The server accepts no writes."""
        return bool(self.flags & TransmissionFlag.NBD_FLAG_READ_ONLY)

    @property
    def multi_conn(self) -> bool:
        """A flush on one connection covers what was written through all."""
        return bool(self.flags & TransmissionFlag.NBD_FLAG_CAN_MULTI_CONN)


async def negotiate(
    stream: NegotiationStream, export: str, meta_context: str = BASE_ALLOCATION
) -> ExportFacts:
    """Choose `export`, and `meta_context` for its block status. When this returns, the next byte
    either way is transmission's. A server must have the context, unless it is base:allocation.

    Suspends: for the server. Raises: NegotiationError; RefusedError, where the server said no.
    """
    name = export.encode(errors="surrogateescape")
    return await Negotiation(stream, name, meta_context).run()


class Negotiation:
    """One negotiation; inspection.py derives from it to ask for more."""

    def __init__(
        self, stream: NegotiationStream, export: bytes, meta_context: str = BASE_ALLOCATION
    ) -> None:
        self._stream = stream
        self._export = export
        self._meta_context = meta_context
        self._extended = False
        self._no_zeroes = False
        self._structured = False
        self._context: int | None = None

    async def run(self) -> ExportFacts:
        if await self._greet():
            self._extended = await self._ask_plain(Option.NBD_OPT_EXTENDED_HEADERS)
            self._structured = self._extended or await self._ask_plain(
                Option.NBD_OPT_STRUCTURED_REPLY
            )
            if self._structured:
                self._context = await self._ask_context()
            self._insist_on_context()
            facts = await self._go()
            if facts is not None:
                return facts
            if self._extended:
                raise NegotiationError("server has extended headers, and doesn't know GO")
        self._insist_on_context()
        return await self._choose_by_name()

    def _insist_on_context(self) -> None:
        """Without base:allocation all is data; another context was asked for by the user."""
        if self._context is None and self._meta_context != BASE_ALLOCATION:
            raise RefusedError(f"the server has no meta context '{self._meta_context}'")

    async def _greet(self) -> bool:
        """Exchange greetings; whether the server takes options other than EXPORT_NAME."""
        magic, second, flags = GREETING.unpack(await self._stream.receive(GREETING.size))
        if magic != NBDMAGIC:
            raise NegotiationError("is no NBD server")
        if second == OLDSTYLE_MAGIC:
            raise NegotiationError("speaks the old style of NBD, which isn't supported")
        if second != IHAVEOPT:
            raise NegotiationError(f"server greets with a bad magic number, {second:#x}")
        fixed = bool(flags & HandshakeFlag.NBD_FLAG_FIXED_NEWSTYLE)
        answer = ClientFlag(0)
        if fixed:
            answer |= ClientFlag.NBD_FLAG_C_FIXED_NEWSTYLE
        if flags & HandshakeFlag.NBD_FLAG_NO_ZEROES:
            answer |= ClientFlag.NBD_FLAG_C_NO_ZEROES
            self._no_zeroes = True
        await self._stream.send(CLIENT_FLAGS.pack(answer))
        if self._stream.wants_tls is not None:
            await self._start_tls(self._stream.wants_tls, fixed=fixed)
        return fixed

    async def _start_tls(self, tls: ClientTls, *, fixed: bool) -> None:
        """Before anything else is said; without TLS we don't go on."""
        if not fixed:
            raise RefusedError("the server has no TLS, and no options to ask for it")
        await self._send(Option.NBD_OPT_STARTTLS)
        kind, data = await self._reply(Option.NBD_OPT_STARTTLS)
        if kind != Reply.NBD_REP_ACK or data:
            raise RefusedError(f"no TLS: {refusal(kind, data)}")
        try:
            await self._stream.start_tls(tls.stream(self._stream.socket))
        except NegotiationError as error:
            if getattr(error.__cause__, "final", False):
                raise RefusedError(str(error)) from error
            raise

    # --- options ---

    async def _send(self, option: Option, data: bytes = b"") -> None:
        await self._stream.send(OPTION.pack(IHAVEOPT, option, len(data)) + data)

    async def _reply(self, option: Option) -> tuple[int, bytes]:
        """One reply to `option`: its type and data."""
        head = await self._stream.receive(OPTION_REPLY.size)
        magic, to, kind, length = OPTION_REPLY.unpack(head)
        if magic != NBD_REP_MAGIC:
            raise NegotiationError(f"server's reply has a bad magic number, {magic:#x}")
        if to != option:
            raise NegotiationError(f"server answers option {to}, and was asked {option.value}")
        if length > REPLY_BYTES_MAX:
            raise NegotiationError(f"server's reply to {option.name} has {length} bytes")
        return kind, await self._stream.receive(length)

    async def _ask_plain(self, option: Option) -> bool:
        """An option without data, which the server grants or not."""
        await self._send(option)
        kind, data = await self._reply(option)
        if kind == Reply.NBD_REP_ACK and not data:
            return True
        if kind & _ERROR_BIT:
            _refuse_if_final(kind, data)
            return False
        name = option.name.removeprefix("NBD_OPT_")
        raise NegotiationError(f"server answers {name} with reply type {kind:#x}")

    async def _ask_context(self) -> int | None:
        """The number of the meta context, or None."""
        option = Option.NBD_OPT_SET_META_CONTEXT
        query = self._meta_context.encode(errors="surrogateescape")
        data = struct.pack(">I", len(self._export)) + self._export
        await self._send(option, data + struct.pack(">II", 1, len(query)) + query)
        found: int | None = None
        for _ in range(REPLIES_MAX):
            kind, data = await self._reply(option)
            if kind == Reply.NBD_REP_ACK:
                return found
            if kind & _ERROR_BIT:
                _refuse_if_final(kind, data)
                return None
            if kind != Reply.NBD_REP_META_CONTEXT or len(data) < 4 or found is not None:
                raise NegotiationError("server answers SET_META_CONTEXT with what wasn't asked")
            if data[4:] != query:
                name = data[4:].decode(errors="replace")
                raise NegotiationError(f"server sets meta context '{name}', which wasn't asked for")
            found = int.from_bytes(data[:4], "big")
        raise NegotiationError("server answers SET_META_CONTEXT without end")

    async def _go(self) -> ExportFacts | None:
        """None: the server doesn't know GO."""
        option = Option.NBD_OPT_GO
        wishes = struct.pack(">HH", 1, Info.NBD_INFO_BLOCK_SIZE)
        await self._send(option, struct.pack(">I", len(self._export)) + self._export + wishes)
        export: tuple[int, ...] | None = None
        blocks: tuple[int, ...] | None = None
        for _ in range(REPLIES_MAX):
            kind, data = await self._reply(option)
            if kind == Reply.NBD_REP_ACK:
                if export is None:
                    raise NegotiationError("server grants the export, and doesn't say how long")
                return self._facts(export, blocks)
            if kind == Reply.NBD_REP_ERR_UNSUP:
                return None
            if kind & _ERROR_BIT:
                raise _refused(kind, data)
            if kind != Reply.NBD_REP_INFO or len(data) < 2:
                raise NegotiationError(f"server answers GO with reply type {kind:#x}")
            info = int.from_bytes(data[:2], "big")
            if info == Info.NBD_INFO_EXPORT:
                export = _fields(INFO_EXPORT, data)
            elif info == Info.NBD_INFO_BLOCK_SIZE:
                blocks = _fields(INFO_BLOCK_SIZE, data)
        raise NegotiationError("server answers GO without end")

    async def _choose_by_name(self) -> ExportFacts:
        await self._send(Option.NBD_OPT_EXPORT_NAME, self._export)
        try:
            head = await self._stream.receive(EXPORT_NAME_REPLY.size)
        except NegotiationError as error:
            raise NegotiationError(f"{error} when asked for the export: it may have none") from None
        if not self._no_zeroes:
            await self._stream.receive(len(EXPORT_NAME_ZEROES))
        return self._facts(EXPORT_NAME_REPLY.unpack(head), None)

    # --- what it all means ---

    def _facts(self, export: tuple[int, ...], blocks: tuple[int, ...] | None) -> ExportFacts:
        length, flags = export
        if length > LENGTH_MAX:
            raise NegotiationError(f"server says that the export has {length} bytes")
        if not flags & TransmissionFlag.NBD_FLAG_HAS_FLAGS:
            flags = 0
        minimum, preferred, maximum = blocks or _default_blocks(length)
        _check_blocks(minimum, preferred, maximum, length)
        return ExportFacts(
            length=length,
            flags=TransmissionFlag(flags),
            block_min=minimum,
            block_preferred=preferred,
            payload_max=max(min(maximum, PAYLOAD_BYTES_MAX) & ~(minimum - 1), minimum),
            structured=self._structured,
            context=self._context,
            extended=self._extended,
        )


def _default_blocks(length: int) -> tuple[int, int, int]:
    """Of a server that says nothing of them: what every server takes ("Block size constraints").

    Sectors, if the export consists of them.
    """
    return (512 if length % 512 == 0 else 1), 4096, PAYLOAD_BYTES_MAX


def _check_blocks(minimum: int, preferred: int, maximum: int, length: int) -> None:
    if not 0 < minimum <= BLOCK_BYTES_MAX or minimum & (minimum - 1):
        raise NegotiationError(
            f"server's minimum block size is {minimum}: no power of two up to {BLOCK_BYTES_MAX}"
        )
    if maximum < minimum or (maximum != 0xFFFFFFFF and maximum % minimum):
        raise NegotiationError(f"server's block sizes are at least {minimum}, at most {maximum}")
    if preferred < minimum or preferred & (preferred - 1):
        raise NegotiationError(f"server's preferred block size is {preferred}")
    if length % minimum:
        raise NegotiationError(
            f"server says that the export has {length} bytes, in blocks of {minimum}"
        )


def _fields(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    """All fields but the first, which says what it is."""
    if len(data) != layout.size:
        raise NegotiationError(f"server's information has {len(data)} bytes, not {layout.size}")
    fields: tuple[int, ...] = layout.unpack(data)[1:]
    return fields


def _refuse_if_final(kind: int, data: bytes) -> None:
    """Raises: RefusedError, where asking for anything else is in vain."""
    if kind in (Reply.NBD_REP_ERR_TLS_REQD, Reply.NBD_REP_ERR_SHUTDOWN):
        raise _refused(kind, data)


def _refused(kind: int, data: bytes) -> RefusedError:
    return RefusedError(refusal(kind, data), may_pass=kind in _MAY_PASS)


def refusal(kind: int, data: bytes) -> str:
    """What an error reply means, with what the server says of it."""
    try:
        said = _REFUSALS.get(Reply(kind), "")
    except ValueError:
        said = ""
    text = data.decode(errors="replace").strip()
    return (said or f"the server answers with error {kind:#x}") + (f" ('{text}')" if text else "")
