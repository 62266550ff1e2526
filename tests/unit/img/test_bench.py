# SPDX-License-Identifier: Apache-2.0
"""`img bench` beside qemu-img: the same lines but for the time, the same bytes written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.img.side_by_side import our_output, ours, random_bytes, theirs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(random_bytes(11, 1 << 20))
    return tmp_path


def without_time(text: str) -> str:
    return re.sub(r"in [0-9.]+ seconds", "in X seconds", text)


RUNS = [
    "-c 100",
    "-c 1000 -d 1 -o 64k",
    "-c 80 -s 8k -S 12k -d 7",
    "-c 0",
    "-w -c 100 --pattern=85",
    "-w -c 100 -d 4 --pattern=7 --flush-interval=10",
    "-w -c 95 -d 4 --pattern=7 --flush-interval=10 --no-drain",
    "-w -c 40 -s 512 -S 64k --pattern=9",
    "-w -c 20 -t none --pattern=3",
]


@pytest.mark.parametrize("run", RUNS)
def test_lines_and_written_bytes_are_theirs(folder: Path, run: str) -> None:
    for name in ("ours", "theirs"):
        Path(name).write_bytes(Path("disk.raw").read_bytes())
    expected = theirs("bench", "-f", "raw", *run.split(), "theirs")
    assert expected.code == 0, expected.err
    shown = our_output("bench", "-f", "raw", *run.split(), "ours")
    assert without_time(shown) == without_time(expected.out)
    assert Path("ours").read_bytes() == Path("theirs").read_bytes()


@pytest.mark.parametrize("options", ["-n", "-i native", "-i threads"])
def test_engines_read_past_the_page_cache(folder: Path, options: str) -> None:
    shown = our_output("bench", "-f", "raw", "-t", "none", "-c", "50", *options.split(), "disk.raw")
    assert "Run completed" in shown


def test_quiet_bench_says_nothing(folder: Path) -> None:
    assert our_output("bench", "-q", "-c", "1", "-f", "raw", "disk.raw") == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("none", 1, "none: No such file or directory"),
        ("-f vmdk disk.raw", 1, "disk.raw: there is no image format 'vmdk'"),
        ("-c 1 -o 1G disk.raw", 1, "disk.raw: Invalid argument"),
        ("-c 300 -s 12k disk.raw", 1, "disk.raw: Invalid argument"),
        ("-c 300 -w -s 12k disk.raw", 1, "disk.raw: No space left on device"),
        ("--flush-interval 100 disk.raw", 1, "disk.raw: --flush-interval is for writes"),
        ("-w --flush-interval 10 disk.raw", 1, "disk.raw: --flush-interval can't be smaller"),
        ("-s 1G -d 2 disk.raw", 1, "disk.raw: 2 requests of 1073741824 bytes in parallel take"),
        ("-d 0 disk.raw", 2, ""),
        ("-c -1 disk.raw", 2, ""),
        ("-w --pattern 256 disk.raw", 2, ""),
        ("-w -U disk.raw", 2, ""),
    ],
)
def test_bench_of_what_can_not_be_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: str, code: int, message: str
) -> None:
    result = ours(capfd, "bench", *arguments.split())
    assert result.code == code
    if code == 1:
        assert result.err.count("\n") == 1
        assert result.err.startswith(f"blockemu: {message}")
