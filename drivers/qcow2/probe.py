# SPDX-License-Identifier: Apache-2.0
"""What the first bytes of a qcow2 image say of other files, read without trust.

Before an image whose format was guessed is opened, the caller must know whether that would open a
second file. The answer errs towards yes: an unreadable name is a name.
"""

from __future__ import annotations

import struct

from blockemu.drivers.qcow2.features import DATA_FILE
from blockemu.drivers.qcow2.header import V2_LENGTH
from blockemu.drivers.qcow2.layout import BACKING_NAME_MAX


def names_other_file(start: bytes) -> str | None:
    """The backing or data file that an image beginning with `start` names, or None."""
    if len(start) < V2_LENGTH:
        return None
    version, offset, length = struct.unpack_from(">IQI", start, 4)
    if offset:
        name = start[offset : offset + min(length, BACKING_NAME_MAX)]
        return name.decode("utf-8", "replace") or "(a backing file)"
    if version >= 3 and len(start) >= V2_LENGTH + 8:
        (features,) = struct.unpack_from(">Q", start, V2_LENGTH)
        if features & DATA_FILE:
            return "(an external data file)"
    return None
