# SPDX-License-Identifier: Apache-2.0
"""TLS as a client of NBD wants it: by which credentials, and whom it means to reach.

Two ways to say so. QEMU's: the options `tls-creds`, an object's id, and `tls-hostname`. And that of
the NBD URI specification: `nbds://` with `tls-certificates=FOLDER` (laid out as an object's `dir`)
or `tls-psk-file=FILE`, else the authorities that the system trusts; also `tls-hostname`,
`tls-verify-peer=false`, and a user name before the host. `parse_uri` turns these into options of
the same names.

The server's certificate must be for `tls-hostname`, or else the host that was connected to. On a
unix socket there is no host. There QEMU insists on a `tls-hostname`, and so does `tls-creds`;
libnbd takes any certificate of the authority's, and so does a URI.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import take_bool, take_str
from blockemu.loop.small_file import read_small_file

if TYPE_CHECKING:
    from blockemu.drivers.crypto.tls_credentials import TlsCredentials
    from blockemu.drivers.nbd.address import NbdAddress
    from blockemu.drivers.registry import Opener
    from blockemu.loop.stream_socket import PlainSocket
    from blockemu.loop.tls_stream import TlsStream

URI_KEYS: Final = (
    "tls-certificates",
    "tls-psk-file",
    "tls-username",
    "tls-hostname",
    "tls-verify-peer",
)
"""Of a URI's query, and of the driver's options. `tls=on` stands for the scheme, nbds."""

DEFAULT_PSK_USER: Final = "qemu"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """`query`: what a URI says of it."""

    credentials: TlsCredentials
    hostname: str | None
    query: tuple[tuple[str, str], ...] = ()

    def stream(self, sock: PlainSocket) -> TlsStream:
        """For a server that has agreed to TLS on `sock`."""
        return self.credentials.client_stream(sock, self.hostname)


async def with_tls(
    name: str, address: NbdAddress, options: dict[str, Any], opener: Opener
) -> NbdAddress:
    """`address` with the TLS that `options` ask for, if they do; pops those.

    Suspends: while files are read. Raises: ImageError.
    """
    given = {key: take_str(name, options, key) for key in URI_KEYS if key in options}
    wanted = take_bool(name, options, "tls", default=bool(given.keys() - {"tls-hostname"}))
    object_id = take_str(name, options, "tls-creds", None)
    hostname = given.get("tls-hostname")
    if hostname is None and address.path is None:
        hostname = address.host or None
    if object_id is not None:
        if given.keys() - {"tls-hostname"}:
            raise ImageError(name, "option 'tls-creds' goes without those of a URI's TLS")
        credentials = opener.objects.credentials(name, object_id, endpoint="client")
        if hostname is None and credentials.names_peers:
            raise ImageError(
                name, "option 'tls-hostname' is missing: for whom is the server's certificate?"
            )
    elif wanted:
        credentials = await opener.offload(_credentials, name, given, opener)
    elif given:
        raise ImageError(name, "option 'tls-hostname' goes with 'tls-creds' only")
    else:
        return address
    tls = ClientTls(credentials=credentials, hostname=hostname, query=tuple(given.items()))
    return replace(address, tls=tls)


def _credentials(name: str, given: dict[str, str], opener: Opener) -> TlsCredentials:
    """What a URI asks for. Here, since few connections have TLS, and loading it takes its time."""
    from blockemu.drivers.crypto.tls_credentials import system_credentials, x509_credentials
    from blockemu.drivers.crypto.tls_psk import psk_credentials

    rest = dict(given)
    verify_peer = take_bool(name, rest, "tls-verify-peer", default=True)
    folder, psk_file = rest.get("tls-certificates"), rest.get("tls-psk-file")
    if folder is not None and psk_file is not None:
        raise ImageError(name, "tls-certificates goes without tls-psk-file")
    if psk_file is not None:
        return psk_credentials(
            name,
            psk_file,
            {"endpoint": "client", "username": rest.get("tls-username", DEFAULT_PSK_USER)},
            read_file=read_small_file,
        )
    if folder is not None:
        return x509_credentials(
            name,
            {"dir": folder, "endpoint": "client", "verify-peer": verify_peer},
            secrets=opener.secrets,
            read_file=read_small_file,
        )
    return system_credentials(name, verify_peer=verify_peer)
