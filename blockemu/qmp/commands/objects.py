# SPDX-License-Identifier: Apache-2.0
"""Commands about objects by type and id (blockemu/objects.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blockemu.drivers.crypto.secrets import read_secret
from blockemu.drivers.errors import ImageError
from blockemu.objects import OBJECT_TYPES, read_file
from blockemu.qmp.command import Command, Session
from blockemu.qmp.errors import QmpError


@dataclass(frozen=True, slots=True)
class ObjectAddArguments:
    """Of `object-add`. `data` is the secret itself, and in no repr."""

    qom_type: str
    id: str
    data: str | None = field(default=None, repr=False)
    file: str | None = None
    format: str | None = None


@dataclass(frozen=True, slots=True)
class ObjectDelArguments:
    """Of `object-del`."""

    id: str


async def object_add(session: Session, arguments: ObjectAddArguments) -> dict[str, Any]:
    """Make an object; so far, a secret, from a file or from the command itself."""
    if arguments.qom_type not in OBJECT_TYPES:
        raise QmpError(f"Parameter 'qom-type' does not accept value '{arguments.qom_type}'")
    given = {
        key: value
        for key in ("data", "file", "format")
        if (value := getattr(arguments, key)) is not None
    }
    try:
        # A file may be a pipe that nobody has written to yet: not for the loop to wait for.
        opener = session.daemon.opener
        value = await opener.offload(read_secret, arguments.id, given, read_file)
        opener.secrets.add(arguments.id, value)
    except ImageError as error:
        raise QmpError(str(error)) from error
    return {}


async def object_del(session: Session, arguments: ObjectDelArguments) -> dict[str, Any]:
    """Forget an object. Images that a secret has unlocked stay so."""
    try:
        session.daemon.opener.secrets.remove(arguments.id)
    except ImageError as error:
        raise QmpError(f"object '{arguments.id}' not found") from error
    return {}


COMMANDS = (
    Command("object-add", object_add, ObjectAddArguments),
    Command("object-del", object_del, ObjectDelArguments),
)
