# SPDX-License-Identifier: Apache-2.0
"""The NBD part of the benchmark: its arithmetic, its verdicts, and the image that it makes."""

from __future__ import annotations

from pathlib import Path

from benchmarks import nbd
from benchmarks.contestants import OURS
from benchmarks.fragmented import DISK_BYTES, make_fragmented
from benchmarks.nbd_clients import ALONE, BESIDE, CONNECTIONS, QEMU_NBD
from benchmarks.nbd_sample import Sample, ratios
from benchmarks.report import text_section
from tests.peers.qemu import QemuImg
from tests.peers.requirement import require_peer


def samples(measure: str, **values: float) -> list[Sample]:
    """Of round 0; a name's underscores are spaces or dashes there."""
    return [Sample(measure, name, "us", 0, value) for name, value in values.items()]


def all_samples(*, good: bool) -> list[Sample]:
    """Of every target, all well within or all beyond its bound."""
    cost = 1.01 if good else 1.2
    found = []
    for pattern in nbd.PATTERNS:
        load = f"{pattern}-4k-d32"
        found += samples(load, simple=100, structured=100 / cost, extended=100 / cost)
        found += samples(f"{load} CPU", simple=3, structured=3 * cost, extended=3 * cost)
    for measure, ours, theirs in (
        (nbd.MAP, 1.1 if good else 1.3, 1.0),
        (f"{CONNECTIONS} idle", 63 * 1024 if good else 65 * 1024, 1),
        ("first read", 1900 if good else 2100, 1),
        (nbd.TLS, 0.95 if good else 0.85, 1),
    ):
        found += [
            Sample(measure, OURS, "", 0, ours),
            Sample(measure, QEMU_NBD, "", 0, theirs),
        ]
    for depth in nbd.DEPTHS:
        beside = 5 if good else 50
        found += [
            Sample(f"p99 d{depth}", ALONE, "us", 0, 1),
            Sample(f"p99 d{depth}", BESIDE, "us", 0, beside),
        ]
    return found


def test_every_target_has_a_verdict_that_depends_on_what_was_measured() -> None:
    for good in (True, False):
        verdicts = nbd.judge_nbd(all_samples(good=good))
        assert [verdict.reached for verdict in verdicts] == [good] * nbd.VERDICTS


def test_what_wasnt_measured_has_no_verdict() -> None:
    assert nbd.judge_nbd([]) == []


def test_ratios_are_formed_within_a_round() -> None:
    found = [
        Sample("m", "a", "", turn, value) for turn, value in ((0, 10.0), (1, 20.0), (2, 90.0))
    ] + [Sample("m", "b", "", turn, value) for turn, value in ((0, 5.0), (1, 5.0))]
    spread = ratios(found, "m", "a", "b")
    assert spread is not None
    assert (spread.low, spread.high) == (2, 4)
    assert ratios(found, "m", "a", "nobody") is None


def test_section_shows_each_measure_against_its_base() -> None:
    text = text_section(nbd.nbd_section(all_samples(good=True)))
    assert "1.10x (1.10-1.10)" in text, "the map against qemu-nbd's"
    assert "5.00x (5.00-5.00)" in text, "beside against alone"


def test_fragmented_image_is_sound_and_every_second_cluster_is_data(tmp_path: Path) -> None:
    require_peer("qemu-img")
    image = make_fragmented(tmp_path / "image.qcow2")
    found = QemuImg.check(image)
    assert (found.corruptions, found.leaks, found.errors) == (0, 0, 0), found.text
    assert QemuImg.info(image)["virtual-size"] == DISK_BYTES
    assert '"allocated-clusters": 819200' in found.text
