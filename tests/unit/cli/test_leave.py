# SPDX-License-Identifier: Apache-2.0
"""The console script ends without taking the interpreter apart; nothing may be lost by that."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from blockemu.cli.failure import leave

CONSOLE_SCRIPT = [sys.executable, "-m", "blockemu"]


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses that the process would have ended with."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def test_all_that_was_printed_reaches_a_pipe() -> None:
    result = subprocess.run([*CONSOLE_SCRIPT, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: ")
    assert "serve" in result.stdout.splitlines()[-1]


def test_status_of_a_failure_is_kept() -> None:
    words = [*CONSOLE_SCRIPT, "img", "info", "/nonexistent/disk"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "blockemu: /nonexistent/disk: No such file or directory\n"


def test_full_disk_is_no_success() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([*CONSOLE_SCRIPT, "--help"], stdout=full, stderr=subprocess.PIPE)
    assert result.returncode != 0
    assert b"No space left" in result.stderr


def test_leave_ends_the_process(exits: list[int]) -> None:
    leave(3)
    assert exits == [3]


def test_leave_lets_another_thread_finish(exits: list[int]) -> None:
    event = threading.Event()
    wait: Callable[[], object] = event.wait
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        leave(3)
    finally:
        event.set()
        thread.join()
    assert exits == []
