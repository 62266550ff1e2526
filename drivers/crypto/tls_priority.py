# SPDX-License-Identifier: Apache-2.0
"""`priority` of TLS credentials: GnuTLS's priority strings, as far as OpenSSL can follow them.

QEMU hands the string to GnuTLS, a language of its own for ciphers, groups and versions. Python's
TLS is OpenSSL. What both can do, and what is asked for in practice, is a choice of versions:
`NORMAL:-VERS-TLS1.3`, `NORMAL:-VERS-ALL:+VERS-TLS1.2`. Anything else is refused and not guessed at,
since who writes it has a rule to keep.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from blockemu.drivers.errors import ImageError

DEFAULT_PRIORITY: Final = "NORMAL"

_LEVELS: Final = ("NORMAL", "SECURE128", "SECURE192", "SECURE256", "PFS", "@SYSTEM")
"""Where a string begins. OpenSSL's own default is as strict as the strictest that its
configuration allows, so all mean the same to it."""

_PSK_KEY_EXCHANGES: Final = ("+PSK", "+DHE-PSK", "+ECDHE-PSK")
"""Said with pre-shared keys; the credentials themselves say it to OpenSSL."""

_VERSIONS: Final = {"VERS-TLS1.2": "1.2", "VERS-TLS1.3": "1.3"}
_OLD_VERSIONS: Final = ("VERS-SSL3.0", "VERS-TLS1.0", "VERS-TLS1.1", "VERS-DTLS1.0", "VERS-DTLS1.2")


class TlsVersions(NamedTuple):
    """Which versions may be used; one at least."""

    tls12: bool
    tls13: bool


def parse_priority(name: str, text: str) -> TlsVersions:
    """What `text` allows. Raises: ImageError, of the credentials `name`."""
    first, *rest = text.split(":")
    if first not in _LEVELS:
        raise ImageError(name, f"priority '{text}' begins with none of {', '.join(_LEVELS)}")
    allowed = {"1.2", "1.3"}
    for word in rest:
        sign, item = word[:1], word[1:]
        removes = sign in ("-", "!")
        if word in _PSK_KEY_EXCHANGES or (removes and item in _OLD_VERSIONS):
            continue  # so it is anyway
        if item == "VERS-ALL" and removes:
            allowed.clear()
        elif item == "VERS-ALL" and sign == "+":
            allowed.update(_VERSIONS.values())
        elif item in _VERSIONS and removes:
            allowed.discard(_VERSIONS[item])
        elif item in _VERSIONS and sign == "+":
            allowed.add(_VERSIONS[item])
        else:
            raise ImageError(
                name,
                f"priority '{text}': '{word}' is more than OpenSSL can be told; what it takes are "
                "-VERS-TLS1.2, -VERS-TLS1.3, -VERS-ALL and +VERS-TLS1.x",
            )
    if not allowed:
        raise ImageError(name, f"priority '{text}' leaves no version of TLS")
    return TlsVersions("1.2" in allowed, "1.3" in allowed)
