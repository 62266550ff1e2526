# SPDX-License-Identifier: Apache-2.0
"""`img measure` beside qemu-img: the same numbers, and enough for the copy that is then made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.img.side_by_side import ZOO, Animal, our_output, ours, theirs

OPTIONS = [
    "-O raw",
    "-O qcow2",
    "-O qcow2 -o cluster_size=512,refcount_bits=64",
    "-O qcow2 -o cluster_size=2M",
    "-O qcow2 -o compat=0.10",
    "-O qcow2 -o extended_l2=on",
    "-O qcow2 -o extended_l2=on,cluster_size=16k,preallocation=metadata",
    "-O qcow2 -o preallocation=full",
    "-O qcow2 -o preallocation=falloc",
    "-O qcow2 -o preallocation=metadata",
    "-O qcow2 -o backing_file=x,backing_fmt=raw",
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", ["0", "1", "1000001", "1G", "100G"])
@pytest.mark.parametrize("output", ["human", "json"])
def test_new_image_is_measured_as_by_them(options: str, size: str, output: str) -> None:
    words = ["measure", f"--output={output}", *options.split(), "--size", size]
    assert our_output(*words) == theirs(*words).out


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [name for name in ZOO if name != "qcow2-huge"])
def test_copy_is_measured_as_by_them(zoo: dict[str, Animal], name: str, options: str) -> None:
    path, fmt = zoo[name]
    words = ["measure", *options.split(), "-f", fmt, str(path)]
    assert our_output(*words) == theirs(*words).out
    words.insert(1, "--output=json")
    assert our_output(*words) == theirs(*words).out


@pytest.mark.parametrize("name", ["raw-sparse", "qcow2-65536-1.1", "chain"])
def test_copy_fits(zoo: dict[str, Animal], tmp_path: Path, name: str) -> None:
    path, fmt = zoo[name]
    found = json.loads(our_output("measure", "--output=json", "-O", "qcow2", "-f", fmt, path))
    our_output("convert", "-f", fmt, "-O", "qcow2", path, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size <= found["required"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("", 2, "Usage"),
        ("--size 1G x", 2, "Usage"),
        ("-O qcow2 --size 1x", 2, "Usage"),
        ("-O qcow2 --size 1E", 1, "blockemu: -O: "),
        ("-O vmdk --size 1G", 1, "blockemu: -O: can't create format 'vmdk'"),
        ("-O qcow2 -o nope=1 --size 1G", 1, "blockemu: -O: format qcow2 has no option 'nope'"),
        ("-O qcow2 none", 1, "blockemu: none: No such file or directory"),
    ],
)
def test_measure_of_what_can_not_be_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ours(capfd, "measure", *arguments.split())
    assert result.code == code
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1 or code == 2
