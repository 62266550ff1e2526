# SPDX-License-Identifier: Apache-2.0
"""Commands about objects by type and id (blockemu/objects.py)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

from blockemu.drivers.errors import ImageError
from blockemu.objects import OBJECT_TYPES, make_object
from blockemu.qmp.command import Command, Session
from blockemu.qmp.errors import QmpError
from blockemu.qmp.schema import member_key

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ObjectAddArguments:
    """Of `object-add`; which of them go with which type is for its maker to say. `data` is a secret
    itself, and in no repr."""

    qom_type: str
    id: str
    # secret
    data: str | None = field(default=None, repr=False)
    file: str | None = None
    format: str | None = None
    # tls-creds-*
    dir: str | None = None
    endpoint: str | None = None
    priority: str | None = None
    verify_peer: bool | None = None
    sanity_check: bool | None = None
    passwordid: str | None = None
    username: str | None = None
    # authz-*
    identity: str | None = None
    policy: str | None = None
    rules: list[dict[str, Any]] | None = None
    filename: str | None = None
    refresh: bool | None = None


@dataclass(frozen=True, slots=True)
class ObjectDelArguments:
    """Of `object-del`."""

    id: str


async def object_add(session: Session, arguments: ObjectAddArguments) -> dict[str, Any]:
    """Make an object, of the files that it names or of the command itself."""
    if arguments.qom_type not in OBJECT_TYPES:
        raise QmpError(f"Parameter 'qom-type' does not accept value '{arguments.qom_type}'")
    given = {
        member_key(member): value
        for member in fields(arguments)
        if member.name not in ("qom_type", "id")
        and (value := getattr(arguments, member.name)) is not None
    }

    opener = session.daemon.opener
    try:
        # A file may be a pipe that nobody has written to yet: not for the loop to wait for.
        add = await opener.offload(
            make_object, opener.objects, arguments.qom_type, arguments.id, given, log.warning
        )
        add()
    except ImageError as error:
        raise QmpError(str(error)) from error
    return {}


async def object_del(session: Session, arguments: ObjectDelArguments) -> dict[str, Any]:
    """Forget an object. What has made use of it keeps what it took."""
    try:
        session.daemon.opener.objects.remove(arguments.id)
    except ImageError as error:
        raise QmpError(f"object '{arguments.id}' not found") from error
    return {}


COMMANDS = (
    Command("object-add", object_add, ObjectAddArguments),
    Command("object-del", object_del, ObjectDelArguments),
)
