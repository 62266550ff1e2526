# SPDX-License-Identifier: Apache-2.0
"""Whether a server's clients come by TLS, and which of them may: the options of commands that
serve. The credentials themselves are objects (object_option.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from blockemu.cli.option_group import option_group

if TYPE_CHECKING:
    from blockemu.nbd.tls import TlsPolicy


def _policy(
    tls_credentials: str | None, tls_authz: str | None, tls_mode: str | None
) -> TlsPolicy | None:
    from blockemu.img.session_objects import session_objects
    from blockemu.nbd.tls import tls_policy

    return tls_policy(
        session_objects(), credentials_id=tls_credentials, authz_id=tls_authz, mode=tls_mode
    )


tls_options = option_group(
    "tls",
    _policy,
    click.option(
        "--tls-creds",
        "tls_credentials",
        metavar="ID",
        help="Have TLS, with the credentials of this --object tls-creds-x509 or tls-creds-psk.",
    ),
    click.option(
        "--tls-authz",
        metavar="ID",
        help="Let in only clients whose certificates' names this --object authz-list, "
        "authz-list-file or authz-simple allows.",
    ),
    click.option(
        "--tls",
        "tls_mode",
        type=click.Choice(["off", "on", "require"]),
        default=None,
        help="Whether clients may use TLS (on) or must.  [default: require with --tls-creds]",
    ),
)
"""--tls-creds, --tls-authz, --tls, handed in as `tls`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdTlsOptions:
    """qemu-nbd's, for its server and for its client (`--list`)."""

    credentials_id: str | None
    authz_id: str | None
    hostname: str | None

    def policy(self) -> TlsPolicy | None:
        """The server's. Raises: DaemonError, ImageError."""
        if self.hostname is not None:
            raise click.UsageError("--tls-hostname goes with --list only.")
        return _policy(self.credentials_id, self.authz_id, None)


nbd_tls_options = option_group(
    "tls",
    lambda tls_credentials, tls_authz, tls_hostname: NbdTlsOptions(
        credentials_id=tls_credentials, authz_id=tls_authz, hostname=tls_hostname
    ),
    click.option(
        "--tls-creds",
        "tls_credentials",
        metavar="ID",
        help="Require TLS, with the credentials of this --object tls-creds-x509 or tls-creds-psk.",
    ),
    click.option(
        "--tls-authz",
        metavar="ID",
        help="Let in only clients whose certificates' names this --object authz-list, "
        "authz-list-file or authz-simple allows.",
    ),
    click.option(
        "--tls-hostname",
        metavar="NAME",
        help="With --list: whom the server's certificate must be for.  [default: the host at -b]",
    ),
)
"""--tls-creds, --tls-authz, --tls-hostname, handed in as `tls`."""
