# SPDX-License-Identifier: Apache-2.0
"""Objects that a command line or QMP makes by type and id, as QEMU does.

| type | what it is | made in |
|---|---|---|
| secret | a passphrase | drivers/crypto/secrets.py |
| tls-creds-x509, tls-creds-psk | who we are in TLS, and whom we trust | drivers/crypto/tls_*.py |
| authz-simple, authz-list, authz-list-file | who may come in | drivers/crypto/authorization.py |

On the command line: `--object secret,id=sec0,file=/run/keys/disk`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blockemu.drivers.crypto.secrets import read_secret
from blockemu.drivers.crypto.user_objects import UserObjects
from blockemu.drivers.errors import ImageError
from blockemu.loop.small_file import read_small_file

AUTHZ_TYPES = ("authz-simple", "authz-list", "authz-list-file")
TLS_TYPES = ("tls-creds-x509", "tls-creds-psk", "tls-creds-anon")

OBJECT_TYPES = ("secret", *TLS_TYPES, *AUTHZ_TYPES)

Warn = Callable[[str], None]


def parse_object(text: str) -> tuple[str, str, dict[str, str]]:
    """`(type, id, options)` of `TYPE,id=ID,key=value,...`. Commas in values are doubled.

    Raises: ImageError, in which no value appears: it may be a secret.
    """
    first, *parts = _split(text)
    kind = first.removeprefix("qom-type=")
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise ImageError("--object", f"option '{key}' needs a value: {key}=...")
        options[key] = value
    if kind not in OBJECT_TYPES:
        known = ", ".join(OBJECT_TYPES)
        raise ImageError("--object", f"there is no object type '{kind}'; known: {known}")
    object_id = options.pop("id", "")
    if not object_id:
        article = "an" if kind.startswith("a") else "a"
        raise ImageError("--object", f"{article} {kind} needs an id: {kind},id=NAME,...")
    return kind, object_id, options


def _split(text: str) -> list[str]:
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def add_command_line_objects(objects: UserObjects, texts: Sequence[str], *, warn: Warn) -> None:
    """Carry out all `--object` of a command line; secrets first, since others may name them.

    `warn` is told what is wiser done otherwise. Raises: ImageError.
    """
    parsed = [parse_object(text) for text in texts]
    for kind, object_id, options in sorted(parsed, key=lambda one: one[0] != "secret"):
        if kind == "secret" and "data" in options:
            warn(
                f"secret '{object_id}' stands on the command line, where every user of this "
                "machine can read it (ps); keep it in a file: secret,id=...,file=PATH"
            )
        make_object(objects, kind, object_id, options, warn)()


def make_object(
    objects: UserObjects,
    kind: str,
    object_id: str,
    options: Mapping[str, Any],
    warn: Warn,
) -> Callable[[], None]:
    """Make an object of one of OBJECT_TYPES; what is returned adds it to `objects`.

    Reads files, and may wait for one: in a daemon, run it off the loop, and call what it returns in
    the main context. Raises, as does that: ImageError.
    """
    if kind == "secret":
        value = read_secret(object_id, options, read_small_file)
        return lambda: objects.add_secret(object_id, value)
    # Imported where wanted: OpenSSL and the parsers of certificates take their time.
    if kind in AUTHZ_TYPES:
        from blockemu.drivers.crypto.authorization import read_authorizer

        authorizer = read_authorizer(kind, object_id, dict(options), read_file=read_small_file)
        return lambda: objects.add_authorizer(object_id, authorizer)
    if kind == "tls-creds-x509":
        from blockemu.drivers.crypto.tls_credentials import x509_credentials

        credentials = x509_credentials(
            f"{kind} '{object_id}'",
            dict(options),
            secrets=objects.secrets,
            read_file=read_small_file,
            warn=warn,
        )
    elif kind == "tls-creds-psk":
        from blockemu.drivers.crypto.tls_psk import psk_credentials

        credentials = psk_credentials(
            f"{kind} '{object_id}'", None, dict(options), read_file=read_small_file, warn=warn
        )
    else:
        assert kind == "tls-creds-anon", kind
        raise ImageError(
            f"{kind} '{object_id}'",
            "anonymous TLS isn't supported, since whoever sits in the middle can read along; "
            "use tls-creds-x509, or tls-creds-psk",
        )
    return lambda: objects.add_credentials(object_id, credentials)
