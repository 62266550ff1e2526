# SPDX-License-Identifier: Apache-2.0
"""What a guest is made of: Debian's kernel and a few of its programs, unpacked but not installed.

`python -m tests.guest.packages` fetches them, as `tools/bootstrap test` does: 35 MB of packages, of
which the machine's own package manager is neither told nor asked to run anything. They come to lie
in build/guest/root, and stay there until that folder is removed.

Nothing of the guest is the host's: its libraries are those that its programs were built for,
whatever this machine runs. A package's dependencies are followed only to other libraries; what else
it wants (debconf) is for installing it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAMS = ("busybox-static", "e2fsprogs", "nbd-client")
KERNEL = "linux-image-cloud-amd64"  # depends on the package of the newest kernel's version
FOLDER = Path(__file__).parents[2] / "build" / "guest"
ROOT = FOLDER / "root"
# What makes an unpacked tree a complete one, and of today's list.
STAMP = ROOT / "packages"
WANTED = " ".join((KERNEL, *PROGRAMS)) + "\n"
DEPENDS = re.compile(r"^ *(?:Pre)?Depends: ([^<\s]+)$", re.MULTILINE)
APT_TIMEOUT_S = 300


class NoPackages(Exception):
    """They can't be had here; the message says why."""


def are_here() -> bool:
    """Whether build/guest has them."""
    return STAMP.exists() and STAMP.read_text() == WANTED


def fetch() -> None:
    """Bring them into build/guest.

    Raises: NoPackages.
    """
    if os.uname().machine != "x86_64":
        raise NoPackages(f"{KERNEL} is for x86_64, not for {os.uname().machine}")
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(program) is None:
            raise NoPackages(f"{program} isn't here: the guest is made of Debian's packages")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="fetching-") as made:
        debs, root = Path(made, "debs"), Path(made, "root")
        debs.mkdir()
        _download(debs)
        for deb in sorted(debs.glob("*.deb")):
            _run(["dpkg-deb", "-x", deb.name, str(root)], folder=debs)
        (root / STAMP.name).write_text(WANTED)
        if ROOT.exists():
            shutil.rmtree(ROOT)
        root.rename(ROOT)


def _download(folder: Path) -> None:
    try:
        _run(["apt-get", "-q", "download", *_names()], folder=folder)
    except NoPackages:  # a machine's package lists may be older than what its mirror has, or absent
        if os.geteuid() != 0:
            raise
        _run(["apt-get", "-q", "update"], folder=folder)
        _run(["apt-get", "-q", "download", *_names()], folder=folder)


def _names() -> list[str]:
    """The packages to download, libraries included."""
    kernels = [name for name in _depends([KERNEL]) if name.startswith("linux-image-")]
    if not kernels:
        raise NoPackages(f"apt knows no {KERNEL}")
    found = set(PROGRAMS)
    fresh = list(PROGRAMS)
    while fresh:
        fresh = [name for name in _depends(fresh) if name.startswith("lib") and name not in found]
        found.update(fresh)
    return [*kernels, *sorted(found)]


def _depends(names: list[str]) -> list[str]:
    less = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks")]
    less += ["--no-replaces", "--no-enhances"]
    listing = _run(["apt-cache", "depends", *less, *names], folder=FOLDER)
    return sorted(set(DEPENDS.findall(listing)))


def _run(command: list[str], *, folder: Path) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=APT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoPackages(f"{' '.join(command[:3])} took over {APT_TIMEOUT_S} s") from None
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise NoPackages(f"{' '.join(command[:3])} exited with {done.returncode}: {said}")
    return done.stdout


if __name__ == "__main__":
    if not are_here():
        try:
            fetch()
        except NoPackages as none:
            sys.exit(f"no packages for the guest: {none}")
