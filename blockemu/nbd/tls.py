# SPDX-License-Identifier: Apache-2.0
"""TLS as a server wants it: its credentials, whether clients must, and which of them may come in.

Source: doc/proto.md of NetworkBlockDevice/nbd, "TLS support". Without a policy the server is what
the document calls NOTLS, with `required` FORCEDTLS, else SELECTIVETLS with no export that is only
for TLS. A server that merely offers TLS protects nobody who can be talked out of asking for it
("Protocol downgrade attacks"), so required is the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockemu.drivers.nbd.negotiation_stream import NegotiationError, NegotiationStream
from blockemu.drivers.nbd.protocol import Option
from blockemu.errors import DaemonError

if TYPE_CHECKING:
    from blockemu.drivers.crypto.authorization import Authorizer
    from blockemu.drivers.crypto.tls_credentials import TlsCredentials
    from blockemu.drivers.crypto.user_objects import UserObjects

BEFORE_TLS = frozenset({Option.NBD_OPT_STARTTLS, Option.NBD_OPT_ABORT})
"""Options that are served without TLS where it is required ("FORCEDTLS mode")."""

TLS_MODES = ("off", "on", "require")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsPolicy:
    """Of a server that has TLS. `authorizer`: who may come in; None, all whom the credentials
    accept."""

    credentials: TlsCredentials
    required: bool = True
    authorizer: Authorizer | None = None

    async def start(self, stream: NegotiationStream) -> None:
        """The client has been told to begin: shake hands, and see who it is.

        Suspends: for the client. Raises: NegotiationError; the connection is then over, since
        there is no way back from here.
        """
        await stream.start_tls(self.credentials.server_stream(stream.socket))
        if self.authorizer is not None:
            self._authorize(self.authorizer, stream)

    def _authorize(self, authorizer: Authorizer, stream: NegotiationStream) -> None:
        # Here, where the module is loaded already: the credentials came from it.
        from blockemu.drivers.crypto.tls_credentials import peer_name

        assert stream.tls is not None
        name = peer_name(stream.tls)
        if name is None:
            raise NegotiationError("TLS: the client has no certificate, so it may not come in")
        if not authorizer.allows(name):
            raise NegotiationError(f"TLS: '{name}' may not come in")


def tls_policy(
    objects: UserObjects,
    *,
    credentials_id: str | None,
    authz_id: str | None = None,
    mode: str | None = None,
    says: tuple[str, str, str] = ("--tls-creds", "--tls-authz", "--tls"),
) -> TlsPolicy | None:
    """What `--tls-creds`, `--tls-authz` and `--tls` ask for together; None is a server without TLS.

    `mode` is one of TLS_MODES; without it, "require" where there are credentials. `says`: what the
    three are called by whoever gave them.
    Raises: DaemonError, ImageError.
    """
    if credentials_id is None:
        if mode not in (None, "off"):
            raise DaemonError(says[2], f"'{mode}' takes credentials: {says[0]} ID")
        if authz_id is not None:
            raise DaemonError(says[1], f"goes with {says[0]} only")
        return None
    credentials = objects.credentials(says[0], credentials_id, endpoint="server")
    authorizer = None
    if authz_id is not None:
        authorizer = objects.authorizer(says[1], authz_id)
        if not credentials.names_peers:
            raise DaemonError(
                says[1],
                f"takes the names in clients' certificates, and {credentials.name} asks for none: "
                "that takes tls-creds-x509 with verify-peer=on",
            )
    if mode == "off":
        return None
    return TlsPolicy(credentials=credentials, required=mode != "on", authorizer=authorizer)
