# SPDX-License-Identifier: Apache-2.0
"""NBD as far as both sides of it need it: the wire format, and how bytes come off a socket.

The server is floor 4's (`blockemu/nbd/`).
"""

from __future__ import annotations
