# SPDX-License-Identifier: Apache-2.0
"""Backing chains made by QEMU's tools, twice: one for each of two tools to change."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from blockemu.cli import cli
from blockemu.drivers.qcow2.layout import round_up
from tests.peers.qemu import QemuImg, QemuIo, run_tool

KIB = 1024
MIB = 1024 * KIB
DISK_BYTES = 3 * MIB + 512


def blockemu(*arguments: str) -> str:
    """Runs the command in this process; it must succeed."""
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: str) -> str:
    """The one line with which the command is refused."""
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exit_code == 1, result.output
    line = str(result.exception)
    assert "\n" not in line
    return line


def scribble(path: Path, rng: random.Random, *, length: int, fmt: str = "qcow2") -> None:
    """Data, zeroes, compressed clusters and discards in random places of a qcow2 image."""
    cluster = QemuImg.info(path, fmt=fmt).get("cluster-size", 64 * KIB)
    commands = []
    if fmt == "qcow2":  # first of all: QEMU compresses only into clusters that hold nothing
        for start in range(0, length - cluster, round_up(length // 3, cluster)):
            commands.append(f"write -c -P {rng.randrange(1, 256)} {start} {cluster}")
    for _ in range(10):
        kind = rng.choice(("write", "write", "write -z", "write -z -u", "discard"))
        start, count = rng.randrange(length // 512) * 512, rng.choice((1, 9, 130, 700)) * 512
        if start + count <= length:
            pattern = f"-P {rng.randrange(1, 256)} " if kind == "write" else ""
            commands.append(f"{kind} {pattern}{start} {count}")
    QemuIo(path, fmt=fmt).run(*commands)


def make_chain(
    folder: Path, rng: random.Random, *, sizes: list[int], options: dict[str, Any], names: str
) -> list[Path]:
    """Images `names` over each other (the first one raw), of `sizes`, all with some content."""
    chain: list[Path] = []
    for name, size in zip(names.split(), sizes, strict=True):
        path = folder / name
        fmt = name.rpartition(".")[2]
        command = ["qemu-img", "create", "-q", "-f", fmt]
        if fmt == "qcow2" and options:
            command += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
        if chain:
            command += ["-b", chain[-1].name, "-F", chain[-1].suffix[1:]]
        run_tool([*command, path, str(size)])
        scribble(path, rng, length=size, fmt=fmt)
        chain.append(path)
    return chain


def twice(folder: Path) -> tuple[Path, Path]:
    """Copies of the folder `made`: ours and theirs."""
    for name in ("ours", "theirs"):
        shutil.copytree(folder / "made", folder / name)
    return folder / "ours", folder / "theirs"


def info(path: Path) -> dict[str, Any]:
    """What qemu-img says of it, but for how much it takes on the disk, and where it is."""
    facts: dict[str, Any] = json.loads(run_tool(["qemu-img", "info", "--output=json", path]).stdout)
    for key in ("actual-size", "filename", "full-backing-filename", "children"):
        facts.pop(key, None)
    return facts


def content(path: Path, fmt: str = "qcow2") -> bytes:
    """What the guest sees, by qemu-img."""
    target = path.with_suffix(".content")
    QemuImg.convert(path, target, source_fmt=fmt, target_fmt="raw")
    data = target.read_bytes()
    target.unlink()
    return data


def assert_clean(path: Path) -> None:
    """qemu-img's verdict."""
    verdict = QemuImg.check(path)
    assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text
