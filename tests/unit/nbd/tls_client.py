# SPDX-License-Identifier: Apache-2.0
"""The other end of a connection, with TLS when the test says so."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

from blockemu.drivers.crypto.authorization import Authorizer
from blockemu.drivers.crypto.secrets import SecretTable
from blockemu.drivers.crypto.tls_credentials import TlsCredentials, x509_credentials
from blockemu.drivers.nbd.protocol import Option, Reply
from blockemu.loop.small_file import read_small_file
from blockemu.loop.tls_stream import TlsStream
from blockemu.nbd.tls import TlsPolicy
from tests.unit.nbd.client import IDLE_ROUNDS_MAX, Client

START = Option.NBD_OPT_STARTTLS


class TlsSocket(TlsStream):
    """With what the tests' client does to a socket besides."""

    __slots__ = ("_peeked",)

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(sock, context, server_side=False)
        self._peeked = b""

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """As of a socket, also to peek."""
        data = self._peeked or super().recv(bufsize)
        self._peeked = data if flags & socket.MSG_PEEK else data[bufsize:]
        return data[:bufsize]

    def setsockopt(self, level: int, name: int, value: int) -> None:
        """Of the socket below."""
        self._sock.setsockopt(level, name, value)

    def shutdown(self, how: int) -> None:
        """The way that TLS does it, and the socket's."""
        self.say_farewell()
        self._sock.shutdown(how)


def credentials(folder: Path, endpoint: str, **options: Any) -> TlsCredentials:
    """Those of a folder."""
    return x509_credentials(
        "tls0",
        {"dir": str(folder), "endpoint": endpoint, **options},
        secrets=SecretTable(),
        read_file=read_small_file,
    )


def policy(
    folder: Path, *, required: bool = True, authorizer: Authorizer | None = None, **options: Any
) -> TlsPolicy:
    """A server's."""
    made = credentials(folder, "server", **options)
    return TlsPolicy(credentials=made, required=required, authorizer=authorizer)


def client_context(folder: Path | None) -> ssl.SSLContext:
    """A client's: the credentials of a folder, or of nobody, and trusting everybody."""
    if folder is not None:
        return credentials(folder, "client").context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def ask_for_tls(client: Client) -> None:
    """Greet, and have STARTTLS granted."""
    client.greet()
    client.option(START)
    assert client.option_reply(START) == (Reply.NBD_REP_ACK, b"")


def shake_hands(client: Client, context: ssl.SSLContext) -> TlsStream:
    """The client's socket is a TLS stream from now on. Raises: TlsError."""
    stream = TlsSocket(client.sock, context)
    for _ in range(IDLE_ROUNDS_MAX):
        try:
            stream.handshake()
            break
        except BlockingIOError:
            client.rounds(1)
    else:
        raise AssertionError("the handshake doesn't end")
    client.sock = stream  # type: ignore[assignment]
    return stream


def start_tls(client: Client, folder: Path | None) -> TlsStream:
    """From a fresh connection to the first option under TLS."""
    ask_for_tls(client)
    return shake_hands(client, client_context(folder))
