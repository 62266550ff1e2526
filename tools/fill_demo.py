# SPDX-License-Identifier: Apache-2.0
"""Write something that can be seen into the demo image: `tools/fill_demo.py IMAGE`.

The first line of the disk is a greeting in plain text. From there on it is an ext4 filesystem with
this project's README, where mke2fs is installed (ext4 leaves its first KiB alone, so both fit).
The script is also the shortest example of opening an image without the daemon.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.host_file import PosixFiles

GREETING = b"Hello from blockemu: these bytes are read from a qcow2 image, over NBD.\n"
BOOT_SECTOR_BYTES = 1024
CHUNK_BYTES = 64 * 1024
REPOSITORY = Path(__file__).resolve().parent.parent


def filesystem(folder: Path, length_bytes: int) -> Path:
    """A sparse file in `folder` of a disk's length: the greeting, and an ext4 where we can."""
    disk = folder / "disk.raw"
    with disk.open("wb") as stream:
        stream.truncate(length_bytes)
    mke2fs = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if mke2fs is not None:
        content = folder / "content"
        content.mkdir()
        shutil.copy(REPOSITORY / "README.md", content)
        options = ["-q", "-F", "-t", "ext4", "-L", "demo", "-m", "0", "-d", str(content)]
        subprocess.run([mke2fs, *options, str(disk)], check=True, stdin=subprocess.DEVNULL)
    with disk.open("r+b") as stream:
        stream.write(GREETING.ljust(BOOT_SECTOR_BYTES, b"\0"))
    return disk


async def copy(source: Path, backend: BlockBackend) -> None:
    """Write what isn't zero in `source` to the disk behind `backend`."""
    with source.open("rb") as stream:
        offset = 0
        while chunk := stream.read(CHUNK_BYTES):
            if any(chunk):
                await backend.pwritev(offset, memoryview(bytearray(chunk)))
            offset += len(chunk)
    await backend.flush()


async def fill(image: str, ctx: AioContext) -> None:
    """Open `image`, fill it, close it."""
    opener = Opener(files=PosixFiles(), ctx=ctx)
    node = await opener.open_image(image, fmt="qcow2", read_only=False, direct=False, aio="threads")
    backend = BlockBackend("demo", node, writable=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            await copy(filesystem(Path(folder), backend.length_bytes), backend)
    finally:
        await backend.close()


def main() -> None:
    """Fill the image that the command line names."""
    ctx = AioContext("main")
    try:
        ctx.run(fill(sys.argv[1], ctx))
    finally:
        ctx.close()


if __name__ == "__main__":
    main()
