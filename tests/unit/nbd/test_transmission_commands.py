# SPDX-License-Identifier: Apache-2.0
"""Each command of the transmission phase, each error, on the fast path and on the slow one."""

from __future__ import annotations

import errno
import random

import pytest

from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.nbd.protocol import Command, CommandFlag, NbdError
from blockemu.limits import Limits
from tests.unit.nbd.conftest import DISK_BYTES, Serve, Served

READ = Command.NBD_CMD_READ
WRITE = Command.NBD_CMD_WRITE
FLUSH = Command.NBD_CMD_FLUSH
TRIM = Command.NBD_CMD_TRIM
WRITE_ZEROES = Command.NBD_CMD_WRITE_ZEROES
FUA = CommandFlag.NBD_CMD_FLAG_FUA
NO_HOLE = CommandFlag.NBD_CMD_FLAG_NO_HOLE
MIB = 1 << 20

both_paths = pytest.mark.parametrize("mapped", [False, True], ids=["graph", "map"])


def ask(served: Served, command: int, *, flags: int = 0, offset: int = 0, length: int = 0) -> int:
    """A request without payload: the error of its reply."""
    served.client.request(command, cookie=77, flags=flags, offset=offset, length=length)
    cookie, error, _ = served.client.reply()
    assert cookie == 77
    return error


def alive(served: Served) -> bool:
    """The connection still answers."""
    served.client.request(READ, cookie=9, offset=0, length=1)
    return served.client.reply(1)[:2] == (9, 0)


@both_paths
@pytest.mark.parametrize("length", [1, 511, 4096, 65536, MIB + 3])
def test_read_returns_the_bytes(serve: Serve, mapped: bool, length: int) -> None:
    served = serve(mapped=mapped)
    content = random.Random(length).randbytes(length)
    served.backend.disk[12345 : 12345 + length] = content
    served.client.request(READ, cookie=2**63 + 5, offset=12345, length=length)
    assert served.client.reply(length) == (2**63 + 5, 0, content)
    assert bool(served.backend.file.calls) is mapped
    assert bool(served.backend.calls) is not mapped


@both_paths
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("length", [1, 511, 4096, 65536, 65537, MIB + 3])
def test_write_stores_the_bytes(serve: Serve, mapped: bool, inline: bool, length: int) -> None:
    served = serve(mapped=mapped)
    served.backend.file.writes_inline = inline
    content = random.Random(length).randbytes(length)
    served.client.request(WRITE, cookie=3, offset=777, payload=content)
    assert served.client.reply() == (3, 0, b"")
    assert served.backend.disk[777 : 777 + length] == content
    assert not any(served.backend.disk[:777])
    assert not any(served.backend.disk[777 + length :])
    assert bool(served.backend.calls) is not mapped


def test_fua_write_reaches_the_backend_with_its_flag(serve: Serve) -> None:
    served = serve(mapped=True)
    served.client.request(WRITE, flags=FUA, offset=0, payload=b"x" * 100)
    assert served.client.reply() == (0, 0, b"")
    assert served.backend.calls == [("pwritev", 0, 100, RequestFlags.FUA)]


def test_fua_on_a_read_is_ignored(serve: Serve) -> None:
    served = serve()
    served.client.request(READ, flags=FUA, length=5)
    assert served.client.reply(5) == (0, 0, bytes(5))


def test_flush_reaches_the_backend(serve: Serve) -> None:
    served = serve()
    assert ask(served, FLUSH) == 0
    assert served.backend.calls == [("flush",)]


def test_trim_reaches_the_backend(serve: Serve) -> None:
    served = serve()
    assert ask(served, TRIM, offset=4096, length=8192) == 0
    assert served.backend.calls == [("pdiscard", 4096, 8192)]


def test_trim_with_fua_flushes_after(serve: Serve) -> None:
    served = serve()
    assert ask(served, TRIM, flags=FUA, length=8192) == 0
    assert served.backend.calls == [("pdiscard", 0, 8192), ("flush",)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (0, RequestFlags.MAY_UNMAP),
        (NO_HOLE, RequestFlags.NONE),
        (FUA, RequestFlags.MAY_UNMAP | RequestFlags.FUA),
        (FUA | NO_HOLE, RequestFlags.FUA),
    ],
)
def test_write_zeroes_says_whether_a_hole_will_do(
    serve: Serve, flags: int, expected: RequestFlags
) -> None:
    served = serve()
    assert ask(served, WRITE_ZEROES, flags=flags, offset=1, length=4096) == 0
    assert served.backend.calls == [("pwrite_zeroes", 1, 4096, expected)]


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_range_commands_may_be_longer_than_a_payload(serve: Serve, command: int) -> None:
    limits = Limits(request_length_max=MIB, in_flight_bytes_max=MIB)
    served = serve(limits=limits)
    assert ask(served, command, length=DISK_BYTES) == 0


@both_paths
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, WRITE_ZEROES])
def test_no_length_does_nothing_well(serve: Serve, mapped: bool, command: int) -> None:
    served = serve(mapped=mapped)
    assert ask(served, command, offset=DISK_BYTES) == 0
    assert not served.backend.calls
    assert not served.backend.file.calls


# --- errors ---


@both_paths
@pytest.mark.parametrize(
    ("command", "error"),
    [
        (READ, NbdError.NBD_EINVAL),
        (TRIM, NbdError.NBD_EINVAL),
        (WRITE, NbdError.NBD_ENOSPC),
        (WRITE_ZEROES, NbdError.NBD_ENOSPC),
    ],
)
@pytest.mark.parametrize("offset", [DISK_BYTES - 99, DISK_BYTES, 2**63, 2**64 - 1])
def test_past_the_end_is_refused(
    serve: Serve, mapped: bool, command: int, error: int, offset: int
) -> None:
    served = serve(mapped=mapped)
    payload = b"x" * 100 if command == WRITE else b""
    served.client.request(command, offset=offset, length=100, payload=payload)
    assert served.client.reply()[1] == error
    assert alive(served)
    assert not any(served.backend.disk)


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
@both_paths
def test_writing_to_a_read_only_export_is_refused(serve: Serve, mapped: bool, command: int) -> None:
    served = serve(mapped=mapped, read_only=True)
    payload = b"x" * 100 if command == WRITE else b""
    served.client.request(command, length=100, payload=payload)
    assert served.client.reply()[1] == NbdError.NBD_EPERM
    assert alive(served)
    assert not any(served.backend.disk)


@pytest.mark.parametrize("command", [7, 8, 255, 65535])
def test_unknown_command_is_refused(serve: Serve, command: int) -> None:
    served = serve()
    assert ask(served, command, length=512) == NbdError.NBD_EINVAL
    assert alive(served)


@both_paths
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (READ, NO_HOLE),
        (WRITE, NO_HOLE),
        (WRITE, 1 << 15),
        (FLUSH, NO_HOLE),
        (TRIM, NO_HOLE),
        (WRITE_ZEROES, CommandFlag.NBD_CMD_FLAG_DF),
    ],
)
def test_unknown_flag_is_refused(serve: Serve, mapped: bool, command: int, flags: int) -> None:
    served = serve(mapped=mapped)
    payload = b"x" * 100 if command == WRITE else b""
    served.client.request(command, flags=flags, payload=payload)
    assert served.client.reply()[1] == NbdError.NBD_EINVAL
    assert alive(served)
    assert not any(served.backend.disk)


def test_flush_of_a_range_is_refused(serve: Serve) -> None:
    served = serve()
    assert ask(served, FLUSH, length=512) == NbdError.NBD_EINVAL
    assert ask(served, FLUSH, offset=512) == NbdError.NBD_EINVAL


@both_paths
def test_too_long_read_is_refused(serve: Serve, mapped: bool) -> None:
    limits = Limits(request_length_max=MIB, in_flight_bytes_max=MIB)
    served = serve(mapped=mapped, limits=limits)
    chunks = served.client.style != "simple"
    error = NbdError.NBD_EOVERFLOW if chunks else NbdError.NBD_EINVAL
    assert ask(served, READ, length=MIB + 1) == error
    assert ask(served, READ, length=2**32 - 1) == error
    assert alive(served)


@pytest.mark.style_only("simple", "structured")
@both_paths
def test_too_long_write_is_dropped_and_refused(serve: Serve, mapped: bool) -> None:
    limits = Limits(request_length_max=MIB, in_flight_bytes_max=MIB, discard_length_max=2 * MIB)
    served = serve(mapped=mapped, limits=limits)
    served.client.request(WRITE, cookie=4, payload=b"x" * (2 * MIB))
    assert served.client.reply() == (4, NbdError.NBD_EINVAL, b"")
    assert alive(served)
    assert not any(served.backend.disk)


def test_refused_payload_beyond_the_bound_ends_the_connection(serve: Serve) -> None:
    limits = Limits(request_length_max=MIB, in_flight_bytes_max=MIB, discard_length_max=MIB)
    served = serve(limits=limits)
    served.client.send(served.client.header(WRITE, length=MIB + 1))
    assert served.client.hung_up()
    served.until_closed()


@pytest.mark.style_only("extended")
def test_payload_longer_than_was_announced_ends_the_connection(serve: Serve) -> None:
    """Where the other styles drop it: "Request message" wants it so."""
    limits = Limits(request_length_max=MIB, in_flight_bytes_max=MIB, discard_length_max=2 * MIB)
    served = serve(limits=limits)
    served.client.send(served.client.header(WRITE, length=MIB + 1))
    assert served.client.hung_up()
    served.until_closed()


def test_bad_magic_ends_the_connection(serve: Serve) -> None:
    served = serve()
    served.client.send(bytes(32))
    assert served.client.hung_up()
    served.until_closed()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.EIO, NbdError.NBD_EIO),
        (errno.ENOSPC, NbdError.NBD_ENOSPC),
        (errno.EDQUOT, NbdError.NBD_ENOSPC),
        (errno.EFBIG, NbdError.NBD_ENOSPC),
        (errno.EPERM, NbdError.NBD_EPERM),
        (errno.EROFS, NbdError.NBD_EPERM),
        (errno.ENOMEM, NbdError.NBD_ENOMEM),
        (errno.EINVAL, NbdError.NBD_EINVAL),
        (errno.ENOTSUP, NbdError.NBD_ENOTSUP),
        (errno.EOVERFLOW, NbdError.NBD_EOVERFLOW),
        (errno.ESHUTDOWN, NbdError.NBD_ESHUTDOWN),
        (errno.EBADF, NbdError.NBD_EIO),
    ],
)
@pytest.mark.parametrize("call", ["preadv", "pwritev", "flush", "pdiscard", "pwrite_zeroes"])
def test_the_hosts_error_reaches_the_client(serve: Serve, call: str, code: int, error: int) -> None:
    served = serve()
    served.backend.fail(call, code)
    command = {
        "preadv": READ,
        "pwritev": WRITE,
        "flush": FLUSH,
        "pdiscard": TRIM,
        "pwrite_zeroes": WRITE_ZEROES,
    }[call]
    payload = b"x" * 10 if command == WRITE else b""
    served.client.request(command, length=0 if command == FLUSH else 10, payload=payload)
    assert served.client.reply()[1] == error
    served.backend.errors.clear()
    assert alive(served)


def test_a_drivers_bug_is_an_io_error_to_the_client(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()
    served.backend.errors["preadv"] = ZeroDivisionError("a bug")
    assert ask(served, READ, length=10) == NbdError.NBD_EIO
    served.backend.errors.clear()
    assert alive(served)
    assert "reason of our own" in caplog.text


# --- the fast path falls back to the graph ---


@pytest.mark.parametrize("behaviour", ["error", "short"])
@pytest.mark.parametrize("inline", [True, False])
def test_what_the_host_file_refuses_the_graph_is_asked(
    serve: Serve, behaviour: str, inline: bool
) -> None:
    served = serve(mapped=True)
    served.backend.file.behaviour = behaviour
    served.backend.file.writes_inline = inline
    served.client.request(WRITE, payload=b"y" * 100)
    assert served.client.reply() == (0, 0, b"")
    served.client.request(READ, length=100)
    assert served.client.reply(100) == (0, 0, b"y" * 100)
    assert [call[0] for call in served.backend.calls] == ["pwritev", "preadv"]


@pytest.mark.parametrize("result", [-errno.EIO, 99])
def test_what_fails_later_the_graph_is_asked(serve: Serve, result: int) -> None:
    served = serve(mapped=True)
    served.backend.file.behaviour = "pending"
    served.backend.file.writes_inline = False
    served.backend.fail("pwritev", errno.ENOSPC)
    served.client.request(READ, cookie=1, length=100)
    served.client.request(WRITE, cookie=2, payload=b"y" * 100)
    served.client.until(lambda: len(served.backend.file.pending) == 2)
    served.backend.file.complete(0, result)
    assert served.client.reply(100) == (1, 0, bytes(100))
    served.backend.file.complete(0, result)
    assert served.client.reply() == (2, NbdError.NBD_ENOSPC, b"")


def test_a_held_map_sends_everything_to_the_graph(serve: Serve) -> None:
    served = serve(mapped=True)
    assert served.backend.direct_map is not None
    served.backend.direct_map.hold()
    served.client.request(WRITE, payload=b"y" * 100)
    assert served.client.reply() == (0, 0, b"")
    served.client.request(READ, length=100)
    assert served.client.reply(100) == (0, 0, b"y" * 100)
    assert not served.backend.file.calls
    served.backend.direct_map.release()


def test_pending_requests_pin_the_map(serve: Serve) -> None:
    served = serve(mapped=True)
    served.backend.file.behaviour = "pending"
    direct_map = served.backend.direct_map
    assert direct_map is not None
    served.client.request(READ, length=100)
    served.client.until(lambda: len(served.backend.file.pending) == 1)
    waiting = served.connection.ctx.spawn(direct_map.wait_idle())
    served.client.rounds()
    assert not waiting.done()
    served.backend.file.complete()
    assert served.client.reply(100) == (0, 0, bytes(100))
    assert waiting.done()


def test_unaligned_memory_isnt_written_from_the_receive_buffer(serve: Serve) -> None:
    served = serve(mapped=True)
    served.backend.file.memory_alignment = 512
    served.client.request(WRITE, payload=b"y" * 512)
    assert served.client.reply() == (0, 0, b"")
    assert served.backend.file.calls == [("write", 0, 512)]
