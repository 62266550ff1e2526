# SPDX-License-Identifier: Apache-2.0
"""The sanitized build, made once a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "tools" / "sanitized-build"


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In which `blockemu` is the sanitized build."""
    folder = tmp_path_factory.mktemp("sanitized")
    result = subprocess.run([BUILD, folder], capture_output=True, text=True)
    if "no libasan" in result.stderr or "cannot find -l" in result.stderr:
        pytest.skip("the compiler has no sanitizers installed")
    assert result.returncode == 0, result.stderr
    made = dict(line.split("=", 1) for line in result.stdout.splitlines())
    made["BLOCKEMU_NATIVE"] = "1"
    return made
