# SPDX-License-Identifier: Apache-2.0
"""The files of a guest: an initramfs, and a disk to have its root on.

Both are made of the same pieces: busybox, the programs that use block devices, their libraries,
and the two scripts beside this file. The initramfs has the kernel's modules, too: each behind those
that it needs, which it names itself (`depends=` in its section .modinfo).

An initramfs is a cpio archive in the format "newc" (the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst), simple enough to be written here.
"""

from __future__ import annotations

import io
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.guest.packages import ROOT

HERE = Path(__file__).parent
PROGRAMS = ("nbd-client", "mke2fs", "e2fsck")
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "nbd")
FOLDERS = ("bin", "dev", "etc", "lib", "lib64", "mnt", "proc", "root", "sbin", "sys", "tmp")
LIBRARY_FOLDERS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
LOADER = "ld-linux-x86-64.so.2"
MODULE_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
DIRECTORY, REGULAR, LINK = 0o040755, 0o100755, 0o120777


@dataclass(frozen=True, slots=True)
class File:
    """A file to be; a link's data is its target."""

    mode: int
    data: bytes = b""


Tree = dict[str, File]  # by path, without a slash in front; a folder before what is in it


def kernel() -> Path:
    """The kernel, for QEMU's -kernel."""
    (found,) = ROOT.glob("boot/vmlinuz-*")
    return found


def initramfs() -> bytes:
    """The archive for QEMU's -initrd: boots to the agent, or to a disk's."""
    tree = _base() | {"modules": File(DIRECTORY), "init": File(REGULAR, _script("init"))}
    for number, module in enumerate(_modules(MODULES)):
        tree[f"modules/{number:02}-{module.name}"] = File(REGULAR, module.read_bytes())
    return _cpio(tree)


def make_root_disk(path: Path, *, size_bytes: int, folder: Path) -> None:
    """An ext4 file system with the same programs, as a raw image; `folder` is for its files."""
    for name, file in _base().items():
        place = folder / name
        if file.mode == DIRECTORY:
            place.mkdir()
        elif file.mode == LINK:
            place.symlink_to(file.data.decode())
        else:
            place.write_bytes(file.data)
            place.chmod(0o755)
    run_program("mke2fs", "-q", "-t", "ext4", "-d", str(folder), str(path), f"{size_bytes >> 10}k")


def run_program(name: str, *arguments: str) -> str:
    """One of the guest's programs, on the host; what it printed.

    Raises: subprocess.CalledProcessError with what it printed.
    """
    config = {"MKE2FS_CONFIG": str(_unpacked("mke2fs.conf", ("etc",)))}
    command = [*_loader(), str(_program(name)), *arguments]
    done = subprocess.run(
        command,
        env=config,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def _base() -> Tree:
    tree = {folder: File(DIRECTORY) for folder in FOLDERS}
    tree["lib/x86_64-linux-gnu"] = File(DIRECTORY)
    tree["bin/busybox"] = File(REGULAR, _unpacked("busybox", ("bin", "usr/bin")).read_bytes())
    # Applets that are links, so that a disk works without having been booted once.
    for applet in _applets():
        tree[f"bin/{applet}"] = File(LINK, b"busybox")
    for name in PROGRAMS:
        tree[f"sbin/{name}"] = File(REGULAR, _program(name).read_bytes())
    tree["sbin/mkfs.ext4"] = File(LINK, b"mke2fs")
    tree["sbin/agent"] = File(REGULAR, _script("agent"))
    tree["etc/mke2fs.conf"] = File(REGULAR, _unpacked("mke2fs.conf", ("etc",)).read_bytes())
    for library in _libraries():
        tree[f"lib/x86_64-linux-gnu/{library.name}"] = File(REGULAR, library.read_bytes())
    tree[f"lib64/{LOADER}"] = File(REGULAR, _unpacked(LOADER, LIBRARY_FOLDERS).read_bytes())
    return tree


def _script(name: str) -> bytes:
    return (HERE / name).read_bytes()


def _unpacked(name: str, folders: tuple[str, ...]) -> Path:
    for folder in folders:
        if (ROOT / folder / name).is_file():
            return ROOT / folder / name
    raise FileNotFoundError(f"{name} isn't in {ROOT}: its packages lay it elsewhere now")


def _program(name: str) -> Path:
    return _unpacked(name, ("sbin", "usr/sbin"))


def _loader() -> list[str]:
    """The command that runs a program of the guest's with its own libraries."""
    path = ":".join(str(ROOT / folder) for folder in LIBRARY_FOLDERS)
    return [str(_unpacked(LOADER, LIBRARY_FOLDERS)), "--library-path", path]


def _libraries() -> list[Path]:
    """Those that the programs load, each once."""
    found = {}
    for name in PROGRAMS:
        command = [*_loader(), "--list", str(_program(name))]
        listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        for line in listing.stdout.splitlines():
            library, arrow, place = line.strip().partition(" => ")
            if arrow and library != LOADER and "/" not in library:
                found[library] = Path(place.split()[0])
    return list(found.values())


def _applets() -> list[str]:
    busybox = str(_unpacked("busybox", ("bin", "usr/bin")))
    listing = subprocess.run(
        [busybox, "--list"], capture_output=True, text=True, timeout=60, check=True
    )
    return [name for name in listing.stdout.split() if name != "busybox"]


def _modules(names: tuple[str, ...]) -> list[Path]:
    """The modules `names` and those that they need, in an order to load them in."""
    files = {file.stem.replace("-", "_"): file for file in ROOT.glob("**/modules/*/kernel/**/*.ko")}
    found: dict[str, Path] = {}

    def add(name: str) -> None:
        if name not in files:
            raise FileNotFoundError(f"the kernel in {ROOT} has no module {name}")
        depends = MODULE_DEPENDS.search(files[name].read_bytes())
        for other in depends[1].decode().replace("-", "_").split(",") if depends else []:
            if other and other not in found:
                add(other)
        found[name] = files[name]

    for name in names:
        add(name)
    return list(found.values())


def _cpio(tree: Tree) -> bytes:
    archive = io.BytesIO()
    members = [*tree.items(), ("TRAILER!!!", File(0))]
    for number, (path, file) in enumerate(members, start=1):
        name = path.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, 4 of devices, length of the name, checksum
        fields = (number, file.mode, 0, 0, 1, 0, len(file.data), 0, 0, 0, 0, len(name), 0)
        archive.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
        archive.write(bytes(-archive.tell() % 4))
        archive.write(file.data)
        archive.write(bytes(-archive.tell() % 4))
    return archive.getvalue()
