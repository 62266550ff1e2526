# SPDX-License-Identifier: Apache-2.0
"""Python's libnbd binding, also inside a virtual environment.

The binding comes with the distribution (``python3-libnbd``) and not from PyPI, so a virtual
environment doesn't see it. It consists of two files; links to just these two go into a folder on
the path, so that none of the distribution's other packages come along. The extension module fits
only the minor version of Python that it was built for.
"""

from __future__ import annotations

import glob
import importlib
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from tests.peers.requirement import give_up

DISTRIBUTION = "/usr/lib/python3*/dist-packages", "/usr/lib*/python3*/site-packages"


NOBODY = 65534


@contextmanager
def home_with(credentials: Path | None) -> Iterator[tuple[Path | None, int | None]]:
    """A home where libnbd looks for certificates when nobody says where they are, and the user
    whose it is, if it can't be the one who runs the tests; None for what needs no change.

    For root libnbd looks in /etc, and nowhere else.
    """
    if credentials is None:
        yield None, None
        return
    user = NOBODY if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="bemu-") as folder:
        home = Path(folder)
        shutil.copytree(credentials, home / ".pki" / "libnbd")
        if user is not None:
            for path in (home, *home.rglob("*")):
                os.chown(path, user, -1)
        yield home, user


def _binding_files() -> list[Path]:
    """The binding's two files for this interpreter, or nothing."""
    for pattern in DISTRIBUTION:
        for folder in glob.glob(pattern):
            module = Path(folder, "nbd.py")
            for suffix in importlib.machinery.EXTENSION_SUFFIXES:
                extension = Path(folder, f"libnbdmod{suffix}")
                if module.exists() and extension.exists():
                    return [module, extension]
    return []


def require_libnbd() -> ModuleType:
    """The module ``nbd``; without one for this Python, the test is skipped, or fails in CI."""
    if importlib.util.find_spec("nbd") is None:
        files = _binding_files()
        if not files:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            give_up(
                f"libnbd's binding for Python {version} isn't here: apt-get install python3-libnbd"
            )
        folder = Path(tempfile.mkdtemp(prefix="libnbd-"))
        for file in files:
            (folder / file.name).symlink_to(file)
        sys.path.append(str(folder))
    return importlib.import_module("nbd")
