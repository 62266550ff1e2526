# SPDX-License-Identifier: Apache-2.0
"""What `serve` prints when clients can connect."""

from __future__ import annotations

import pytest

from blockemu.cli.serve import announce


def test_an_export_is_announced_on_one_line_whatever_its_file_is_called(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line break in a file's name looked like one more export to whoever reads our output."""
    announce(["nbd://localhost/a (raw, 1 MiB, read-write): a\nnbd://evil/b (raw): b"])
    assert capsys.readouterr().out.splitlines() == [
        "nbd://localhost/a (raw, 1 MiB, read-write): a\\nnbd://evil/b (raw): b"
    ]
