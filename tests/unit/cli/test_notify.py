# SPDX-License-Identifier: Apache-2.0
"""NOTIFY_SOCKET: messages arrive, and a manager that is gone does no harm."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from blockemu.notify import make_notify


def test_notify_to_path_arrives(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        make_notify(str(tmp_path / "n"))("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_notify_to_abstract_socket_arrives() -> None:
    name = f"blockemu-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        make_notify("@" + name)("STOPPING=1")
        assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", [None, ""])
def test_notify_unset_does_nothing(address: str | None) -> None:
    make_notify(address)("READY=1")


@pytest.mark.parametrize("address", ["relative", "/nonexistent/n", "/" + "x" * 200])
def test_notify_unusable_is_logged_only(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_notify(address)("READY=1")
    assert address in caplog.text
