# SPDX-License-Identifier: Apache-2.0
"""What the user says about a command's images besides their names: secrets, TLS credentials.

One command of `blockemu img` is one session (session.py). Its objects (`--object`) are kept here,
per thread, from the command line to the session's Opener; so the commands in between, each with
arguments of its own, needn't hand them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from blockemu.drivers.crypto.user_objects import UserObjects

_current: ContextVar[UserObjects | None] = ContextVar("session_objects", default=None)


def session_objects() -> UserObjects:
    """Those of the command that runs; none of their own for who never entered one."""
    return _current.get() or UserObjects()


@contextmanager
def new_session_objects() -> Iterator[UserObjects]:
    """Inside, sessions have these objects."""
    objects = UserObjects()
    token = _current.set(objects)
    try:
        yield objects
    finally:
        _current.reset(token)
