# SPDX-License-Identifier: Apache-2.0
"""TLS by keys that both sides have: QEMU's objects `tls-creds-psk`.

`keys.psk` in the object's folder has a line `USER:KEY` for each key, KEY in hexadecimal, as psktool
of GnuTLS writes it. A server takes all users in it; a client is the one of `username=`, "qemu"
unless told otherwise.

Python's ssl module has pre-shared keys from 3.13 on, and no library that is both kept up to date
and installable without a compiler adds them before (ARCHITECTURE.md says which were looked at), so
older Pythons refuse.
"""

from __future__ import annotations

import binascii
import os
import ssl
import sys
from typing import TYPE_CHECKING, Any, Final

from blockemu.drivers.crypto.tls_credentials import (
    TlsCredentials,
    Warn,
    new_context,
    refuse_rest,
    take_shared_options,
    warn_if_exposed,
)
from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import take_str

if TYPE_CHECKING:
    from blockemu.drivers.crypto.secrets import ReadFile

KEYS_FILE: Final = "keys.psk"
DEFAULT_USER: Final = "qemu"
KEYS_BYTES_MAX: Final = 4 * 1024 * 1024
KEY_BYTES_MAX: Final = 256
"""OpenSSL's own bound (PSK_MAX_PSK_LEN before 3.0)."""

CIPHERS: Final = "ECDHE+PSK:DHE+PSK:PSK:@SECLEVEL=0"
"""For TLS 1.2. Python lets SECLEVEL speak of nothing else here: without certificates there is no
signature to be too weak."""


def is_supported() -> bool:
    """Whether this Python can."""
    return hasattr(ssl.SSLContext, "set_psk_server_callback")


def psk_credentials(
    name: str,
    path: str | None,
    options: dict[str, Any],
    *,
    read_file: ReadFile,
    warn: Warn = lambda line: None,
) -> TlsCredentials:
    """What a tls-creds-psk object's options say. `name` is for messages; the file of keys is at
    `path`, or in the folder `dir`. Raises: ImageError."""
    rest = dict(options)
    if path is None:
        path = os.path.join(take_str(name, rest, "dir"), KEYS_FILE)
    endpoint, versions = take_shared_options(name, rest)
    user = take_str(name, rest, "username", DEFAULT_USER)
    refuse_rest(name, rest)
    try:
        data = read_file(path, KEYS_BYTES_MAX + 1)
    except OSError as error:
        raise ImageError.from_os_error(path, error) from error
    keys = parse_keys(path, data)
    warn_if_exposed(path, "file of keys", warn)
    if endpoint == "client" and user not in keys:
        raise ImageError(path, f"has no key of user '{user}'; username= of {name} says whose")
    if not is_supported():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImageError(
            name,
            f"Python {version} has no pre-shared keys for TLS: that takes Python 3.13 or later; "
            "tls-creds-x509 works with any",
        )
    context = new_context(endpoint, versions)
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers(CIPHERS)
    _add_keys(context, endpoint, user, keys)
    return TlsCredentials(
        name=name,
        kind="psk",
        endpoint=endpoint,
        verifies_peer=True,
        context=context,
        named_context=context,
    )


def parse_keys(path: str, data: bytes) -> dict[str, bytes]:
    """The keys by their users. Raises: ImageError, in which no key appears."""
    if len(data) > KEYS_BYTES_MAX:
        raise ImageError(path, f"is over {KEYS_BYTES_MAX} bytes, too long for a file of keys")
    keys: dict[str, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        user, colon, digits = line.strip().rpartition(b":")
        try:
            key = binascii.unhexlify(digits)
            name = user.decode()
        except ValueError:
            raise ImageError(path, f"line {number} isn't USER:KEY in hexadecimal") from None
        if not colon or not name or not 0 < len(key) <= KEY_BYTES_MAX:
            raise ImageError(path, f"line {number} isn't USER:KEY in hexadecimal")
        keys.setdefault(name, key)
    if not keys:
        raise ImageError(path, "has no key in it")
    return keys


def _add_keys(context: Any, endpoint: str, user: str, keys: dict[str, bytes]) -> None:
    """`context` is an ssl.SSLContext; type checkers look at it as Python 3.11's."""
    if endpoint == "server":
        # An empty key is a refusal.
        context.set_psk_server_callback(lambda identity: keys.get(identity or "", b""))
    else:
        context.set_psk_client_callback(lambda hint: (user, keys[user]))
