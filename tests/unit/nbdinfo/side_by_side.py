# SPDX-License-Identifier: Apache-2.0
"""blockemu nbd and nbdinfo on the same servers."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from blockemu.cli import main
from tests.peers.qemu import run_tool


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def ours(capfd: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """`blockemu nbd ...`, in this process, as the console script runs it."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["nbd", *arguments])
    output = capfd.readouterr()
    assert "internal error" not in output.err, output.err
    assert isinstance(caught.value.code, int)
    return Outcome(caught.value.code, output.out, output.err)


def theirs(*arguments: str) -> Outcome:
    """`nbdinfo ...`."""
    result = run_tool(["nbdinfo", *arguments], check=False)
    return Outcome(result.code, result.stdout, result.stderr)
