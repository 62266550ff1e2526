# SPDX-License-Identifier: Apache-2.0
"""What a user types for `serve` as a configuration, and what is refused of it."""

from __future__ import annotations

import os

import pytest

from blockemu.config import serve_config
from blockemu.errors import DaemonError

LATIN1 = os.fsdecode(b"pl\xe4tte.raw")


@pytest.mark.parametrize(("path", "names"), [(LATIN1, ()), ("disk.raw", (LATIN1,))])
def test_an_export_name_that_is_not_utf8_is_refused(path: str, names: tuple[str, ...]) -> None:
    """The protocol's strings are UTF-8. The name was taken, and no client could list any export."""
    with pytest.raises(DaemonError, match="isn't UTF-8") as caught:
        serve_config([path], names=names)
    assert str(caught.value).startswith(path)


def test_a_file_whose_name_is_not_utf8_is_served_under_a_name_of_its_own() -> None:
    (image,) = serve_config([LATIN1], names=["disk"]).images
    assert (image.path, image.export_name) == (LATIN1, "disk")


def test_a_thread_without_a_name_is_refused() -> None:
    with pytest.raises(DaemonError, match="--iothread: the name is empty"):
        serve_config(["disk.raw"], iothreads=[""])


def test_unmapping_detected_zeroes_without_discards_is_refused() -> None:
    with pytest.raises(DaemonError, match="--detect-zeroes unmap: goes with --discard unmap only"):
        serve_config(["disk.raw"], discard="ignore", detect_zeroes="unmap")


def test_a_snapshot_is_served_for_reading_only() -> None:
    (image,) = serve_config(["disk.qcow2"], snapshot="before").images
    assert (image.read_only, image.snapshot) == (True, "before")
