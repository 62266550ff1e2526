# SPDX-License-Identifier: Apache-2.0
"""Opening graphs: from an option tree, from an image's path, from the name in an image's header.

Drivers are found by name: those of this package, those that other packages announce under the entry
point group `blockemu.drivers`, and those that a program registers itself.

**Probing is not trust.** Whoever can write to a raw disk can write a qcow2 header into its first
sector, with a backing file of their choice; a host that probes the format then opens that file for
them. So an image whose format was probed may name no other file: it is refused with a line that
says how to state the format.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Coroutine, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.crypto.offload import Offload, on_thread_pool
from blockemu.drivers.crypto.secrets import SecretTable
from blockemu.drivers.driver import BlockDriver
from blockemu.drivers.errors import ImageError
from blockemu.drivers.metadata_budget import MetadataBudget
from blockemu.drivers.node import DETECT_ZEROES, NESTED_IMAGES_MAX, BlockDriverState
from blockemu.drivers.options import refuse_unknown, take_bool, take_choice, take_str
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import run_on_fresh_stack
from blockemu.loop.entropy import Entropy, system_entropy
from blockemu.loop.host_file import FileEngine

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "blockemu.drivers"

BACKING_DEPTH_MAX = 200
"""Images in one chain. Each is an open file and a few calls per read, which nest only so deep
(`NESTED_IMAGES_MAX`)."""

PROBE_BYTES = 4096
"""Read from the start of an image to tell its format: a qcow2 header and its backing name."""

_BUILT_IN = {
    "file": "blockemu.drivers.file:FileDriver",
    "host_device": "blockemu.drivers.file:HostDeviceDriver",
    "luks": "blockemu.drivers.luks:LuksDriver",
    "null-co": "blockemu.drivers.null:NullDriver",
    "qcow2": "blockemu.drivers.qcow2.driver:Qcow2Driver",
    "raw": "blockemu.drivers.raw:RawDriver",
}

_PROTOCOL_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class DriverTable:
    """Name -> driver class, loaded when first asked for. Instances share nothing."""

    def __init__(self) -> None:
        self._classes: dict[str, type[BlockDriver]] = {}

    def register(self, driver: type[BlockDriver]) -> None:
        """Add a driver of the program's own, or put it in the place of a built-in one."""
        self._classes[driver.name] = driver

    def find(self, name: str) -> type[BlockDriver] | None:
        if name not in self._classes:
            found = self._load(name)
            if found is None:
                return None
            self._classes[name] = found
        return self._classes[name]

    def _load(self, name: str) -> type[BlockDriver] | None:
        if name in _BUILT_IN:
            module, _, attribute = _BUILT_IN[name].partition(":")
            loaded: type[BlockDriver] = getattr(import_module(module), attribute)
            return loaded
        for point in _plugins():
            if point.name == name:
                driver: type[BlockDriver] = point.load()
                return driver
        return None

    def names(self) -> list[str]:
        """All names that `find` knows, sorted."""
        plugins = {point.name for point in _plugins()}
        return sorted(set(_BUILT_IN) | set(self._classes) | plugins)


def _plugins() -> Iterable[EntryPoint]:
    """What other packages announce. Asking for it takes longer than all the rest of a start."""
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINT_GROUP)


class Opener:
    """Opens nodes into one graph. Context: the main context's home thread, `ctx`."""

    def __init__(
        self,
        *,
        files: FileEngine,
        ctx: AioContext,
        drivers: DriverTable | None = None,
        metadata_budget: MetadataBudget | None = None,
        secrets: SecretTable | None = None,
    ) -> None:
        self.files = files
        self.metadata_budget = metadata_budget or MetadataBudget()
        self.secrets = secrets or SecretTable()
        self.node_options: dict[str, dict[str, Any]] = {}
        """What the user says of images besides their names: options of the format's node (and,
        under "file", of the file's), by the file's path."""
        self.offload: Offload = on_thread_pool
        self.entropy: Entropy = system_entropy
        self.ctx = ctx
        self.drivers = drivers or DriverTable()
        self.nodes: dict[str, BlockDriverState] = {}
        self._serial = 0

    # --- by options ---

    async def open(
        self, options: dict[str, Any], *, above: BlockDriverState | None = None
    ) -> BlockDriverState:
        """Open the node that `options` describe, and everything below it.

        Options of every node: `driver`, `node-name` (made up if missing), `read-only`,
        `force-share` and `no-io` (they default to those of the node `above`), `discard` (unmap, the
        default, or ignore) and `detect-zeroes` (off, the default, on or unmap). The rest is the
        driver's.
        Suspends: while images are read. Raises: ImageError; what was opened is closed again.
        """
        options = copy.deepcopy(options)
        driver_name = take_str("options", options, "driver")
        node_name = take_str("options", options, "node-name", None) or self._made_up_name()
        driver_class = self.drivers.find(driver_name)
        if driver_class is None:
            known = ", ".join(self.drivers.names())
            raise ImageError(node_name, f"there is no driver '{driver_name}'; known: {known}")
        if node_name in self.nodes:
            raise ImageError(node_name, "a node of this name exists already")
        read_only = take_bool(
            node_name, options, "read-only", default=above.read_only if above else False
        )
        node = BlockDriverState(node_name, ctx=self.ctx, read_only=read_only)
        node.force_share = take_bool(
            node_name, options, "force-share", default=above.force_share if above else False
        )
        node.no_io = take_bool(node_name, options, "no-io", default=above.no_io if above else False)
        _take_policies(node, options)
        if above is not None:
            node.backing_names = above.backing_names
        await self._open_driver(node, driver_class, options)
        self.nodes[node_name] = node
        node.on_closed = lambda: self.nodes.pop(node_name, None)
        return node

    async def _open_driver(
        self, node: BlockDriverState, driver_class: type[BlockDriver], options: dict[str, Any]
    ) -> None:
        driver: BlockDriver | None = None
        try:
            driver = await driver_class.open(node, options, self)
            node.driver = driver
            refuse_unknown(node.filename or node.node_name, options, driver_class.name)
        except BaseException:
            if driver is not None:
                await driver.close()
            await node.close_children()
            raise

    def _made_up_name(self) -> str:
        self._serial += 1
        return f"#block{self._serial:03d}"

    async def open_child(
        self,
        parent: BlockDriverState,
        name: str,
        options: dict[str, Any] | str | None,
        *,
        role: Role,
        perm: Permission,
        shared: Permission,
    ) -> BdrvChild:
        """Open (or find, when `options` is a node's name) a child and make the edge to it.

        Raises: ImageError.
        """
        if options is None:
            raise ImageError(parent.node_name, f"option '{name}' is missing")
        if isinstance(options, str):
            if options not in self.nodes:
                raise ImageError(parent.node_name, f"'{name}': there is no node '{options}'")
            node = self.nodes[options]
        else:
            node = await self.open(options, above=parent)
        edge = BdrvChild(name, node, parent=parent, role=role, perm=perm, shared=shared)
        try:
            parent.attach_child(edge)
        except BaseException:
            if not node.parents and isinstance(options, dict):
                await node.close()
            raise
        if name == "file" or (role & Role.DATA and parent.filename is None):
            parent.filename = node.filename
            parent.file_options = node.file_options
        return edge

    def file_permissions(self, node: BlockDriverState) -> tuple[Permission, Permission]:
        """`(perm, shared)` that a format node claims on its file: ours alone while we write."""
        shared = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
        perm = Permission.CONSISTENT_READ
        if not node.read_only:
            perm |= Permission.WRITE | Permission.RESIZE
        return perm, shared

    # --- by name ---

    async def open_backing(
        self,
        parent: BlockDriverState,
        *,
        filename: str,
        fmt: str,
        extra: dict[str, Any] | None = None,
    ) -> BdrvChild:
        """Open the backing file that the image of `parent` names, read-only, as its "backing".

        `extra`: options for its format node besides. A relative name is relative to the folder of
        the image that names it.
        Raises: ImageError: missing, unreadable, part of its own chain, or of a kind not known.
        """
        image = parent.filename or parent.node_name
        path = self.resolve_backing(image, filename)
        real = os.path.realpath(path)
        chain = parent.backing_names | {os.path.realpath(image)}
        if real in chain:
            raise ImageError(image, f"its backing file '{filename}' leads back to itself")
        if len(chain) >= BACKING_DEPTH_MAX:
            raise ImageError(image, f"more than {BACKING_DEPTH_MAX} backing files in one chain")
        options = self.image_options(path, fmt, file_options=parent.file_options)
        options |= {"read-only": True, **(extra or {})}
        own_names, parent.backing_names = parent.backing_names, chain
        shared = Permission.ALL & ~(Permission.WRITE | Permission.RESIZE)

        def open_it() -> Coroutine[Any, Any, BdrvChild]:
            return self.open_child(
                parent,
                "backing",
                options,
                role=Role.BACKING,
                perm=Permission.CONSISTENT_READ,
                shared=shared,
            )

        try:
            if len(chain) % NESTED_IMAGES_MAX:
                return await open_it()
            return await run_on_fresh_stack(open_it)
        except ImageError as error:
            if error.name in (path, real):
                reason = f"is the backing file of {image}: {error.reason}"
                raise ImageError(path, reason) from error
            raise
        finally:
            parent.backing_names = own_names

    def resolve_backing(self, image: str, filename: str, *, what: str = "backing file") -> str:
        """The path that an image's header means by `filename`. Raises: ImageError.

        `what`: the file that it is the name of, for messages."""
        prefix = _PROTOCOL_PREFIX.match(filename)
        if prefix is not None and "/" not in prefix.group():
            if prefix.group() == "file:":
                filename = filename[len("file:") :]
            else:
                raise ImageError(image, f"{what} '{filename}': not a kind known here")
        return os.path.join(os.path.dirname(image), filename)

    def image_options(self, path: str, fmt: str, *, file_options: dict[str, Any]) -> dict[str, Any]:
        """The option tree of an image file: a format node over a file node.

        With what `node_options` says of this path.
        """
        own = copy.deepcopy(self.node_options.get(path, {}))
        file = {"driver": "file", "filename": path, **copy.deepcopy(file_options)}
        return {"driver": fmt, **own, "file": file | own.get("file", {})}

    async def open_image(
        self,
        path: str,
        *,
        fmt: str | None,
        read_only: bool,
        direct: bool,
        aio: str,
        node_name: str | None = None,
        force_share: bool = False,
        discard: str = "unmap",
        detect_zeroes: str = "off",
        snapshot: str | None = None,
        no_io: bool = False,
    ) -> BlockDriverState:
        """Open the image at `path` the way the command line does.

        `fmt` None means: probe, and refuse an image that names other files.
        Raises: ImageError.
        """
        if fmt is None:
            fmt = await self.probe(path)
        if self.drivers.find(fmt) is None or fmt in ("file", "host_device"):
            raise ImageError(path, f"there is no image format '{fmt}'")
        options = self.image_options(
            path, fmt, file_options={"aio": aio, "cache": {"direct": direct}}
        )
        options["read-only"] = read_only
        options["force-share"] = force_share
        options["no-io"] = no_io
        options["discard"] = discard
        options["detect-zeroes"] = detect_zeroes
        if node_name is not None:
            options["node-name"] = node_name
        if snapshot is not None:
            options["snapshot"] = snapshot
        return await self.open(options)

    async def probe(self, path: str) -> str:
        """The format of the image at `path`, by its first bytes.

        Raises: ImageError: unreadable, or it names other files, which a probed format may not.
        """
        start = await self._first_bytes(path)
        for fmt in self.drivers.names():
            driver = self.drivers.find(fmt)
            if driver is None or not driver.recognises(start):
                continue
            other = driver.names_other_file(start)
            if other is not None:
                raise ImageError(
                    path,
                    f"names another file, '{other}', and its format was only guessed: say "
                    f"-f {fmt} to open both, or -f raw to use the bytes as they are",
                )
            return fmt
        return "raw"

    async def _first_bytes(self, path: str) -> bytes:
        try:
            file = self.files.open(path, read_only=True, direct=False, aio="threads")
        except OSError as error:
            raise ImageError.from_os_error(path, error) from error
        try:
            file.attach(self.ctx)
            buffer = bytearray(PROBE_BYTES)
            got = await file.read(0, memoryview(buffer))
            return bytes(buffer[:got])
        except OSError as error:
            raise ImageError.from_os_error(path, error) from error
        finally:
            file.close()


def _take_policies(node: BlockDriverState, options: dict[str, Any]) -> None:
    """What the node does with discards and with written zeroes. Raises: ImageError."""
    name = node.node_name
    node.unmap = take_choice(name, options, "discard", ("unmap", "ignore"), "unmap") == "unmap"
    mode = take_choice(name, options, "detect-zeroes", DETECT_ZEROES, "off")
    if mode == "unmap" and not node.unmap:
        raise ImageError(name, "detect-zeroes=unmap goes with discard=unmap only")
    node.set_detect_zeroes(mode)
