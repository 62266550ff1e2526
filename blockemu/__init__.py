# SPDX-License-Identifier: Apache-2.0
"""A storage daemon: disk images served over NBD, with block jobs that run while they are served.

This package is the top floor. The floors below it lie in folders of their own and are imported as
`blockemu.loop`, `blockemu.drivers` and `blockemu.jobs`; ARCHITECTURE.md says what is where.
"""

from __future__ import annotations

__version__ = "0.1.0.dev0"
