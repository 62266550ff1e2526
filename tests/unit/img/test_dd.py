# SPDX-License-Identifier: Apache-2.0
"""`img dd` beside qemu-img: the same part, the same size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.img.side_by_side import Animal, held_by_qemu, our_output, ours, theirs

PARTS = [
    "bs=1M",
    "bs=1k count=5",
    "bs=1k count=5 skip=2",
    "skip=5 count=3",
    "bs=1k count=0",
    "bs=1k skip=3",
    "bs=1000 count=3",
    "bs=64k skip=1 count=100000",
    "",
]


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["raw-sparse", "raw-odd-hole", "qcow2-65536-1.1", "chain"])
def test_part_is_theirs(
    zoo: dict[str, Animal], tmp_path: Path, name: str, part: str, fmt: str
) -> None:
    source = zoo[name]
    for run, target in ((our_output, "ours"), (theirs, "theirs")):
        words = [*part.split(), f"if={source.path}", f"of={tmp_path / target}"]
        run("dd", "-f", source.fmt, "-O", fmt, *words)
    compared = theirs("compare", "-f", fmt, "-F", fmt, tmp_path / "ours", tmp_path / "theirs")
    assert compared.out == "Images are identical.\n"
    if fmt == "raw":
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ("if=disk.raw", "of=: is missing"),
        ("of=x", "if=: is missing"),
        ("bs=0 if=disk.raw of=x", "bs=: is between 1 and 2147483647, not 0"),
        ("bs=2G if=disk.raw of=x", "bs=: is between 1 and 2147483647, not 2147483648"),
        ("bs=1x if=disk.raw of=x", "bs=: '1x' is not a size"),
        ("foo=1 if=disk.raw of=x", "foo=1: no operand of dd; known: bs=, count=, skip=, if="),
        ("if if=disk.raw of=x", "if: no operand of dd"),
        ("if=none of=x", "none: No such file or directory"),
        ("if=disk.raw of=none/x", "none/x: No such file or directory"),
        ("-O vmdk if=disk.raw of=x", "x: can't create format 'vmdk'"),
        ("if=disk.raw of=disk.raw", "disk.raw: is in use"),
        ("skip=2049 if=disk.raw of=x", "disk.raw: has 1048576 bytes: 1049088 of them can't be"),
    ],
)
def test_dd_of_what_can_not_be_is_one_line_and_leaves_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    operands: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(b"x" * (1 << 20))
    result = ours(capfd, "dd", *operands.split())
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert result.err.startswith(f"blockemu: {message}")
    assert [path.name for path in Path().iterdir()] == ["disk.raw"]
    assert Path("disk.raw").read_bytes() == b"x" * (1 << 20)


def test_image_in_use_is_read_with_force_share_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, copy = tmp_path / "held.qcow2", tmp_path / "copy"
    theirs("create", "-q", "-f", "qcow2", path, "1M")
    with held_by_qemu(path):
        assert ours(capfd, "dd", f"if={path}", f"of={copy}").code == 1
        assert ours(capfd, "dd", "-U", f"if={path}", f"of={copy}").code == 0
    assert copy.stat().st_size == 1 << 20
