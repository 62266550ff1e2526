# SPDX-License-Identifier: Apache-2.0
"""Objects that a command line or QMP makes by type and id. So far: `secret`.

On the command line: `--object secret,id=sec0,file=/run/keys/disk`.
"""

from __future__ import annotations

from collections.abc import Callable

from blockemu.drivers.crypto.secrets import SecretTable, read_secret
from blockemu.drivers.errors import ImageError

OBJECT_TYPES = ("secret",)


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
        raise ImageError("--object", f"a {kind} needs an id: {kind},id=NAME,...")
    return kind, object_id, options


def _split(text: str) -> list[str]:
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def add_command_line_object(table: SecretTable, text: str, *, warn: Callable[[str], None]) -> None:
    """Carry out one `--object`. `warn` is told what is wiser done otherwise. Raises: ImageError."""
    _, object_id, options = parse_object(text)
    if "data" in options:
        warn(
            f"secret '{object_id}' stands on the command line, where every user of this machine "
            "can read it (ps); keep it in a file: secret,id=...,file=PATH"
        )
    table.add(object_id, read_secret(object_id, options, read_file))


def read_file(path: str, bytes_max: int) -> bytes:
    """The first bytes of a file; a pipe (`/dev/fd/3`) will do. Raises: OSError."""
    with open(path, "rb") as file:
        return file.read(bytes_max)
