# SPDX-License-Identifier: Apache-2.0
"""What a client and the server have agreed on by the end of negotiation: one connection's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockemu.drivers.nbd.protocol import TransmissionFlag
from blockemu.nbd.reply_style import SIMPLE, ReplyStyle

if TYPE_CHECKING:
    from blockemu.exports import Export
    from blockemu.nbd.meta_context import MetaContext


@dataclass(frozen=True, slots=True)
class Session:
    """Made by negotiation in the main context, then read by the connection in its own."""

    export: Export
    style: ReplyStyle = SIMPLE
    """How requests and replies look."""
    contexts: tuple[MetaContext, ...] = ()
    """What BLOCK_STATUS tells about, unless a request chooses some of them."""


def transmission_flags(
    export: Export, style: ReplyStyle, contexts: tuple[MetaContext, ...]
) -> TransmissionFlag:
    """What a client that has agreed on `style`, and chosen `contexts`, may ask of `export`.

    Context: main.
    """
    flags = export.transmission_flags
    if style.structured:
        flags |= TransmissionFlag.NBD_FLAG_SEND_DF
    if style.extended and contexts:
        flags |= TransmissionFlag.NBD_FLAG_BLOCK_STATUS_PAYLOAD
    return flags
