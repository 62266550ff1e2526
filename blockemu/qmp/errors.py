# SPDX-License-Identifier: Apache-2.0
"""The errors that a QMP client sees: a class, of which there are few, and a sentence."""

from __future__ import annotations

GENERIC_ERROR = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"


class QmpError(Exception):
    """A request that fails in a way that the client is told."""

    def __init__(self, desc: str, *, error_class: str = GENERIC_ERROR) -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class
