# SPDX-License-Identifier: Apache-2.0
"""The C parts under sanitizers while the graph changes: the stress test, run by a sanitized pytest.

Daemon, graph and clients are then in one process with the sanitized build, which a finding ends
with its report. Leaks aren't looked for here: an interpreter that ran pytest leaves too many.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
TIMEOUT_S = 480 * ROUNDS

pytestmark = pytest.mark.skipif(
    os.environ.get("BLOCKEMU_NATIVE") == "0", reason="is about the C data path"
)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 30)
def test_graph_changes_under_load_without_a_sanitizers_report(
    environment: dict[str, str], seed: int
) -> None:
    chosen = os.environ.get("BLOCKEMU_SEED", str(seed))
    print(f"seed {chosen}: replay with BLOCKEMU_SEED={chosen}")
    words = ["-q", "-c", "pyproject.toml", "-p", "no:cacheprovider", "-k", "native and not python"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "tests/e2e/test_graph_stress.py"],
        cwd=HOUSE,
        env={
            **os.environ,
            **environment,
            "ASAN_OPTIONS": f"{environment['ASAN_OPTIONS']}:detect_leaks=0",
            "BLOCKEMU_SEED": chosen,
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-20_000:]
    assert " passed" in result.stdout, result.stdout
