# SPDX-License-Identifier: Apache-2.0
"""The NBD wire format: magic numbers, option and command types, flags, errors, and layouts.

Source: doc/proto.md of the NetworkBlockDevice/nbd repository; the names are that document's, so
that one can be searched for in the other. All integers are big-endian.

Layout: handshake ("Newstyle negotiation", "Fixed newstyle negotiation")

    server   u64 NBDMAGIC, u64 IHAVEOPT, u16 handshake flags
    client   u32 client flags
    option   u64 IHAVEOPT, u32 option, u32 length, data
    reply    u64 NBD_REP_MAGIC, u32 option, u32 reply type, u32 length, data

Layout: transmission ("Request message", "Simple reply message")

    request  u32 NBD_REQUEST_MAGIC, u16 flags, u16 type, 8 bytes cookie, u64 offset, u32 length,
             then `length` bytes of data if it is a WRITE
    reply    u32 NBD_SIMPLE_REPLY_MAGIC, u32 error, 8 bytes cookie,
             then the data if it answers a READ and the error is 0

Layout: "Structured reply chunk message", where structured replies were agreed on

    chunk    u32 NBD_STRUCTURED_REPLY_MAGIC, u16 flags, u16 type, 8 bytes cookie, u32 length,
             then `length` bytes, by type:
             OFFSET_DATA   u64 offset, the data
             OFFSET_HOLE   u64 offset, u32 length of the hole
             BLOCK_STATUS  u32 context, then for each extent u32 length, u32 state
             ERROR         u32 error, u16 length of the message, the message
             ERROR_OFFSET  as ERROR, then u64 offset

Layout: "Request message", "Extended reply chunk message" (branch extension-ext-header of that
repository), where extended headers were agreed on

    request  u32 NBD_EXTENDED_REQUEST_MAGIC, u16 flags, u16 type, 8 bytes cookie, u64 offset,
             u64 length, then `length` bytes of payload if PAYLOAD_LEN is among the flags
    chunk    u32 NBD_EXTENDED_REPLY_MAGIC, u16 flags, u16 type, 8 bytes cookie, u64 offset of the
             request, u64 length, then `length` bytes as above; instead of BLOCK_STATUS:
             BLOCK_STATUS_EXT  u32 context, u32 count, then for each extent u64 length, u64 state
"""

from __future__ import annotations

import enum
import errno
import struct

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
NBD_REP_MAGIC = 0x3E889045565A9
NBD_REQUEST_MAGIC = 0x25609513
NBD_SIMPLE_REPLY_MAGIC = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC = 0x668E33EF
NBD_EXTENDED_REQUEST_MAGIC = 0x21E41C71
NBD_EXTENDED_REPLY_MAGIC = 0x6E8A278C


class HandshakeFlag(enum.IntFlag):
    """What the server offers in its greeting ("Handshake flags")."""

    NBD_FLAG_FIXED_NEWSTYLE = 1 << 0
    NBD_FLAG_NO_ZEROES = 1 << 1


class ClientFlag(enum.IntFlag):
    """What the client answers to it ("Client flags")."""

    NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0
    NBD_FLAG_C_NO_ZEROES = 1 << 1


class TransmissionFlag(enum.IntFlag):
    """What an export can do ("Transmission flags")."""

    NBD_FLAG_HAS_FLAGS = 1 << 0
    NBD_FLAG_READ_ONLY = 1 << 1
    NBD_FLAG_SEND_FLUSH = 1 << 2
    NBD_FLAG_SEND_FUA = 1 << 3
    NBD_FLAG_ROTATIONAL = 1 << 4
    NBD_FLAG_SEND_TRIM = 1 << 5
    NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6
    NBD_FLAG_SEND_DF = 1 << 7
    NBD_FLAG_CAN_MULTI_CONN = 1 << 8
    NBD_FLAG_SEND_CACHE = 1 << 10
    NBD_FLAG_SEND_FAST_ZERO = 1 << 11
    NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(enum.IntEnum):
    """What a client may ask for during negotiation ("Option types")."""

    NBD_OPT_EXPORT_NAME = 1
    NBD_OPT_ABORT = 2
    NBD_OPT_LIST = 3
    NBD_OPT_STARTTLS = 5
    NBD_OPT_INFO = 6
    NBD_OPT_GO = 7
    NBD_OPT_STRUCTURED_REPLY = 8
    NBD_OPT_LIST_META_CONTEXT = 9
    NBD_OPT_SET_META_CONTEXT = 10
    NBD_OPT_EXTENDED_HEADERS = 11


_REP_ERROR = 1 << 31


class Reply(enum.IntEnum):
    """How the server answers an option ("Option reply types"); errors have bit 31 set."""

    NBD_REP_ACK = 1
    NBD_REP_SERVER = 2
    NBD_REP_INFO = 3
    NBD_REP_META_CONTEXT = 4
    NBD_REP_ERR_UNSUP = _REP_ERROR + 1
    NBD_REP_ERR_POLICY = _REP_ERROR + 2
    NBD_REP_ERR_INVALID = _REP_ERROR + 3
    NBD_REP_ERR_TLS_REQD = _REP_ERROR + 5
    NBD_REP_ERR_UNKNOWN = _REP_ERROR + 6
    NBD_REP_ERR_SHUTDOWN = _REP_ERROR + 7
    NBD_REP_ERR_BLOCK_SIZE_REQD = _REP_ERROR + 8
    NBD_REP_ERR_TOO_BIG = _REP_ERROR + 9
    NBD_REP_ERR_EXT_HEADER_REQD = _REP_ERROR + 10


class Info(enum.IntEnum):
    """Aspects of an export that INFO and GO tell about ("NBD_REP_INFO")."""

    NBD_INFO_EXPORT = 0
    NBD_INFO_NAME = 1
    NBD_INFO_DESCRIPTION = 2
    NBD_INFO_BLOCK_SIZE = 3


class Command(enum.IntEnum):
    """Requests of the transmission phase ("Request types")."""

    NBD_CMD_READ = 0
    NBD_CMD_WRITE = 1
    NBD_CMD_DISC = 2
    NBD_CMD_FLUSH = 3
    NBD_CMD_TRIM = 4
    NBD_CMD_CACHE = 5
    NBD_CMD_WRITE_ZEROES = 6
    NBD_CMD_BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """Flags of a request ("Command flags")."""

    NBD_CMD_FLAG_FUA = 1 << 0
    NBD_CMD_FLAG_NO_HOLE = 1 << 1
    NBD_CMD_FLAG_DF = 1 << 2
    NBD_CMD_FLAG_REQ_ONE = 1 << 3
    NBD_CMD_FLAG_FAST_ZERO = 1 << 4
    NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5


class ChunkType(enum.IntEnum):
    """What a chunk of a structured reply holds ("Structured reply types"); errors have bit 15."""

    NBD_REPLY_TYPE_NONE = 0
    NBD_REPLY_TYPE_OFFSET_DATA = 1
    NBD_REPLY_TYPE_OFFSET_HOLE = 2
    NBD_REPLY_TYPE_BLOCK_STATUS = 5
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6
    NBD_REPLY_TYPE_ERROR = 1 << 15 | 1
    NBD_REPLY_TYPE_ERROR_OFFSET = 1 << 15 | 2


NBD_REPLY_FLAG_DONE = 1 << 0
"""The last chunk of a reply ("Structured reply flags")."""


class AllocationState(enum.IntFlag):
    """What base:allocation says of an extent ("The base: meta context namespace")."""

    NBD_STATE_HOLE = 1 << 0
    NBD_STATE_ZERO = 1 << 1


class NbdError(enum.IntEnum):
    """The error values that may travel ("Error values"); they are not the host's errno."""

    NBD_SUCCESS = 0
    NBD_EPERM = 1
    NBD_EIO = 5
    NBD_ENOMEM = 12
    NBD_EINVAL = 22
    NBD_ENOSPC = 28
    NBD_EOVERFLOW = 75
    NBD_ENOTSUP = 95
    NBD_ESHUTDOWN = 108


_ERROR_OF_ERRNO = {
    errno.EPERM: NbdError.NBD_EPERM,
    errno.EROFS: NbdError.NBD_EPERM,
    errno.EACCES: NbdError.NBD_EPERM,
    errno.EIO: NbdError.NBD_EIO,
    errno.ENOMEM: NbdError.NBD_ENOMEM,
    errno.EINVAL: NbdError.NBD_EINVAL,
    errno.ENOSPC: NbdError.NBD_ENOSPC,
    errno.EDQUOT: NbdError.NBD_ENOSPC,
    errno.EFBIG: NbdError.NBD_ENOSPC,
    errno.EOVERFLOW: NbdError.NBD_EOVERFLOW,
    errno.ENOTSUP: NbdError.NBD_ENOTSUP,
    errno.ESHUTDOWN: NbdError.NBD_ESHUTDOWN,
}


def error_of_errno(code: int | None) -> NbdError:
    """The error value for the host's errno `code`; what has no counterpart is an I/O error."""
    return _ERROR_OF_ERRNO.get(code or errno.EIO, NbdError.NBD_EIO)


_ERRNO_OF_ERROR = {
    NbdError.NBD_EPERM: errno.EPERM,
    NbdError.NBD_EIO: errno.EIO,
    NbdError.NBD_ENOMEM: errno.ENOMEM,
    NbdError.NBD_ENOSPC: errno.ENOSPC,
    NbdError.NBD_EOVERFLOW: errno.EOVERFLOW,
    NbdError.NBD_ENOTSUP: errno.ENOTSUP,
    NbdError.NBD_ESHUTDOWN: errno.ESHUTDOWN,
}


def errno_of_error(value: int) -> int:
    """The host's errno for an error value of the wire; one that isn't known is EINVAL."""
    return next((code for error, code in _ERRNO_OF_ERROR.items() if error == value), errno.EINVAL)


STRING_LENGTH_MAX = 4096
"""The longest string that the document allows, in bytes."""

GREETING = struct.Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""

CLIENT_FLAGS = struct.Struct(">I")

OPTION = struct.Struct(">QII")
"""IHAVEOPT, option, length of the data that follows."""

OPTION_REPLY = struct.Struct(">QIII")
"""NBD_REP_MAGIC, option, reply type, length of the data that follows."""

EXPORT_NAME_REPLY = struct.Struct(">QH")
"""Size of the export, transmission flags; then 124 zero bytes unless NO_ZEROES was agreed on."""

EXPORT_NAME_ZEROES = bytes(124)

INFO_EXPORT = struct.Struct(">HQH")
"""NBD_INFO_EXPORT, size of the export, transmission flags."""

INFO_BLOCK_SIZE = struct.Struct(">HIII")
"""NBD_INFO_BLOCK_SIZE, minimum block size, preferred block size, maximum payload size."""

REQUEST = struct.Struct(">Q8sQI")
"""Magic, flags and type as one number (see `request_word`), cookie, offset, length.

The first three fields are compared far more often than they are taken apart: a plain READ or WRITE
is recognised by one comparison of integers.
"""

EXTENDED_REQUEST = struct.Struct(">Q8sQQ")
"""As REQUEST, with a length of 64 bits."""

SIMPLE_REPLY = struct.Struct(">II8s")
"""NBD_SIMPLE_REPLY_MAGIC, error, cookie."""

SIMPLE_REPLY_OK = struct.pack(">II", NBD_SIMPLE_REPLY_MAGIC, 0)
"""The head of a success; the cookie's eight bytes complete it."""


STRUCTURED_REPLY = struct.Struct(">IHHQI")
"""NBD_STRUCTURED_REPLY_MAGIC, flags, type, cookie, length of what follows."""

EXTENDED_REPLY = struct.Struct(">IHHQQQ")
"""NBD_EXTENDED_REPLY_MAGIC, flags, type, cookie, offset of the request, length of what follows."""


def request_word(command: int, flags: int = 0, magic: int = NBD_REQUEST_MAGIC) -> int:
    """The first eight bytes of a request, as the number that `REQUEST` unpacks."""
    return magic << 32 | flags << 16 | command
