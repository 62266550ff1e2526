# SPDX-License-Identifier: Apache-2.0
"""Who measures what on which image."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contestants import CONTESTANTS, Stand
from benchmarks.measure import exchange_images
from benchmarks.workloads import SETTINGS


def test_every_server_gets_every_image_once_in_as_many_rounds(tmp_path: Path) -> None:
    images = [tmp_path / name for name in "abc"]
    stands = [Stand(CONTESTANTS[0], SETTINGS[0], image, tmp_path, 4096) for image in images]
    seen = []
    for turn in range(3):
        exchange_images(stands, images, turn)
        now = [stand.image for stand in stands]
        assert sorted(now) == images, "nobody shares"
        seen.append(now)
    assert all(sorted(column) == images for column in zip(*seen, strict=True))
    for stand in stands:
        stand.close()
