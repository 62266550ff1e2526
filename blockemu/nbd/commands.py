# SPDX-License-Identifier: Apache-2.0
"""The commands of the transmission phase, and what the protocol itself says against a request.

`check` is asked before any backend sees the request. Its answer is the same whoever moves the data.

Source: "Request types", "Command flags", "Error values".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blockemu.drivers.nbd.protocol import Command, CommandFlag, NbdError
from blockemu.nbd.reply_style import Failure

if TYPE_CHECKING:
    from blockemu.limits import Limits
    from blockemu.nbd.session import Session

# Plain numbers, as they come from the wire: comparing an enum's members takes ten times as long.
READ: Final = int(Command.NBD_CMD_READ)
WRITE: Final = int(Command.NBD_CMD_WRITE)
DISC: Final = int(Command.NBD_CMD_DISC)
FLUSH: Final = int(Command.NBD_CMD_FLUSH)
TRIM: Final = int(Command.NBD_CMD_TRIM)
CACHE: Final = int(Command.NBD_CMD_CACHE)
WRITE_ZEROES: Final = int(Command.NBD_CMD_WRITE_ZEROES)
BLOCK_STATUS: Final = int(Command.NBD_CMD_BLOCK_STATUS)

FUA: Final = int(CommandFlag.NBD_CMD_FLAG_FUA)
NO_HOLE: Final = int(CommandFlag.NBD_CMD_FLAG_NO_HOLE)
DF: Final = int(CommandFlag.NBD_CMD_FLAG_DF)
REQ_ONE: Final = int(CommandFlag.NBD_CMD_FLAG_REQ_ONE)
FAST_ZERO: Final = int(CommandFlag.NBD_CMD_FLAG_FAST_ZERO)
PAYLOAD_LEN: Final = int(CommandFlag.NBD_CMD_FLAG_PAYLOAD_LEN)

# FUA is valid for all commands, and means nothing to those that don't write.
_FLAGS_ALLOWED: Final = {
    READ: FUA,
    WRITE: FUA,
    DISC: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: FUA | REQ_ONE,
}
_WRITING: Final = frozenset((WRITE, TRIM, WRITE_ZEROES))

WITH_DATA: Final = frozenset((READ, WRITE))
"""Commands whose length is data that travels; that of others is only a range."""


def name_of(command: int) -> str:
    """The command as the document calls it, without its prefix."""
    try:
        return Command(command).name.removeprefix("NBD_CMD_")
    except ValueError:
        return f"command {command}"


def data_bytes(command: int, length: int, limits: Limits) -> int:
    """Memory that a request may take while it is in flight: its data, or the extents of its
    answer."""
    if command in WITH_DATA:
        return length
    return limits.status_reply_bytes_max if command == BLOCK_STATUS else 0


def payload_bytes(session: Session, command: int, flags: int, length: int) -> int:
    """How many bytes the client sends behind the request's header ("Request message")."""
    if session.style.extended:
        return length if flags & PAYLOAD_LEN else 0
    return length if command == WRITE else 0


def check(
    session: Session, limits: Limits, command: int, flags: int, *, offset: int, length: int
) -> Failure | None:
    """What the protocol has to say against this request; None when it has nothing.

    `flags` as the client sent them. A request of no length is fine and does nothing.
    """
    export, style = session.export, session.style
    allowed = _FLAGS_ALLOWED.get(command)
    if allowed is None:
        return Failure(NbdError.NBD_EINVAL, f"there is no {name_of(command)} here")
    if command == READ and style.structured:
        allowed |= DF
    if command == WRITE and style.extended:
        allowed |= PAYLOAD_LEN
        if not flags & PAYLOAD_LEN:
            return Failure(NbdError.NBD_EINVAL, "WRITE without NBD_CMD_FLAG_PAYLOAD_LEN")
    if command == BLOCK_STATUS and style.extended and session.contexts:
        allowed |= PAYLOAD_LEN
    if flags & ~allowed:
        text = f"flags {flags & ~allowed:#x} don't go with {name_of(command)}"
        return Failure(NbdError.NBD_EINVAL, text)
    if command == FLUSH:
        if offset or length:
            return Failure(NbdError.NBD_EINVAL, "FLUSH has neither offset nor length")
        return None
    if command == BLOCK_STATUS:
        if (failure := _check_status(session, flags, length)) is not None:
            return failure
        if flags & PAYLOAD_LEN:
            return None  # the range is in the payload
    if command in _WRITING and export.read_only:
        return Failure(NbdError.NBD_EPERM, f"export '{export.name}' is read-only")
    if command in WITH_DATA and length > limits.request_length_max:
        # Where DF is known, a client that reads knows EOVERFLOW, too; and that it may try less.
        too_long = command == READ and style.structured
        error = NbdError.NBD_EOVERFLOW if too_long else NbdError.NBD_EINVAL
        most = limits.request_length_max
        return Failure(error, f"{name_of(command)} of {length} bytes: at most {most} at once")
    size = export.backend.length_bytes
    if offset + length > size:
        error = NbdError.NBD_ENOSPC if command in (WRITE, WRITE_ZEROES) else NbdError.NBD_EINVAL
        text = f"{name_of(command)} of {length} bytes at {offset} goes past the end, {size}"
        return Failure(error, text, max(offset, size) if length else None)
    return None


def _check_status(session: Session, flags: int, length: int) -> Failure | None:
    """What is special about BLOCK_STATUS: what must have been agreed on, and its payload."""
    contexts = session.contexts
    if not contexts:
        text = "BLOCK_STATUS, but no meta context was chosen for this export"
        return Failure(NbdError.NBD_EINVAL, text)
    if not length:
        return Failure(NbdError.NBD_EINVAL, "BLOCK_STATUS of no bytes")
    if flags & PAYLOAD_LEN and length > 8 + 4 * len(contexts):
        text = f"a payload of {length} bytes names more contexts than the {len(contexts)} chosen"
        return Failure(NbdError.NBD_EINVAL, text)
    return None
