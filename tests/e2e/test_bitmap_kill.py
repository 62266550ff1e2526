# SPDX-License-Identifier: Apache-2.0
"""kill -9 while bitmaps are stored, added and removed: each is as it was stored last, or marked as
in use, and the image is sound."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer
from tests.unit.drivers.qcow2.checker import Checker

KILLS = 8
LINES_MAX = 12
LATER_S_MAX = 0.03
"""After the last line that is waited for."""
AUTO, IN_USE = 2, 1


def run_and_kill(image: Path, rng: random.Random) -> list[str]:
    """The lines that a child printed until it was killed."""
    command = [sys.executable, "-m", "tests.e2e.bitmap_churn", str(image), str(rng.random())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(rng.randint(1, LINES_MAX))]
        timer = threading.Timer(rng.uniform(0, LATER_S_MAX), child.kill)
        timer.start()
        lines += child.stdout.readlines()
        timer.join()
    return [line for line in lines if line.endswith("\n")]


def test_kill_leaves_bitmaps_whole_or_marked(tmp_path: Path, random_seed: int) -> None:
    require_peer("qemu-img")
    rng = random.Random(f"{random_seed}-bitmaps")
    image = QemuImg.create(tmp_path / "disk", 1 << 20, options={"cluster_size": 512})
    last: dict[str, list[object]] = {}
    for _ in range(KILLS):
        known = [last, *(json.loads(line) for line in run_and_kill(image, rng))]
        verdict = QemuImg.check(image)
        assert (verdict.corruptions, verdict.errors) == (0, 0), verdict.text
        last = {}
        for name, (flags, dirty) in Checker(image.read_bytes()).bitmaps().items():
            if not flags & IN_USE:
                last[name] = [bool(flags & AUTO), [bit * 512 for bit in dirty]]
                states = [state.get(name) for state in known]
                assert last[name] in states, name
                # Nothing older than what the last opening began with, and what it then stored.
                assert last[name] in states[-3:], name
