# SPDX-License-Identifier: Apache-2.0
"""blockemu img and qemu-img on the same images: both called alike, and a zoo of images to call on.

The zoo's images are made by QEMU's tools and only read. Each has what its format can hold: data,
zero clusters, compressed clusters, discarded ones, holes.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from blockemu.cli import main
from tests.peers.qemu import run_tool


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def ours(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> Outcome:
    """`blockemu img ...`, in this process, as the console script runs it."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["img", *(str(argument) for argument in arguments)])
    output = capfd.readouterr()
    assert "internal error" not in output.err, output.err
    assert isinstance(caught.value.code, int)
    return Outcome(caught.value.code, output.out, output.err)


def theirs(*arguments: str | Path) -> Outcome:
    """`qemu-img ...`."""
    result = run_tool(["qemu-img", *arguments], check=False)
    return Outcome(result.code, result.stdout, result.stderr)


def our_output(*arguments: str | Path) -> str:
    """`blockemu img ...`, which must succeed; its stdout."""
    from blockemu.cli import cli

    words = ["img", *(str(argument) for argument in arguments)]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@contextmanager
def held_by_qemu(path: Path) -> Iterator[None]:
    """Inside, a qemu-io has the qcow2 image at `path` open for writing."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        while b"iB" not in user.stdout.readline():
            pass
        try:
            yield
        finally:
            user.communicate(b"quit\n")


class Animal(NamedTuple):
    """One image of the zoo."""

    path: Path
    fmt: str


def random_bytes(seed: int, length: int) -> bytes:
    """The same for the same seed."""
    return random.Random(seed).randbytes(length)


def make_zoo(folder: Path) -> dict[str, Animal]:
    """All images, by name."""
    zoo = {
        "raw-sparse": _raw(folder / "sparse.raw", [(65536, 9000), (1 << 20, 300_000)], 3 << 20),
        "raw-full": _raw(folder / "full.raw", [(0, 200_704)], 200_704),
        "raw-odd-data": _raw(folder / "odd.raw", [(0, 1000)], 1000),
        "raw-odd-hole": _raw(folder / "odd-hole.raw", [(0, 4096)], 70_001),
        "raw-hole": _raw(folder / "hole.raw", [], 1 << 20),
        "raw-tiny": _raw(folder / "tiny.raw", [], 300),
        "raw-empty": _raw(folder / "empty.raw", [], 0),
    }
    for cluster, compat in ((512, "1.1"), (4096, "0.10"), (65536, "0.10"), (65536, "1.1")):
        name = f"qcow2-{cluster}-{compat}"
        zoo[name] = _qcow2(folder / f"{name}.qcow2", cluster, compat)
    zoo["qcow2-2M"] = _qcow2(folder / "2M.qcow2", 2 << 20, "1.1")
    zoo["qcow2-new"] = Animal(_create(folder / "new.qcow2", "10M"), "qcow2")
    zoo["qcow2-empty"] = Animal(_create(folder / "empty.qcow2", "0"), "qcow2")
    zoo["qcow2-huge"] = Animal(_create(folder / "huge.qcow2", "1T"), "qcow2")
    zoo["qcow2-packed"] = _packed(folder, zoo["raw-sparse"])
    zoo |= _preallocated(folder)
    zoo |= _subclusters(folder)
    zoo |= _chain(folder)
    return zoo


def _raw(path: Path, pieces: list[tuple[int, int]], length: int) -> Animal:
    with path.open("wb") as file:
        for offset, count in pieces:
            file.seek(offset)
            file.write(random_bytes(offset, count))
        file.truncate(length)
    return Animal(path, "raw")


def _create(path: Path, size: str, *options: str) -> Path:
    run_tool(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size])
    return path


def _io(path: Path, *commands: str) -> None:
    words: list[str | Path] = ["qemu-io", "-f", "qcow2"]
    for command in commands:
        words += ["-c", command]
    run_tool([*words, path])


def _qcow2(path: Path, cluster: int, compat: str) -> Animal:
    _create(path, str(12 * cluster + 1024), "-o", f"cluster_size={cluster},compat={compat}")
    _io(
        path,
        f"write -P 1 0 {2 * cluster}",
        f"write -P 2 {3 * cluster} {cluster}",
        f"write -c -P 3 {5 * cluster} {cluster}",
        f"write -P 4 {7 * cluster} {3 * cluster}",
        f"write -z {8 * cluster} {cluster}",
        f"write -z -u {10 * cluster} {cluster}",
        f"discard {9 * cluster} {cluster}",
        f"write -P 5 {12 * cluster} 512",
    )
    return Animal(path, "qcow2")


def _packed(folder: Path, source: Animal) -> Animal:
    path = folder / "packed.qcow2"
    run_tool(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source.path, path])
    return Animal(path, "qcow2")


def _preallocated(folder: Path) -> dict[str, Animal]:
    """All clusters are there; of those with preallocation=metadata, most are holes in the file."""
    zoo = {}
    for mode in ("metadata", "falloc"):
        name = f"qcow2-{mode}"
        path = _create(folder / f"{name}.qcow2", "4M", "-o", f"preallocation={mode}")
        _io(path, "write -P 1 1M 100k", "write -P 2 2M 512", "write -z 3M 64k")
        zoo[name] = Animal(path, "qcow2")
    return zoo


def _subclusters(folder: Path) -> dict[str, Animal]:
    """Extended L2 entries: clusters of which something is allocated, zero, and not there at all;
    alone, preallocated, and over another such image."""
    zoo = {}
    for name, options in (
        ("alone", "cluster_size=16k"),
        ("preallocated", "preallocation=metadata"),
        ("over", "cluster_size=128k"),
    ):
        path = folder / f"subclusters-{name}.qcow2"
        below = ("-b", "subclusters-alone.qcow2", "-F", "qcow2") if name == "over" else ()
        _create(path, "3M", "-o", f"extended_l2=on,{options}", *below)
        _io(
            path,
            "write -P 1 10k 100k",
            "write -P 2 700k 3k",
            "write -z 44k 20k",
            "write -z -u 256k 70k",
            "write -P 3 290k 512",
            # Nothing is compressed over what has a place already.
            f"write {'' if name == 'preallocated' else '-c'} -P 4 512k 128k",
            "write -z 520k 4k",
            "discard 64k 16k",
            "write -P 5 2M 400k",
            "write -P 6 3071k 1k",
        )
        zoo[f"subclusters-{name}"] = Animal(path, "qcow2")
    return zoo


def _chain(folder: Path) -> dict[str, Animal]:
    """base <- middle <- top, each longer than the one below; and one over a raw image."""
    base, middle, top = (folder / f"{name}.qcow2" for name in ("base", "middle", "top"))
    _create(base, "1M")
    _io(base, "write -P 1 0 64k", "write -P 2 128k 4k", "write -P 3 768k 64k")
    _create(middle, "2M", "-b", base.name, "-F", "qcow2", "-o", "cluster_size=4k")
    _io(middle, "write -P 4 64k 64k", "write -z 256k 64k", "write -c -P 5 512k 4k")
    _create(top, "3M", "-b", middle.name, "-F", "qcow2")
    _io(top, "write -P 6 1M 64k", "write -z 0 64k")
    over_raw = folder / "over-raw.qcow2"
    _create(over_raw, "5M", "-b", "sparse.raw", "-F", "raw")
    _io(over_raw, "write -P 7 64k 64k", "write -P 8 4M 4k")
    return {
        "chain": Animal(top, "qcow2"),
        "chain-over-raw": Animal(over_raw, "qcow2"),
    }


ZOO = (
    *("raw-sparse", "raw-full", "raw-odd-data", "raw-odd-hole", "raw-hole", "raw-tiny"),
    *("raw-empty", "qcow2-512-1.1", "qcow2-4096-0.10", "qcow2-65536-0.10", "qcow2-65536-1.1"),
    *("qcow2-2M", "qcow2-new", "qcow2-empty", "qcow2-huge", "qcow2-packed", "chain"),
    *("chain-over-raw", "qcow2-metadata", "qcow2-falloc"),
    *("subclusters-alone", "subclusters-preallocated", "subclusters-over"),
)
"""The names in `make_zoo`, for parameters of tests."""
