# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests with virtual machines: what they boot, and one that many tests share."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guest import files, packages
from tests.guest.machine import QEMU, Guest
from tests.peers.requirement import give_up, require_peer

Boot = Callable[..., Guest]


@pytest.fixture(scope="session")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every guest boots from, beside the kernel."""
    if os.uname().machine != "x86_64":
        pytest.skip(f"Debian's kernel for guests is for x86_64, not for {os.uname().machine}")
    require_peer(QEMU)
    if not packages.are_here():
        give_up("the guest's packages aren't here: run `tools/bootstrap test`, it says why")
    path = tmp_path_factory.mktemp("guest") / "initrd"
    path.write_bytes(files.initramfs())
    return path


@pytest.fixture(scope="session")
def boot(initrd: Path) -> Boot:
    """`boot(drives=..., root=...)`: a Guest for a `with`."""
    consoles = (initrd.with_name(f"console-{number}") for number in itertools.count())

    def make(*, drives: tuple[str, ...] = (), root: str | None = None) -> Guest:
        return Guest(
            kernel=files.kernel(), initrd=initrd, console=next(consoles), drives=drives, root=root
        )

    return make


class Room:
    """One guest for many tests; another takes the place of one that hangs or has died."""

    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._stack = ExitStack()
        self._guest: Guest | None = None

    def guest(self) -> Guest:
        """A guest that does what it is told."""
        if self._guest is None or not self._guest.usable:
            self.close()
            self._guest = self._stack.enter_context(self._boot())
        return self._guest

    def close(self) -> None:
        """Cut its power."""
        self._stack.close()
        self._guest = None


@pytest.fixture(scope="module")
def room(boot: Boot) -> Iterator[Room]:
    """The guest of a module's tests."""
    made = Room(boot)
    yield made
    made.close()


@pytest.fixture
def guest(room: Room) -> Guest:
    """A guest without disks that others may have used before; booting takes seconds."""
    return room.guest()
