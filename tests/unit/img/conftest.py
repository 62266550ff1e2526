# SPDX-License-Identifier: Apache-2.0
"""The zoo of images, made once; and a folder to make others in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers.requirement import require_peer
from tests.unit.img.side_by_side import ZOO, Animal, make_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Animal]:
    """Images to read and not to write, by name."""
    require_peer("qemu-img")
    require_peer("qemu-io")
    found = make_zoo(tmp_path_factory.mktemp("zoo"))
    assert set(found) == set(ZOO)
    return found


@pytest.fixture
def made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is the test's own, with an empty folder `made` in it."""
    require_peer("qemu-img")
    monkeypatch.chdir(tmp_path)
    Path("made").mkdir()
