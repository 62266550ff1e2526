# SPDX-License-Identifier: Apache-2.0
"""The sanitized build, made once a run; and what these tests share with the end-to-end ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import folder

__all__ = ["folder"]

BUILD = Path(__file__).parents[2] / "tools" / "sanitized-build"


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In which `blockemu` is the sanitized build."""
    place = tmp_path_factory.mktemp("sanitized")
    result = subprocess.run([BUILD, place], capture_output=True, text=True)
    if "no libasan" in result.stderr or "cannot find -l" in result.stderr:
        pytest.skip("the compiler has no sanitizers installed")
    assert result.returncode == 0, result.stderr
    made = dict(line.split("=", 1) for line in result.stdout.splitlines())
    made["BLOCKEMU_NATIVE"] = "1"
    return made
