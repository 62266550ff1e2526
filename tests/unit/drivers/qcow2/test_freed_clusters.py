# SPDX-License-Identifier: Apache-2.0
"""A freed cluster is not handed out again before the L2 update that let go of it is on disk.

Else a block that was durably discarded, or written elsewhere, shows another block's data after a
power cut. `make crash` goes on for as many rounds as you like; `BLOCKEMU_SEED` replays a run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockemu.drivers.qcow2.metadata_writer import MetadataWriter, Reference
from tests.unit.drivers.qcow2.crash_search import KINDS, WITH_SNAPSHOTS, Search
from tests.unit.drivers.qcow2.support import Images

ROUNDS = int(os.environ.get("BLOCKEMU_ROUNDS", "1"))
SEARCHES = 15
"""Workloads in a round, some 70 cuts each, and some 400 with snapshots."""


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_power_cut_anywhere_shows_no_block_anothers_data(
    images: Images, seed: int, turn: int, tmp_path: Path
) -> None:
    seed = int(os.environ.get("BLOCKEMU_SEED", seed))
    print(f"seed {seed}: replay with BLOCKEMU_SEED={seed}")
    cuts = 0
    for number in range(SEARCHES):
        print(f"search {turn}-{number}")
        kinds = KINDS if number % 3 else WITH_SNAPSHOTS
        search = Search(images, f"{seed}-{turn}-{number}", kinds=kinds)
        search.run()
        cuts += search.judge(ask_qemu=tmp_path / "cut.qcow2").cuts
    print(f"{cuts} cuts")


def test_search_finds_an_allocator_that_takes_too_early(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the check: what is let go counts as free at once."""

    def release_at_once(self: MetadataWriter, reference: Reference) -> None:
        self.released.append(reference)

    monkeypatch.setattr(MetadataWriter, "let_go", release_at_once)
    found: list[str] = []
    for number in range(10):
        search = Search(images, f"too-early-{number}")
        search.run()
        try:
            search.judge()
        except AssertionError as error:
            found.append(str(error))
    assert any("holds write" in message for message in found), found
