# SPDX-License-Identifier: Apache-2.0
"""Images in memory, opened through the real graph: file node below, qcow2 node on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockemu.drivers._direct_map import ffi, lib
from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.driver import RequestFlags
from blockemu.drivers.native_map import NativeMap
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.qcow2.create import create
from blockemu.drivers.qcow2.create_options import CreateOptions
from blockemu.drivers.qcow2.driver import Qcow2Driver
from blockemu.drivers.qcow2.guest_compress import Job, Stored
from blockemu.drivers.qcow2.header import first_cluster_bytes, parse
from blockemu.drivers.qcow2.header_rewrite import with_data_file
from blockemu.drivers.registry import Opener
from blockemu.loop.aio_context import AioContext
from blockemu.loop.file_engine import NativeIo, NativeKind
from blockemu.loop.host_file import HostFile
from blockemu.loop.memory_file import MemoryFiles, MemoryImage
from blockemu.loop.sync import sleep_ns
from tests.peers.qemu import QemuImg
from tests.unit.drivers.native_poller import FakePoller

KIB = 1024
MIB = 1024 * KIB


class Images:
    """A disk full of images. Everything runs in `ctx`, which the test drives."""

    def __init__(self, ctx: AioContext) -> None:
        self.ctx = ctx
        self.files = MemoryFiles()
        self.opener = Opener(files=self.files, ctx=ctx)

    def __getitem__(self, path: str) -> MemoryImage:
        return self.files.images[path]

    def create(self, path: str, size: int, **options: Any) -> MemoryImage:
        """A new image, made by our own `create`, and its `data_file`, a name in this folder."""
        image = self.files.add(path)
        data_path = options.get("data_file")
        if data_path is not None:
            self.files.add(data_path)

        async def make() -> None:
            node = await self.opener.open({"driver": "file", "filename": path})
            backend = BlockBackend(path, node, writable=True)
            data = holder = None
            if data_path is not None:
                data = await self.opener.open({"driver": "file", "filename": data_path})
                holder = BlockBackend(data_path, data, writable=True)
            await create(node, path, CreateOptions.parse(path, size, options), data=data)
            await backend.close()
            if holder is not None:
                await holder.close()

        self.ctx.run(make())
        image.log.clear()
        return image

    def load(self, path: str, source: Path) -> MemoryImage:
        """A copy of a real file."""
        return self.files.add(path, source.read_bytes())

    def open(self, path: str, *, read_only: bool = False, **options: Any) -> Disk:
        """Open with the driver's options, `_` for `-` in their names."""
        direct = options.pop("direct", False)
        tree = {
            "driver": "qcow2",
            "read-only": read_only,
            "file": {"driver": "file", "filename": path, "cache": {"direct": direct}},
            **{key.replace("_", "-"): value for key, value in options.items()},
        }
        node = self.ctx.run(self.opener.open(tree))
        return Disk(self, path, node)

    def check(self, path: str, tmp_path: Path) -> None:
        """qemu-img's verdict: neither corruption nor leak."""
        verdict = QemuImg.check(self.save(path, tmp_path))
        assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text

    def save(self, path: str, tmp_path: Path) -> Path:
        """The image as a real file, its data file beside it.

        QEMU looks for that in the working directory; here, the header says where it is."""
        target = tmp_path / Path(path).name
        content = self[path].content
        header = parse(path, bytes(content[: first_cluster_bytes(path, content)]))
        if header.data_file is not None:
            data = tmp_path / header.data_file
            data.write_bytes(self[header.data_file].content)
            header = with_data_file(header, str(data))
            start = header.serialise(path).ljust(header.cluster_size, b"\0")
            content = bytearray(start) + content[header.cluster_size :]
        target.write_bytes(content)
        return target

    def compare(self, path: str, content: bytes | bytearray, tmp_path: Path) -> None:
        """qemu-img's verdict: the guest sees `content`."""
        raw = tmp_path / "content.raw"
        raw.write_bytes(content)
        QemuImg.compare(self.save(path, tmp_path), raw, one_fmt="qcow2")


async def in_place(job: Job) -> list[Stored]:
    """Compresses without threads: for simulations, where the same seed is to give the same run."""
    return job()


class Twin:
    """Reads a disk by the direct map's twin, as native code does."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._poller = FakePoller()
        file: Any = disk.host_file
        file.native_io = lambda: NativeIo(-1, NativeKind.INLINE, 1, durable=False)
        self.find(0, 1)  # makes the twin

    def find(self, offset: int, length: int, *, writable: bool = False) -> int:
        """Where in the file, or -1."""
        direct_map = self.disk.driver.direct_map()
        if direct_map is None:
            return -1
        native = direct_map.native_handle(self._poller)
        assert native is not None
        return lib.direct_map_find(native.cdata, offset, length, writable)

    def post(self, native: NativeMap) -> None:
        """Tells Python what it waits for, as C would."""
        self._poller.post(native.cdata.token)

    async def read(self, offset: int, length: int, *, latency_ns: int) -> bytes | None:
        """The bytes, or None where Python is to be asked. Suspends: while the read is under way."""
        host = self.find(offset, length)
        if host < 0:
            return None
        direct_map = self.disk.driver.direct_map()
        assert direct_map is not None
        native = direct_map.native
        assert native is not None
        pin = ffi.new("struct map_pin *")
        lib.direct_map_pin(native.cdata, pin)
        await sleep_ns(latency_ns)
        content = self.disk.images[self.disk.path].content[host : host + length]
        if lib.direct_map_unpin(native.cdata, pin):
            self.post(native)
        return bytes(content).ljust(length, b"\0")


class Disk:
    """An open image, called from outside the loop."""

    def __init__(self, images: Images, path: str, node: BlockDriverState) -> None:
        self.images = images
        self.path = path
        self.node = node
        self.ctx = images.ctx

    @property
    def driver(self) -> Qcow2Driver:
        assert isinstance(self.node.driver, Qcow2Driver)
        return self.node.driver

    @property
    def host_file(self) -> HostFile:
        found = self.driver.image.file.host_file
        assert found is not None
        return found

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(b"\xee" * length)
        self.ctx.run(self.node.preadv(offset, memoryview(data)))
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        self.ctx.run(self.node.pwritev(offset, memoryview(data)))

    def write_compressed(self, offset: int, data: bytes) -> None:
        flags = RequestFlags.WRITE_COMPRESSED
        self.ctx.run(self.node.pwritev(offset, memoryview(data), flags))

    def flush(self) -> None:
        self.ctx.run(self.node.flush())

    def close(self) -> None:
        """Flush and close, as a backend does."""

        async def end() -> None:
            await self.node.flush()
            await self.node.close()

        self.ctx.run(end())

    def abandon(self) -> None:
        """As a power cut: nothing more reaches the file. The content stays as it is."""
        image = self.images[self.path]
        kept = MemoryImage(image.content)
        image.fault = lambda kind, offset, length: 5
        self.ctx.run(self.node.close())
        self.images.files.images[self.path] = kept
