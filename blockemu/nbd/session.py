# SPDX-License-Identifier: Apache-2.0
"""What a client and the server have agreed on by the end of negotiation: one connection's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockemu.exports import Export
    from blockemu.loop.tls_stream import TlsStream


@dataclass(frozen=True, slots=True)
class Session:
    """Made by negotiation in the main context, then read by the connection in its own."""

    export: Export
    tls: TlsStream | None = None
    """What the client's bytes go through; None: the socket itself."""
