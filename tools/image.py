# SPDX-License-Identifier: Apache-2.0
"""Build the container image (`image.py build`), and run the daemon from it (`image.py test`).

Where a Docker or Podman engine answers, it builds and runs. Where none does, as in many CI runners,
buildah needs neither a daemon nor namespaces: `--isolation chroot` with vfs storage. The base image
is then no download from an image registry but a debootstrap root of this machine's own
distribution, from this machine's own apt mirror, with its pip configuration mounted read-only while
the image is built: what works here without an image works in it. All of that lies in build/image/.

Needs root only for buildah; takes about two minutes there, half of it the first time only.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
WORK = REPOSITORY / "build" / "image"
IMAGE = "localhost/blockemu"
BASE = "localhost/blockemu-base"
DAEMON_UID = 10809  # as the Dockerfile says
BUILD_TIMEOUT_S = 900
CLIENT_TIMEOUT_S = 60
PATTERN = 0x5A
# Not /images: buildah puts the volume of the image over what is mounted there by hand.
INSIDE = "/disks"
DISK_BYTES = 64 * 1024 * 1024


class ImageTestFailed(Exception):
    """The image was built, but the daemon in it doesn't do what it should."""


def run(command: Sequence[str | Path], *, timeout_s: float = BUILD_TIMEOUT_S) -> None:
    """Run a command, its output being ours."""
    print("+", *command, flush=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=timeout_s)


def answer(command: Sequence[str | Path], *, timeout_s: float = CLIENT_TIMEOUT_S) -> str:
    """Run a command; what it printed."""
    return subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        timeout=timeout_s,
    ).stdout.strip()  # fmt: skip


def works(command: Sequence[str]) -> bool:
    """Whether the command exists and exits with 0."""
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=CLIENT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class Engine:
    """Docker or Podman: a client of something that builds and runs."""

    def __init__(self, program: str) -> None:
        self.program = program

    def build(self) -> None:
        """Build IMAGE from the Dockerfile, on its default base."""
        run([self.program, "build", "-t", IMAGE, REPOSITORY])

    def daemon(self, folder: Path, arguments: Sequence[str]) -> list[str]:
        """The command that runs the image's entry point with `folder` as INSIDE."""
        return [self.program, "run", "--rm", "-v", f"{folder}:{INSIDE}", IMAGE, *arguments]


class Buildah:
    """Builds and runs without an engine, in a chroot."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise SystemExit("image: no Docker or Podman engine, and buildah needs root: use sudo")
        packages = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
        if packages:
            run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages])
        storage: list[str | Path] = ["--root", WORK / "storage", "--runroot", WORK / "run"]
        self.buildah: list[str | Path] = ["buildah", *storage, "--storage-driver", "vfs"]
        self.container: str | None = None

    def build(self) -> None:
        """Build IMAGE from the Dockerfile, on a debootstrap root."""
        self._make_base()
        command = [*self.buildah, "build", "--isolation", "chroot", "--build-arg", f"BASE={BASE}"]
        for mount in pip_mounts():
            command += ["--volume", f"{mount}:ro"]
        run([*command, "-t", IMAGE, REPOSITORY])

    def _make_base(self) -> None:
        if works([*map(str, self.buildah), "inspect", "--type", "image", BASE]):
            return
        root = WORK / "base"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        suite = os_release()["VERSION_CODENAME"]
        sources = apt_sources(suite)
        mirror = next(uri for uri, release, _ in sources if release == suite)
        run(["debootstrap", "--variant=minbase", suite, root, mirror])
        lines = [f"deb {uri} {release} {component}\n" for uri, release, component in sources]
        (root / "etc/apt/sources.list").write_text("".join(lines))
        (root / "etc/apt/apt.conf.d/proxy").write_text(apt_proxies())
        shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)
        container = answer([*self.buildah, "from", "scratch"])
        run([*self.buildah, "add", "--quiet", container, root, "/"])
        run([*self.buildah, "commit", "--quiet", "--rm", container, BASE])
        shutil.rmtree(root)

    def daemon(self, folder: Path, arguments: Sequence[str]) -> list[str]:
        """The command that runs the image's entry point with `folder` as INSIDE."""
        if self.container is None:
            self.container = answer([*self.buildah, "from", "--pull-never", IMAGE])
        found = json.loads(answer([*self.buildah, "inspect", "--type", "image", IMAGE]))
        entry_point = found["OCIv1"]["config"]["Entrypoint"]
        command = [*self.buildah, "run", "--isolation", "chroot", "--volume", f"{folder}:{INSIDE}"]
        return [*map(str, command), self.container, "--", *entry_point, *arguments]

    def remove_container(self) -> None:
        """Forget the container that daemon() made."""
        if self.container is not None:
            run([*self.buildah, "rm", self.container])
            self.container = None


def os_release() -> dict[str, str]:
    """The fields of /etc/os-release."""
    fields = {}
    for line in Path("/etc/os-release").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals:
            fields[key] = value.strip('"')
    return fields


def apt_sources(suite: str) -> list[tuple[str, str, str]]:
    """This machine's own sources of its own distribution: (URI, release, component)."""
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    listed = answer(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
         "Identifier: Packages"]
    )  # fmt: skip
    sources = {tuple(line.split()) for line in listed.splitlines()}
    return sorted(
        (uri, release, component)
        for uri, release, component in (words for words in sources if len(words) == 3)
        if release in wanted and component in ("main", "universe")
    )


def apt_proxies() -> str:
    """This machine's apt proxies, in apt.conf's words."""
    lines = answer(["apt-config", "dump"]).splitlines()
    return "".join(f"{line}\n" for line in lines if "::proxy" in line.lower())


def pip_mounts() -> list[str]:
    """What pip in the build needs to find what pip here finds, as SOURCE:TARGET.

    Its settings as one file, the folders that they name, and the files that they name. These are
    copies under other names: a package in the build may rewrite the certificates of the usual name,
    and through a mount it would rewrite ours.
    """
    settings: dict[str, str] = {}
    for line in answer([sys.executable, "-m", "pip", "config", "list"]).splitlines():
        name, equals, value = line.partition("=")
        if equals:
            settings[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    mounts = []
    for name, value in settings.items():
        for word in value.split():
            folder = Path(word.removeprefix("file://"))
            if name.endswith("index-url"):
                folder = folder.parent  # an index links to files beside its own folder
            if folder.is_absolute() and folder.is_dir() and folder != Path("/"):
                mounts.append(f"{folder}:{folder}")
    WORK.mkdir(parents=True, exist_ok=True)
    for name, value in settings.items():
        words = value.split()
        for index, word in enumerate(words):
            if Path(word).is_absolute() and Path(word).is_file():
                copy = WORK / f"pip-{name}-{index}{Path(word).suffix}"
                shutil.copyfile(word, copy)
                words[index] = f"/etc/{copy.name}"
                mounts.append(f"{copy}:{words[index]}")
        settings[name] = " ".join(words)
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    (WORK / "pip.conf").write_text("".join(["[global]\n", *lines]))
    return [*mounts, f"{WORK / 'pip.conf'}:/etc/pip.conf"]


def choose() -> Engine | Buildah:
    """The engine that answers, else buildah."""
    for program in ("docker", "podman"):
        if works([program, "info"]):
            return Engine(program)
    return Buildah()


@contextlib.contextmanager
def served(engine: Engine | Buildah, folder: Path) -> Iterator[tuple[str, int]]:
    """The daemon running from the image on `folder`/disk.qcow2: its URI, and its user's id.

    It has said that it is ready; leaving the context stops it with SIGTERM.
    """
    arguments = ["serve", f"{INSIDE}/disk.qcow2", "-f", "qcow2", "--socket", f"{INSIDE}/nbd.sock"]
    command = engine.daemon(folder, arguments)
    print("+", *command, flush=True)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    pid = 0
    try:
        assert server.stdout is not None
        readable, _, _ = select.select([server.stdout], [], [], CLIENT_TIMEOUT_S)
        ready = server.stdout.readline() if readable else ""
        if not ready:
            raise ImageTestFailed("the daemon didn't say that it is ready")
        print(ready, end="", flush=True)
        pid, uid = listener_of(folder / "nbd.sock")
        yield f"nbd+unix:///?socket={folder / 'nbd.sock'}", uid
        # The daemon itself: not every engine's client passes signals on.
        os.kill(pid, signal.SIGTERM)
        code = server.wait(CLIENT_TIMEOUT_S)
        if code != 0:
            raise ImageTestFailed(f"the daemon exited with {code} after SIGTERM, not with 0")
    finally:
        if server.poll() is None and pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it would outlive buildah's client
        server.kill()
        server.wait()


def listener_of(path: Path) -> tuple[int, int]:
    """The process and the user that listen on a unix socket (SO_PEERCRED of unix(7))."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(CLIENT_TIMEOUT_S)
        client.connect(str(path))
        credentials = struct.Struct("=iII")
        raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
        pid, uid, _ = credentials.unpack(raw)
        return pid, uid


def test(engine: Engine | Buildah) -> None:
    """Clients of this machine read from the daemon in the image what was written to its disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)  # the daemon's user makes the disk and the socket in it
        create = ["img", "create", "-f", "qcow2", f"{INSIDE}/disk.qcow2", str(DISK_BYTES)]
        run(engine.daemon(folder, create), timeout_s=CLIENT_TIMEOUT_S)
        write = f"write -P {PATTERN} 1M 64k"
        run(["qemu-io", "-f", "qcow2", "-c", write, folder / "disk.qcow2"])
        with served(engine, folder) as (uri, uid):
            if uid != DAEMON_UID:
                raise ImageTestFailed(f"the daemon runs as user {uid}, not as {DAEMON_UID}")
            size = answer(["nbdinfo", "--size", uri])
            if size != str(DISK_BYTES):
                raise ImageTestFailed(f"nbdinfo sees {size} bytes, not {DISK_BYTES}")
            read = ["-c", f"read -P {PATTERN} 1M 64k", "-c", "read -P 0 2M 64k"]
            run(["qemu-io", "-r", "-f", "raw", *read, uri], timeout_s=CLIENT_TIMEOUT_S)
        run(["qemu-img", "check", "-f", "qcow2", folder / "disk.qcow2"])


def main() -> None:
    """Do what the command line says."""
    goals = {"build": False, "test": True}
    if sys.argv[1:] not in ([goal] for goal in goals):
        raise SystemExit("usage: image.py build|test")
    engine = choose()
    try:
        engine.build()
        if goals[sys.argv[1]]:
            test(engine)
            print("image-test: the daemon in the image was read by nbdinfo and qemu-io")
    except (subprocess.SubprocessError, ImageTestFailed) as error:
        raise SystemExit(f"image: {error}") from None
    finally:
        if isinstance(engine, Buildah):
            engine.remove_container()


if __name__ == "__main__":
    main()
