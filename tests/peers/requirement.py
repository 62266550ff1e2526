# SPDX-License-Identifier: Apache-2.0
"""What a test needs of the machine, asked for in one place.

A peer is a program (or a Python module) that isn't ours and that a test runs against our daemon.
On a developer's machine a missing one is a skip that says which package to install; in CI
(`CI=true`) it is a failure, for there a skip would mean that nobody runs the test at all.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import NoReturn

import pytest

# The peer's program, and the Debian package that brings it.
PROGRAMS = {
    "fio": "fio",
    "fusermount3": "fuse3",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdkit": "nbdkit",
    "openssl": "openssl",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-system-x86_64": "qemu-system-x86",
    "socat": "socat",
}
# The peer's Python modules, and their Debian package, which `tools/bootstrap` links into the venv.
MODULES = {"nbd": "python3-libnbd", "nbdsh": "python3-libnbd"}


def in_ci() -> bool:
    """Whether a missing peer is a failure here."""
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def require_peer(name: str) -> str:
    """The path of the program (or of the Python module) `name`; without it the test ends here.

    Raises: pytest's Skipped, or Failed in CI, with the command that installs the peer.
    """
    path = _module_path(name) if name in MODULES else shutil.which(name)
    if path is not None:
        return path
    package = PROGRAMS.get(name) or MODULES.get(name) or name
    give_up(f"{name} is not installed: run `make test`, or `apt-get install {package}`")


def require_root() -> None:
    """Go on only as root; otherwise the test ends here."""
    if os.geteuid() != 0:
        give_up("needs root: run the tests with sudo")


def give_up(reason: str) -> NoReturn:
    """End the test: skipped with its reason, failed in CI."""
    if in_ci():
        pytest.fail(f"{reason} (a skip elsewhere, a failure in CI)", pytrace=False)
    pytest.skip(reason)


def _module_path(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return spec.origin if spec is not None else None
