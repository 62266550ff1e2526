# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests that run the daemon as its users do.

``BLOCKEMU_E2E_SERVER=qemu-nbd`` runs the client tests against qemu-nbd instead: a test that fails
there is wrong itself.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.blockemu import BlockemuDaemon
from tests.peers.certificates import Pki, make_pki
from tests.peers.process import ServerProcess
from tests.peers.qemu import QemuNbd

Serve = Callable[..., ServerProcess]


def _stand_in() -> str | None:
    return os.environ.get("BLOCKEMU_E2E_SERVER") or None


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Certificates for servers and clients."""
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def only_ours() -> None:
    """For tests of what only blockemu promises."""
    if _stand_in() is not None:
        pytest.skip("not a test for the stand-in server")


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder with a short name: a unix socket's path has 107 bytes, pytest's may be longer."""
    folder = Path(tempfile.mkdtemp(prefix="bemu-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def socket_path(run_dir: Path) -> Path:
    """Where the server of this test listens."""
    return run_dir / "nbd.sock"


def make_server(
    image: Path,
    *,
    fmt: str,
    socket_path: Path,
    cache: str | None = None,
    aio: str | None = None,
    read_only: bool = False,
) -> ServerProcess:
    """A server of one image as export "disk", to be used with `with`."""
    if _stand_in() == "qemu-nbd":
        return QemuNbd(image, fmt=fmt, socket_path=socket_path, export="disk", read_only=read_only)
    return BlockemuDaemon(
        image,
        fmt=fmt,
        socket_path=socket_path,
        export="disk",
        cache=cache,
        aio=aio,
        read_only=read_only,
    )


@pytest.fixture
def serve(socket_path: Path) -> Serve:
    """`serve(image, fmt=...)`: `make_server` on this test's socket path."""
    return functools.partial(make_server, socket_path=socket_path)


@pytest.fixture
def random_seed(seed: int) -> int:
    """The seed of a randomised test: the run's, or BLOCKEMU_SEED; printed first."""
    chosen = int(os.environ.get("BLOCKEMU_SEED", seed))
    print(f"seed {chosen}: replay with BLOCKEMU_SEED={chosen}")
    return chosen


def takes_direct_io(folder: Path) -> bool:
    """Whether files in `folder` can be opened with O_DIRECT."""
    probe = folder / "direct-probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


@pytest.fixture
def direct_dir(tmp_path: Path) -> Path:
    """A folder on a filesystem that takes O_DIRECT."""
    if not takes_direct_io(tmp_path):
        pytest.skip(f"the filesystem of {tmp_path} doesn't take O_DIRECT")
    return tmp_path


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """On the kind of filesystem that the test's parameter says."""
    where, cache = request.param
    if cache == "direct" and not takes_direct_io(tmp_path):
        pytest.skip(f"the filesystem of {tmp_path} doesn't take O_DIRECT")
    if where == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)
