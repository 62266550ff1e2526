# SPDX-License-Identifier: Apache-2.0
"""The version that QMP clients see.

They look at `qemu` to find out which commands and arguments they may use, so it is the version of
QEMU whose protocol we keep to; our own stands in `package`.
"""

from __future__ import annotations

from typing import Any

import blockemu

PROTOCOL_OF_QEMU = (7, 2, 0)


def version_info() -> dict[str, Any]:
    """What the greeting and query-version show."""
    major, minor, micro = PROTOCOL_OF_QEMU
    return {
        "qemu": {"micro": micro, "minor": minor, "major": major},
        "package": f"blockemu {blockemu.__version__}",
    }
