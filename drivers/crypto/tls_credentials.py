# SPDX-License-Identifier: Apache-2.0
"""Who we are and whom we trust in TLS: QEMU's objects `tls-creds-x509` and `tls-creds-psk`.

X.509 credentials are a folder with files of fixed names, as QEMU's manual describes them:

| file | server | client |
|---|---|---|
| ca-cert.pem | vouches for clients | vouches for servers |
| ca-crl.pem | who no longer counts (optional) | the same |
| server-cert.pem, server-key.pem | our certificate, with its chain, and key | |
| client-cert.pem, client-key.pem | | the same, optional: for servers that ask |

They are read when the object is made; new files take a new object. With `verify-peer=on`, the
default, a peer must present a certificate of the authority's; a client also checks that it is the
server's that it meant to reach. TLS is 1.2 or later (the NBD document's minimum).

Sessions aren't resumed: a client connects once, and stays.

Context: any thread; making credentials reads files, and is nothing for a loop.
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from blockemu.drivers.crypto.tls_certificates import (
    check_authority,
    check_own,
    read_certificates,
    read_revocation_list,
    subject_name,
)
from blockemu.drivers.crypto.tls_priority import DEFAULT_PRIORITY, TlsVersions, parse_priority
from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import take_bool, take_choice, take_str
from blockemu.loop.clock import HostClock
from blockemu.loop.tls_stream import TlsStream, describe

if TYPE_CHECKING:
    from blockemu.drivers.crypto.secrets import ReadFile, SecretTable
    from blockemu.loop.stream_socket import PlainSocket

PEM_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of one file; lists of revoked certificates can be long."""

CA_CERTIFICATE: Final = "ca-cert.pem"
CA_REVOKED: Final = "ca-crl.pem"
DH_PARAMETERS: Final = "dh-params.pem"

Warn = Callable[[str], None]
"""Is told what is wiser done otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsCredentials:
    """One object's. `name` is for messages. `named_context`: of clients that know the server's
    host name."""

    name: str
    kind: str
    endpoint: str
    verifies_peer: bool
    context: ssl.SSLContext
    named_context: ssl.SSLContext

    @property
    def names_peers(self) -> bool:
        """Whether a peer has a distinguished name when the handshake is over."""
        return self.kind == "x509" and self.verifies_peer

    def server_stream(self, sock: PlainSocket) -> TlsStream:
        """For a client that asked for TLS on `sock`."""
        assert self.endpoint == "server"
        return TlsStream(sock, self.context, server_side=True)

    def client_stream(self, sock: PlainSocket, hostname: str | None) -> TlsStream:
        """For the server on `sock`; its certificate must be for `hostname`, unless that is None."""
        assert self.endpoint == "client"
        context = self.context if hostname is None else self.named_context
        return TlsStream(sock, context, server_side=False, server_hostname=hostname)


def peer_name(stream: TlsStream) -> str | None:
    """The distinguished name in the certificate of `stream`'s peer; None, if it showed none."""
    certificate = stream.peer_certificate
    return None if certificate is None else subject_name(certificate)


def new_context(endpoint: str, versions: TlsVersions) -> ssl.SSLContext:
    """What all kinds of credentials have in common."""
    is_server = endpoint == "server"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if versions.tls12 else ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3 if versions.tls13 else ssl.TLSVersion.TLSv1_2
    # A renegotiation costs us more than who asks for it, and nothing of ours needs one.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if is_server:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
        context.num_tickets = 0
    return context


def x509_credentials(
    name: str,
    options: dict[str, Any],
    *,
    secrets: SecretTable,
    read_file: ReadFile,
    warn: Warn = lambda line: None,
) -> TlsCredentials:
    """What a tls-creds-x509 object's options say. `name` is for messages. Raises: ImageError."""
    rest = dict(options)
    folder = take_str(name, rest, "dir")
    endpoint, versions = take_shared_options(name, rest)
    verify_peer = take_bool(name, rest, "verify-peer", default=True)
    sanity_check = take_bool(name, rest, "sanity-check", default=True)
    secret_id = take_str(name, rest, "passwordid", None)
    refuse_rest(name, rest)
    files = _Folder(name, folder, read_file)
    passphrase = None if secret_id is None else secrets.find(name, secret_id)
    if sanity_check:
        _check_sanity(files, endpoint, warn)
    contexts = [new_context(endpoint, versions) for _ in range(2)]
    for context in contexts:
        _load(context, files, endpoint, passphrase=passphrase, verify_peer=verify_peer)
    context, named_context = contexts
    named_context.check_hostname = endpoint == "client" and verify_peer
    return TlsCredentials(
        name=name,
        kind="x509",
        endpoint=endpoint,
        verifies_peer=verify_peer,
        context=context,
        named_context=named_context,
    )


def system_credentials(name: str, *, verify_peer: bool) -> TlsCredentials:
    """A client's that trusts whom the system trusts, and has no certificate of its own."""
    contexts = [new_context("client", TlsVersions(tls12=True, tls13=True)) for _ in range(2)]
    for context in contexts:
        context.verify_mode = ssl.CERT_REQUIRED if verify_peer else ssl.CERT_NONE
        context.load_default_certs()
    context, named_context = contexts
    named_context.check_hostname = verify_peer
    return TlsCredentials(
        name=name,
        kind="x509",
        endpoint="client",
        verifies_peer=verify_peer,
        context=context,
        named_context=named_context,
    )


def take_shared_options(name: str, options: dict[str, Any]) -> tuple[str, TlsVersions]:
    """Pop `endpoint` and `priority`. Raises: ImageError."""
    endpoint = take_choice(name, options, "endpoint", ("server", "client"), "client")
    priority = take_str(name, options, "priority", DEFAULT_PRIORITY)
    return endpoint, parse_priority(name, priority)


def refuse_rest(name: str, options: dict[str, Any]) -> None:
    """Raises: ImageError, if anything is left."""
    if options:
        raise ImageError(name, f"there is no option '{next(iter(options))}'")


class _Folder:
    """The files of one object."""

    def __init__(self, name: str, folder: str, read_file: ReadFile) -> None:
        self.name = name
        self._folder = folder
        self._read_file = read_file

    def path(self, file: str) -> str:
        return os.path.join(self._folder, file)

    def has(self, file: str) -> bool:
        return os.path.exists(self.path(file))

    def read(self, file: str) -> bytes:
        """Raises: ImageError, which names the file."""
        path = self.path(file)
        try:
            data = self._read_file(path, PEM_BYTES_MAX + 1)
        except OSError as error:
            raise ImageError.from_os_error(path, error) from error
        if len(data) > PEM_BYTES_MAX:
            raise ImageError(path, f"is over {PEM_BYTES_MAX} bytes, too long for a PEM file")
        return data


def _has_own(files: _Folder, endpoint: str) -> bool:
    """Whether we have a certificate of our own: a server must, a client may."""
    return endpoint == "server" or files.has("client-cert.pem")


def _check_sanity(files: _Folder, endpoint: str, warn: Warn) -> None:
    now_s = HostClock().now_ns() / 1e9
    ca_path = files.path(CA_CERTIFICATE)
    authorities = read_certificates(ca_path, files.read(CA_CERTIFICATE))
    check_authority(ca_path, authorities, now_s)
    if not _has_own(files, endpoint):
        return
    own_path = files.path(f"{endpoint}-cert.pem")
    chain = read_certificates(own_path, files.read(f"{endpoint}-cert.pem"))
    check_own(
        own_path,
        chain,
        authorities=authorities,
        authority_path=ca_path,
        endpoint=endpoint,
        now_s=now_s,
    )
    key_path = files.path(f"{endpoint}-key.pem")
    warn_if_exposed(key_path, "private key", warn)


def warn_if_exposed(path: str, what: str, warn: Warn) -> None:
    """Say so, if others than the file's owner and group can read a secret in it."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # reading it will say why
    if mode & stat.S_IROTH:
        warn(f"{path}: every user of this machine can read this {what}; chmod o-r it")


def _load(
    context: ssl.SSLContext,
    files: _Folder,
    endpoint: str,
    *,
    passphrase: bytes | None,
    verify_peer: bool,
) -> None:
    """Let `context` have the folder's content. Raises: ImageError."""
    ca_path = files.path(CA_CERTIFICATE)
    read_certificates(ca_path, files.read(CA_CERTIFICATE))
    _openssl(ca_path, lambda: context.load_verify_locations(ca_path))
    if files.has(CA_REVOKED):
        revoked_path = files.path(CA_REVOKED)
        read_revocation_list(revoked_path, files.read(CA_REVOKED))
        _openssl(revoked_path, lambda: context.load_verify_locations(revoked_path))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if endpoint == "server" and files.has(DH_PARAMETERS):
        dh_path = files.path(DH_PARAMETERS)
        _openssl(dh_path, lambda: context.load_dh_params(dh_path))
    if _has_own(files, endpoint):
        _load_own(context, files, endpoint, passphrase)
    context.verify_mode = ssl.CERT_REQUIRED if verify_peer else ssl.CERT_NONE


def _load_own(
    context: ssl.SSLContext, files: _Folder, endpoint: str, passphrase: bytes | None
) -> None:
    certificate, key = f"{endpoint}-cert.pem", f"{endpoint}-key.pem"
    read_certificates(files.path(certificate), files.read(certificate))
    pem = files.read(key)
    key_path = files.path(key)
    if b"PRIVATE KEY-----" not in pem:
        raise ImageError(key_path, "holds no private key in PEM form")
    encrypted = b"ENCRYPTED" in pem
    if encrypted and passphrase is None:
        raise ImageError(key_path, f"is encrypted: passwordid= of {files.name} names its secret")
    try:
        # Never none at all: OpenSSL would ask on the terminal.
        context.load_cert_chain(files.path(certificate), key_path, password=passphrase or b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            reason = f"is another key than that of {files.path(certificate)}"
        elif encrypted:
            reason = "the passphrase doesn't fit"
        else:
            reason = describe(error)
        raise ImageError(key_path, reason) from error
    except OSError as error:
        raise ImageError.from_os_error(key_path, error) from error


def _openssl(path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        raise ImageError(path, describe(error)) from error
    except OSError as error:
        raise ImageError.from_os_error(path, error) from error
