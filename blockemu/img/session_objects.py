# SPDX-License-Identifier: Apache-2.0
"""What the user says about a command's images besides their names: secrets.

One command of `blockemu img` is one session (session.py). Its secrets (`--object`) are kept here,
per thread, from the command line to the session's Opener; so the commands in between, each with
arguments of its own, needn't hand them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from blockemu.drivers.crypto.secrets import SecretTable


@dataclass(slots=True)
class SessionObjects:
    """Of one command."""

    secrets: SecretTable = field(default_factory=SecretTable)


_current: ContextVar[SessionObjects | None] = ContextVar("session_objects", default=None)


def session_objects() -> SessionObjects:
    """Those of the command that runs; none of their own for who never entered one."""
    return _current.get() or SessionObjects()


@contextmanager
def new_session_objects() -> Iterator[SessionObjects]:
    """Inside, sessions have these objects."""
    objects = SessionObjects()
    token = _current.set(objects)
    try:
        yield objects
    finally:
        _current.reset(token)
