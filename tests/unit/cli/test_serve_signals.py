# SPDX-License-Identifier: Apache-2.0
"""The process's end by signals: once is enough, more do no harm, and none is lost at the start."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def start(tmp_path: Path) -> subprocess.Popen[bytes]:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    command = [sys.executable, "-m", "blockemu", "serve", "-f", "raw", str(image)]
    return subprocess.Popen(
        [*command, "--socket", str(tmp_path / "s")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_until_it_is_gone_end_it_with_status_0(
    tmp_path: Path, number: signal.Signals
) -> None:
    with start(tmp_path) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline().startswith(b"nbd+unix:")
        while daemon.poll() is None:
            daemon.send_signal(number)
        _, errors = daemon.communicate()
    assert (daemon.returncode, errors) == (0, b"")
    assert not (tmp_path / "s").exists()


def test_closed_stdout_does_not_stop_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        with start(tmp_path) as daemon:
            assert daemon.stdout is not None
            assert daemon.stderr is not None
            daemon.stdout.close()
            assert manager.recv(100) == b"READY=1"
            daemon.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert daemon.stderr.read() == b""
        assert daemon.returncode == 0
