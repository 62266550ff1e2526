# SPDX-License-Identifier: Apache-2.0
"""The control socket's listening side: accepts clients and gives each a monitor of its own."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blockemu.loop.aio_context import AioContext
from blockemu.loop.clock import ClockType
from blockemu.qmp.command import Command, Session
from blockemu.qmp.commands import COMMANDS
from blockemu.qmp.monitor import Monitor
from blockemu.qmp.version import version_info

if TYPE_CHECKING:
    from blockemu.daemon import Daemon

log = logging.getLogger(__name__)

MONITORS_MAX = 64
"""Clients at once. More are let in and told goodbye; each costs a descriptor and a few KiB."""

ACCEPTS_PER_ROUND_MAX = 16
"""So that a storm of clients doesn't keep the loop from its other work."""

ACCEPT_RETRY_NS = 1_000_000_000
"""Out of descriptors, accept() fails at once, again and again: look away for a second."""


class QmpServer:
    """Context: home thread of `ctx`, the main context."""

    def __init__(
        self, ctx: AioContext, daemon: Daemon, *, commands: Mapping[str, Command] = COMMANDS
    ) -> None:
        self._ctx = ctx
        self._daemon = daemon
        self._commands = commands
        self._listeners: list[socket.socket] = []
        self._retry = ctx.new_timer(self._accept_all)
        self.monitors: set[Monitor] = set()

    def listen(self, sock: socket.socket) -> None:
        """Accept clients from `sock`, which listens and doesn't block. It stays its owner's."""
        self._listeners.append(sock)
        self._watch(sock)

    def close(self) -> None:
        """Accept nobody any more, and hang up on all."""
        self._retry.cancel()
        for sock in self._listeners:
            self._ctx.set_fd_handler(sock.fileno())
        self._listeners.clear()
        for monitor in list(self.monitors):
            monitor.close()

    def broadcast(self, event: dict[str, Any]) -> None:
        """Send an event to every client that has negotiated."""
        for monitor in list(self.monitors):
            if monitor.session.negotiated:
                monitor.send(event)

    def broadcast_event(self, name: str, data: dict[str, Any]) -> None:
        """Send an event, with the time of now."""
        now_us = self._ctx.now_ns(ClockType.HOST) // 1000
        timestamp = {"seconds": now_us // 10**6, "microseconds": now_us % 10**6}
        self.broadcast({"event": name, "data": data, "timestamp": timestamp})

    def _accept_all(self) -> None:
        for sock in list(self._listeners):
            self._watch(sock)

    def _watch(self, sock: socket.socket) -> None:
        self._ctx.set_fd_handler(sock.fileno(), read=lambda: self._accept(sock))

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_ROUND_MAX):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("control socket: %s; trying again in a second", error)
                self._ctx.set_fd_handler(listener.fileno())
                self._retry.arm(self._ctx.now_ns() + ACCEPT_RETRY_NS)
                return
            if len(self.monitors) >= MONITORS_MAX:
                log.warning("control socket: %d clients already; one turned away", MONITORS_MAX)
                sock.close()
                continue
            sock.setblocking(False)
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        session = Session(self._daemon, self._commands)
        greeting = {"QMP": {"version": version_info(), "capabilities": []}}
        monitor = Monitor(
            self._ctx, sock, session, greeting=greeting, on_close=self.monitors.discard
        )
        if monitor.is_open:
            self.monitors.add(monitor)
