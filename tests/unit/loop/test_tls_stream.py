# SPDX-License-Identifier: Apache-2.0
"""TlsStream is as good as a socket: the bytes, their order, the ends, and how much at once."""

from __future__ import annotations

import os
import random
import socket
import ssl
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockemu.loop.tls_stream import RECEIVE_BYTES_MAX, RECORD_BYTES, TlsError, TlsStream
from tests.peers.certificates import Pki, make_pki
from tests.peers.requirement import require_peer

Pair = tuple[TlsStream, TlsStream]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return make_pki(tmp_path_factory.mktemp("pki"))


def server_context(pki: Pki, *, tls12: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.folder / "server-cert.pem", pki.folder / "server-key.pem")
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    if tls12:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def client_context(pki: Pki) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki.folder / "ca-cert.pem")
    return context


def shake_hands(*ends: TlsStream) -> None:
    pending = list(ends)
    while pending:
        for end in list(pending):
            try:
                end.handshake()
                pending.remove(end)
            except BlockingIOError:
                pass


def make_pair(pki: Pki, *, tls12: bool = False, buffer_bytes: int = 0) -> Pair:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        if buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    server = TlsStream(ours, server_context(pki, tls12=tls12), server_side=True)
    client = TlsStream(theirs, client_context(pki), server_side=False, server_hostname="localhost")
    shake_hands(server, client)
    return server, client


@pytest.fixture
def pair(pki: Pki) -> Iterator[Pair]:
    server, client = make_pair(pki)
    yield server, client
    server.close()
    client.close()


def receive_all(stream: TlsStream, length: int) -> bytes:
    """What is there, up to `length` bytes."""
    data = b""
    while len(data) < length:
        try:
            data += stream.recv(length - len(data))
        except BlockingIOError:
            break
    return data


SIZES = [1, 16, 28, 4096, RECORD_BYTES - 16, RECORD_BYTES, RECORD_BYTES + 1, 70_000, 300_000]


@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
    small=st.booleans(),
    tls12=st.booleans(),
)
def test_bytes_arrive_once_and_in_order(
    pki: Pki, sizes: list[int], seed: int, small: bool, tls12: bool
) -> None:
    """Parts are sent as a reply queue sends them: what wasn't counted comes again, with more behind
    it. The receiver's buffers are of all sizes."""
    rng = random.Random(seed)
    sender, receiver = make_pair(pki, tls12=tls12, buffer_bytes=4608 if small else 0)
    parts = [memoryview(rng.randbytes(size)) for size in sizes]
    expected = b"".join(parts)
    queue: list[memoryview] = []
    received = bytearray()
    while len(received) < len(expected):
        if parts and rng.random() < 0.7:
            queue.append(parts.pop(0))
        try:
            sent = sender.sendmsg(queue) if queue else 0
        except BlockingIOError:
            sent = 0
        while sent:
            taken = min(sent, len(queue[0]))
            sent -= taken
            queue[0] = queue[0][taken:]
            if not queue[0]:
                del queue[0]
        buffers = [memoryview(bytearray(rng.choice(SIZES))) for _ in range(rng.choice([1, 2]))]
        try:
            count = receiver.recvmsg_into(buffers)[0]
        except BlockingIOError:
            assert not receiver.buffered
            continue
        assert count
        received += b"".join(buffers)[:count]
    assert received == expected
    assert not queue
    sender.close()
    receiver.close()


def test_what_no_poll_would_tell_of_is_told(pair: Pair) -> None:
    server, client = pair
    assert client.send(bytes(100)) == 100
    assert server.recv(40) == bytes(40)
    assert server.buffered
    assert server.recv(100) == bytes(60)
    assert not server.buffered
    with pytest.raises(BlockingIOError):
        server.recv(1)


def test_one_call_receives_so_much_and_no_more(pair: Pair) -> None:
    server, client = pair
    total, sent, received = 2 * RECEIVE_BYTES_MAX, 0, 0
    data = memoryview(bytes(total))
    view = memoryview(bytearray(total))
    most = 0
    while received < total:
        try:
            sent += client.send(data[sent:]) if sent < total else 0
        except BlockingIOError:
            pass
        try:
            count = server.recv_into(view)
        except BlockingIOError:
            continue
        most = max(most, count)
        received += count
    assert 0 < most <= RECEIVE_BYTES_MAX


def test_nothing_counts_as_sent_before_the_kernel_has_it(pki: Pki) -> None:
    """A caller whose queue is empty may close at once."""
    server, client = make_pair(pki, buffer_bytes=4608)
    data = bytes(200_000)
    counted = 0
    while not server.unsent:
        try:
            counted += server.send(memoryview(data)[counted:])
        except BlockingIOError:
            pass
    assert counted < len(data)
    arrived = receive_all(client, len(data))
    assert len(arrived) >= counted
    server.close()
    client.close()


def test_a_farewell_is_an_end_of_stream(pair: Pair) -> None:
    server, client = pair
    server.send(b"last words")
    server.close()
    assert client.recv(100) == b"last words"
    assert client.recv(100) == b""
    assert client.recv(100) == b""


def test_a_stream_that_is_cut_off_ends_too(pki: Pki) -> None:
    server, client = make_pair(pki)
    server.send(b"last words")
    server._sock.close()
    assert client.recv(100) == b"last words"
    assert client.recv(100) == b""
    client.close()


def test_what_was_tampered_with_is_refused_after_what_was_whole(pki: Pki) -> None:
    server, client = make_pair(pki)
    server.send(b"good")
    server._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert client.recv(100) == b"good"
    with pytest.raises(TlsError, match="bad record mac"):
        client.recv(100)
    client.close()
    server.close()


def test_a_peer_that_hangs_up_in_the_handshake_is_an_error(pki: Pki) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    server = TlsStream(ours, server_context(pki), server_side=True)
    with pytest.raises(BlockingIOError):
        server.handshake()
    theirs.close()
    with pytest.raises(TlsError, match=r"hung up|eof"):
        server.handshake()
    server.close()


def test_a_certificate_for_another_host_is_final(pki: Pki) -> None:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    server = TlsStream(ours, server_context(pki), server_side=True)
    client = TlsStream(theirs, client_context(pki), server_side=False, server_hostname="other")
    with pytest.raises(TlsError, match="isn't accepted: Hostname mismatch") as caught:
        shake_hands(client, server)
    assert caught.value.final
    server.close()
    client.close()


class SClient:
    """`openssl s_client` on the other end: its `K` asks for new keys, its `R` to renegotiate."""

    def __init__(self, pki: Pki, *arguments: str) -> None:
        require_peer("openssl")
        self.said = b""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            self.process = subprocess.Popen(
                ["openssl", "s_client", "-connect", address, "-CAfile",
                 str(pki.folder / "ca-cert.pem"), *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self.sock, _ = listener.accept()
        # In this one test somebody waits: for another process.
        self.sock.settimeout(30)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def until(self, word: bytes) -> None:
        """Read what it prints, until it has printed `word`. It drops lines that come with a
        command."""
        assert self.process.stdout is not None
        while word not in self.said:
            chunk = os.read(self.process.stdout.fileno(), 65536)
            assert chunk, self.said
            self.said += chunk

    def close(self) -> bytes:
        self.sock.close()
        return self.said + self.process.communicate(timeout=30)[0]


def test_new_keys_in_the_middle_are_followed(pki: Pki) -> None:
    """TLS 1.3: a read that makes us write."""
    client = SClient(pki)
    stream = TlsStream(client.sock, server_context(pki), server_side=True)
    stream.handshake()
    for word in (b"before\n", b"after\n"):
        client.tell(word.decode().strip())
        assert stream.recv(len(word)) == word
        assert stream.send(b"I heard " + word) == 8 + len(word)
        client.until(b"I heard " + word)
        client.tell("K")
        client.until(b"KEYUPDATE")
    stream.close()
    client.close()


def test_a_renegotiation_is_refused(pki: Pki) -> None:
    """TLS 1.2: it would cost us more than who asks for it."""
    client = SClient(pki, "-tls1_2")
    stream = TlsStream(client.sock, server_context(pki, tls12=True), server_side=True)
    stream.handshake()
    client.tell("hello")
    assert stream.recv(6) == b"hello\n"
    client.tell("R")
    with pytest.raises(TlsError, match="handshake failure"):
        stream.recv(1)  # s_client doesn't go on without
    stream.close()
    said = client.close()
    assert b"RENEGOTIATING" in said
    assert b"no renegotiation" in said
