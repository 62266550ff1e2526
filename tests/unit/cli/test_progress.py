# SPDX-License-Identifier: Apache-2.0
"""The progress bar: on a terminal, and nowhere else."""

from __future__ import annotations

import io

import pytest

from blockemu.cli.progress import progress_bar


class Terminal(io.StringIO):
    """What stderr is to who sits in front of it."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, *, wanted: bool) -> str:
    monkeypatch.setattr("sys.stderr", stderr)
    with progress_bar(wanted=wanted) as show:
        for done in (0, 25, 50, 100):
            show(done, 100)
    return stderr.getvalue()


def test_terminal_gets_a_bar_that_ends_at_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "100%" in shown(monkeypatch, Terminal(), wanted=True)


def test_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), wanted=True) == ""


def test_nobody_gets_a_bar_that_nobody_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), wanted=False) == ""
