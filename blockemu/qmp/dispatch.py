# SPDX-License-Identifier: Apache-2.0
"""From one request to one response: the envelope, the command, its arguments, its errors.

The sentences of the errors are QEMU's where clients are known to look at them.
"""

from __future__ import annotations

import logging
from typing import Any

from blockemu.drivers.errors import ImageError
from blockemu.errors import DaemonError
from blockemu.jobs.job import JobError
from blockemu.qmp.command import Session
from blockemu.qmp.errors import COMMAND_NOT_FOUND, QmpError
from blockemu.qmp.json_stream import parse_value
from blockemu.qmp.schema import parse_arguments

log = logging.getLogger(__name__)

_MEMBERS = frozenset({"execute", "arguments", "id"})


async def respond(session: Session, request: bytes | QmpError) -> dict[str, Any]:
    """The response to one value that a client sent. Context: main. Suspends: as its command does.

    Never raises for what a client does, and not for our bugs either: those are logged, and the
    client is told that there was one.
    """
    envelope: Any = None
    try:
        if isinstance(request, QmpError):
            raise request
        envelope = parse_value(request)
        response = {"return": await _execute(session, envelope)}
    except QmpError as error:
        return _with_id(envelope, _error(error))
    except (ImageError, DaemonError, JobError) as error:
        return _with_id(envelope, _error(QmpError(str(error))))
    except OSError as error:
        return _with_id(envelope, _error(QmpError(error.strerror or str(error))))
    except Exception as error:
        named = envelope.get("execute") if isinstance(envelope, dict) else None
        log.exception("QMP command failed by a bug: %.200r", named)  # arguments may be secret
        text = f"internal error: {type(error).__name__}: {error}"
        return _with_id(envelope, _error(QmpError(text)))
    if "id" in envelope:
        response["id"] = envelope["id"]
    return response


async def _execute(session: Session, envelope: Any) -> Any:
    if not isinstance(envelope, dict):
        raise QmpError("QMP input must be a JSON object")
    for key in envelope:
        if key not in _MEMBERS:
            raise QmpError(f"QMP input member '{key}' is unexpected")
    if "execute" not in envelope:
        raise QmpError("QMP input lacks member 'execute'")
    name = envelope["execute"]
    if not isinstance(name, str):
        raise QmpError("QMP input member 'execute' must be a string")
    arguments = envelope.get("arguments", {})
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    command = session.commands.get(name)
    if not session.negotiated and (command is None or not command.in_negotiation):
        raise QmpError(
            "Expecting capabilities negotiation with 'qmp_capabilities'",
            error_class=COMMAND_NOT_FOUND,
        )
    if command is None:
        raise QmpError(f"The command {name} has not been found", error_class=COMMAND_NOT_FOUND)
    if session.negotiated and command.in_negotiation:
        raise QmpError(
            "Capabilities negotiation is already complete, command ignored",
            error_class=COMMAND_NOT_FOUND,
        )
    return await command.handler(session, parse_arguments(command.arguments, arguments))


def _error(error: QmpError) -> dict[str, Any]:
    return {"error": {"class": error.error_class, "desc": error.desc}}


def _with_id(envelope: Any, response: dict[str, Any]) -> dict[str, Any]:
    if isinstance(envelope, dict) and "id" in envelope:
        return {"id": envelope["id"], **response}
    return response
