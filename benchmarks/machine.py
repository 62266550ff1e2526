# SPDX-License-Identifier: Apache-2.0
"""What the numbers came from: processor, kernel, versions. No host or user names."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAMS = ("fio", "qemu-storage-daemon", "nbdkit", "cc")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 20)


def _version(program: str) -> str:
    if shutil.which(program) is None:
        return "not installed"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"


def filesystem_of(folder: Path) -> str:
    """The type of the filesystem that holds `folder`."""
    best = ("", "unknown")
    resolved = str(folder.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, mount, kind, *_ = line.split()
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def describe_machine(*, cache_dir: Path, direct_dir: Path) -> dict[str, str]:
    """The machine as a flat table."""
    versions = {program: _version(program) for program in PROGRAMS}
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "memory": f"{_memory_mib()} MiB",
        "virtual": "yes" if "hypervisor" in Path("/proc/cpuinfo").read_text() else "no",
        "kernel": platform.release().split("-")[0],
        "python": sys.version.split()[0],
        "page cache images on": filesystem_of(cache_dir),
        "O_DIRECT images on": filesystem_of(direct_dir),
        **versions,
    }
