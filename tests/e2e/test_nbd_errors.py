# SPDX-License-Identifier: Apache-2.0
"""Requests that can't be granted: the protocol's error, and the connection goes on.

Every test ends with a good request on the same connection where the protocol allows that, or else
on a new one: a bad client harms nobody but itself.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve, make_server
from tests.e2e.raw_nbd import (
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_EOVERFLOW,
    NBD_EPERM,
    NBD_OK,
    OPT_ABORT,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    REP_ACK,
    REP_ERR_INVALID,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_SERVER,
    RawNbd,
)
from tests.peers.process import ServerProcess
from tests.peers.qemu import QemuImg, QemuIo
from tests.peers.requirement import require_peer

MIB = 1 << 20
SIZE_BYTES = 64 * MIB
PAYLOAD_BYTES_MAX = 32 * MIB
UNKNOWN_FLAG = 1 << 13
CONTENT = b"blockemu" * 512


@pytest.fixture(scope="module", params=["raw", "qcow2"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A served image whose first 4 KiB are known, and stay so: no test may change them."""
    require_peer("qemu-img")
    with tempfile.TemporaryDirectory(prefix="bemu-") as name:
        folder = Path(name)
        image = QemuImg.create(folder / f"disk.{request.param}", SIZE_BYTES, fmt=request.param)
        running = make_server(image, fmt=request.param, socket_path=folder / "nbd.sock")
        with running:
            with RawNbd.connected(running.socket_path, "disk") as client:
                assert client.write(0, CONTENT) == NBD_OK
            yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[RawNbd]:
    """A connection in transmission."""
    with RawNbd.connected(server.socket_path, "disk") as connection:
        yield connection


def assert_goes_on(client: RawNbd) -> None:
    """The connection still works, and the stream is in step."""
    assert client.read(0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SIZE_BYTES, 1),
        (SIZE_BYTES - 1, 2),
        (SIZE_BYTES - 512, 4096),
        (1 << 40, 4096),
        ((1 << 63) - 1, 4096),
        ((1 << 64) - 1, 4096),
        ((1 << 64) - 4096, 4096),
    ],
)
@pytest.mark.parametrize("kind", [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES])
def test_request_past_the_end_gets_an_error_and_the_connection_goes_on(
    client: RawNbd, kind: int, offset: int, length: int
) -> None:
    payload = b"x" * length if kind == CMD_WRITE else b""
    reply = client.call(kind, offset, length, payload=payload)
    assert reply.error in (NBD_EINVAL, NBD_ENOSPC)
    assert_goes_on(client)


@pytest.mark.parametrize("kind", [8, 99, 0xFFFF])
def test_unknown_request_type_gets_einval_and_the_connection_goes_on(
    client: RawNbd, kind: int
) -> None:
    assert client.call(kind, 0, 0).error == NBD_EINVAL
    assert_goes_on(client)


@pytest.mark.parametrize("kind", [CMD_READ, CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES])
def test_unknown_flag_gets_einval_and_the_connection_goes_on(client: RawNbd, kind: int) -> None:
    length = 0 if kind == CMD_FLUSH else 512
    payload = b"x" * length if kind == CMD_WRITE else b""
    assert client.call(kind, 0, length, flags=UNKNOWN_FLAG, payload=payload).error == NBD_EINVAL
    assert_goes_on(client)


@pytest.mark.parametrize("length", [PAYLOAD_BYTES_MAX + 1, SIZE_BYTES, 0xFFFFFFFF])
def test_read_over_32_mib_gets_an_error_and_the_connection_goes_on(
    client: RawNbd, length: int
) -> None:
    assert client.call(CMD_READ, 0, length).error in (NBD_EINVAL, NBD_EOVERFLOW)
    assert_goes_on(client)


def test_write_over_32_mib_gets_an_error_and_changes_nothing(client: RawNbd) -> None:
    length = PAYLOAD_BYTES_MAX + 4096
    reply = client.call(CMD_WRITE, 0, length, payload=bytes(length))
    assert reply.error in (NBD_EINVAL, NBD_EOVERFLOW)
    assert_goes_on(client)


def test_write_announcing_4_gib_takes_no_memory_for_it(server: ServerProcess) -> None:
    with RawNbd.connected(server.socket_path, "disk") as client:
        try:
            client.send(CMD_WRITE, 0, 0xFFFFFFFF, payload=b"x" * MIB)
        except ConnectionError:
            pass  # hanging up is an answer, too
    with RawNbd.connected(server.socket_path, "disk") as other:
        assert_goes_on(other)
    peak = server.peak_rss_kib()
    assert peak is not None
    assert peak < 200 * 1024


def test_read_of_exactly_32_mib_is_granted(client: RawNbd) -> None:
    data = client.read(0, PAYLOAD_BYTES_MAX)
    assert data[: len(CONTENT)] == CONTENT
    assert not any(data[len(CONTENT) :])


def test_write_of_exactly_32_mib_is_granted(client: RawNbd) -> None:
    assert client.write(MIB, b"w" * PAYLOAD_BYTES_MAX) == NBD_OK
    assert client.read(PAYLOAD_BYTES_MAX, MIB) == b"w" * MIB
    assert_goes_on(client)


def test_trim_and_zeroes_may_be_longer_than_32_mib(client: RawNbd) -> None:
    assert client.call(CMD_WRITE_ZEROES, MIB, SIZE_BYTES - MIB).error == NBD_OK
    assert client.call(CMD_TRIM, MIB, SIZE_BYTES - MIB).error == NBD_OK
    assert_goes_on(client)


@pytest.mark.parametrize("kind", [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES])
def test_request_of_no_bytes_is_answered_and_the_connection_goes_on(
    client: RawNbd, kind: int
) -> None:
    assert client.call(kind, 0, 0).error in (NBD_OK, NBD_EINVAL)
    assert_goes_on(client)


def test_errors_between_good_requests_are_answered_each_under_its_own_cookie(
    client: RawNbd,
) -> None:
    wanted = {}
    for turn in range(60):
        good = client.send(CMD_READ, 0, 512)
        wanted[good] = NBD_OK
        bad = client.send(CMD_READ, SIZE_BYTES, 512) if turn % 2 else client.send(99)
        wanted[bad] = NBD_EINVAL
    replies = [client.reply() for _ in wanted]
    assert {reply.cookie: reply.error for reply in replies} == wanted
    assert all(reply.data in (b"", CONTENT[:512]) for reply in replies)


def test_wrong_magic_ends_that_connection_only(server: ServerProcess, client: RawNbd) -> None:
    client.send(CMD_READ, 0, 512, magic=0xDEADBEEF)
    assert client.server_closed()
    with RawNbd.connected(server.socket_path, "disk") as other:
        assert_goes_on(other)


@pytest.mark.parametrize("sent", [0, 1, 4095])
def test_client_that_leaves_inside_a_write_changes_nothing(
    server: ServerProcess, sent: int
) -> None:
    with RawNbd.connected(server.socket_path, "disk") as client:
        client.send(CMD_WRITE, 0, 4096, payload=b"x" * sent)
    with RawNbd.connected(server.socket_path, "disk") as other:
        assert_goes_on(other)


def test_client_that_leaves_inside_a_header_harms_nobody(server: ServerProcess) -> None:
    with RawNbd.connected(server.socket_path, "disk") as client:
        client.sock.sendall(struct.pack(">IHH", 0x25609513, 0, CMD_READ))
    with RawNbd.connected(server.socket_path, "disk") as other:
        assert_goes_on(other)


def test_header_in_single_bytes_is_understood(client: RawNbd) -> None:
    header = struct.pack(">IHHQQI", 0x25609513, 0, CMD_WRITE, 77, 4096, 3)
    for byte in header + b"abc":
        client.sock.sendall(bytes([byte]))
    assert client.reply()[:2] == (77, NBD_OK)
    assert client.read(4096, 3) == b"abc"


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_change_of_a_read_only_export_gets_eperm_and_the_connection_goes_on(
    tmp_path: Path, serve: Serve, fmt: str
) -> None:
    require_peer("qemu-io")
    image = QemuImg.create(tmp_path / f"disk.{fmt}", SIZE_BYTES, fmt=fmt)
    QemuIo(image, fmt=fmt).run("write -P 7 0 4k")
    with (
        serve(image, fmt=fmt, read_only=True) as running,
        RawNbd.connected(running.socket_path, "disk") as client,
    ):
        assert client.flags & 2, "the read-only flag"
        assert client.write(0, b"x" * 4096) == NBD_EPERM
        assert client.call(CMD_TRIM, 0, 4096).error == NBD_EPERM
        assert client.call(CMD_WRITE_ZEROES, 0, 4096).error == NBD_EPERM
        assert client.read(0, 4096) == b"\7" * 4096
        assert client.flush() == NBD_OK


def test_unknown_option_is_refused_and_negotiation_goes_on(server: ServerProcess) -> None:
    with RawNbd(server.socket_path) as client:
        client.send_option(0x7777, b"whatever")
        assert client.option_reply().kind == REP_ERR_UNSUP
        client.go("disk")
        assert_goes_on(client)


@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO])
def test_unknown_export_is_refused_and_negotiation_goes_on(
    server: ServerProcess, option: int
) -> None:
    with RawNbd(server.socket_path) as client:
        assert client.try_go("no-such-export", option=option).kind == REP_ERR_UNKNOWN
        client.go("disk")
        assert_goes_on(client)


def test_info_tells_without_entering_transmission(server: ServerProcess) -> None:
    with RawNbd(server.socket_path) as client:
        assert client.try_go("disk", option=OPT_INFO).kind == REP_ACK
        assert client.size_bytes == SIZE_BYTES
        client.go("disk")
        assert_goes_on(client)


def test_list_names_the_export_and_ends_with_ack(server: ServerProcess) -> None:
    with RawNbd(server.socket_path) as client:
        client.send_option(OPT_LIST)
        names = []
        while (reply := client.option_reply()).kind == REP_SERVER:
            length = int.from_bytes(reply.payload[:4], "big")
            names.append(reply.payload[4 : 4 + length])
        assert reply.kind == REP_ACK
        assert b"disk" in names


def test_list_with_payload_is_invalid_and_negotiation_goes_on(server: ServerProcess) -> None:
    with RawNbd(server.socket_path) as client:
        client.send_option(OPT_LIST, b"junk")
        assert client.option_reply().kind == REP_ERR_INVALID
        client.go("disk")
        assert_goes_on(client)


@pytest.mark.parametrize(
    "payload", [b"", b"\0\0", struct.pack(">I", 100) + b"disk" + b"\0\0", struct.pack(">IH", 0, 9)]
)
def test_malformed_go_is_invalid_and_negotiation_goes_on(
    server: ServerProcess, payload: bytes
) -> None:
    with RawNbd(server.socket_path) as client:
        client.send_option(OPT_GO, payload)
        assert client.option_reply().kind == REP_ERR_INVALID
        client.go("disk")
        assert_goes_on(client)


def test_export_name_option_enters_transmission(server: ServerProcess) -> None:
    with RawNbd(server.socket_path) as client:
        client.export_name("disk")
        assert client.size_bytes == SIZE_BYTES
        assert_goes_on(client)


def test_export_name_of_no_export_closes_the_connection(server: ServerProcess) -> None:
    with RawNbd(server.socket_path) as client:
        client.send_option(1, b"no-such-export")
        assert client.server_closed()
    with RawNbd.connected(server.socket_path, "disk") as other:
        assert_goes_on(other)


def test_abort_is_acknowledged_and_closes(server: ServerProcess) -> None:
    with RawNbd(server.socket_path) as client:
        client.send_option(OPT_ABORT)
        assert client.option_reply().kind == REP_ACK
        assert client.server_closed()


def test_option_of_absurd_length_takes_no_memory(server: ServerProcess) -> None:
    with RawNbd(server.socket_path) as client:
        client.send_option(0x7777, b"x" * 1000, length=0xFFFFFFFF)
    with RawNbd.connected(server.socket_path, "disk") as other:
        assert_goes_on(other)
    peak = server.peak_rss_kib()
    assert peak is not None
    assert peak < 200 * 1024


def test_garbage_instead_of_negotiation_harms_nobody(server: ServerProcess) -> None:
    with RawNbd(server.socket_path) as client:
        client.sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        assert client.server_closed()
    with RawNbd.connected(server.socket_path, "disk") as other:
        assert_goes_on(other)
