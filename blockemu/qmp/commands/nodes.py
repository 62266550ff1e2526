# SPDX-License-Identifier: Apache-2.0
"""Nodes by the names that commands give: a device or a node, in QEMU's words when there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.qmp.errors import QmpError

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState
    from blockemu.qmp.command import Session


def find_node(session: Session, *, device: str = "", node_name: str = "") -> BlockDriverState:
    """The node of this name; there are no devices here but exports, which are found by their id.

    Raises: QmpError.
    """
    nodes = session.daemon.opener.nodes
    if node_name in nodes:
        return nodes[node_name]
    if device:
        export = session.daemon.exports.by_id(device)
        if export is not None:
            return export.backend.node
    raise QmpError(f"Cannot find device='{device}' nor node-name='{node_name}'")
