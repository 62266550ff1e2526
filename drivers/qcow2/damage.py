# SPDX-License-Identifier: Apache-2.0
"""Metadata that can't be right: the error for the request, and the line for the log.

Images come from anywhere; an entry that points outside the file, or into the middle of a cluster,
ends the request that met it and is never followed. The line names the structure and the offset, so
that it can be found with a hex dump; a guest that reads the same spot a million times doesn't fill
the log.
"""

from __future__ import annotations

import errno
import logging

from blockemu.drivers.errors import io_error

log = logging.getLogger(__name__)

LINES_MAX = 100
"""Different complaints logged for one image."""


class DamageLog:
    """The complaints about one image."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._said: set[str] = set()

    def report(self, detail: str) -> OSError:
        """Log `detail` once; returns the error to raise."""
        if detail not in self._said and len(self._said) < LINES_MAX:
            self._said.add(detail)
            log.error("%s: qcow2 metadata is damaged: %s", self.name, detail)
        return io_error(errno.EIO, f"{self.name}: {detail}")
