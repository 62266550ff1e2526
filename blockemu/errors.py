# SPDX-License-Identifier: Apache-2.0
"""Failures of the daemon itself that a user can mend: an address, an option, a socket path.

They read like the block layer's `ImageError`: a name, a reason, one line. What is neither of the
two nor an `OSError` is a bug of ours, and is reported as one (cli/failure.py).
"""

from __future__ import annotations


class DaemonError(Exception):
    """Something that was asked for can't be done: `str()` is the one line to show."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
