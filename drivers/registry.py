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
from collections.abc import Coroutine, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.crypto.offload import Offload, on_thread_pool
from blockemu.drivers.crypto.user_objects import UserObjects
from blockemu.drivers.driver import BlockDriver
from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import identity, is_json, local_path, parse_filename, resolve
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
    "nbd": "blockemu.drivers.nbd.driver:NbdDriver",
    "null-co": "blockemu.drivers.null:NullDriver",
    "qcow2": "blockemu.drivers.qcow2.driver:Qcow2Driver",
    "raw": "blockemu.drivers.raw:RawDriver",
}

_MAGIC = {"luks": b"LUKS\xba\xbe", "qcow2": b"QFI\xfb"}
"""How images of the built-in formats that can be guessed begin. The others needn't be loaded."""

_MADE_UP = "#block"
_OF_ALL_BELOW = ("read-only", "force-share", "no-io")


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

    def guess(self, start: bytes) -> type[BlockDriver] | None:
        """The format that recognises the first bytes of an image. Built-in ones are asked first."""
        for name, magic in _MAGIC.items():
            if name not in self._classes and start.startswith(magic):
                self.find(name)
        for driver in self._classes.values():
            if driver.recognises(start):
                return driver
        for point in _plugins():
            driver_class = self.find(point.name)
            if driver_class is not None and driver_class.recognises(start):
                return driver_class
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
        objects: UserObjects | None = None,
    ) -> None:
        self.files = files
        self.metadata_budget = metadata_budget or MetadataBudget()
        self.objects = objects or UserObjects()
        self.secrets = self.objects.secrets
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
        return f"{_MADE_UP}{self._serial:03d}"

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
        fmt: str | None,
        extra: dict[str, Any] | None = None,
    ) -> BdrvChild:
        """Open the backing file that the image of `parent` names, read-only, as its "backing".

        `extra`: options for its format node besides. A relative path is relative to the folder of
        the image that names it. `fmt` may be None only for a `json:` name that says the driver
        itself.
        Raises: ImageError: missing, unreadable, part of its own chain, or of a kind not known.
        """
        image = parent.filename or parent.node_name
        name = resolve(filename, above=image)
        try:
            own = identity(name)
        except ImageError as error:
            raise ImageError(image, f"its backing file '{filename}': {error.reason}") from error
        chain = parent.backing_names | {identity(image)}
        if own in chain:
            raise ImageError(image, f"its backing file '{filename}' leads back to itself")
        if len(chain) >= BACKING_DEPTH_MAX:
            raise ImageError(image, f"more than {BACKING_DEPTH_MAX} backing files in one chain")
        options = self.image_options(name, fmt, file_options=parent.file_options)
        if "driver" not in options:
            raise ImageError(image, f"doesn't say which format its backing file '{filename}' has")
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
            if error.name in (name, own, local_path(name)):
                reason = f"is the backing file of {image}: {error.reason}"
                raise ImageError(error.name, reason) from error
            if local_path(name) is None:
                said = _about(name, error)
                raise ImageError(image, f"its backing file '{filename}': {said.reason}") from error
            raise
        finally:
            parent.backing_names = own_names

    def image_options(
        self, name: str, fmt: str | None, *, file_options: dict[str, Any]
    ) -> dict[str, Any]:
        """The option tree of the image `name`: of format `fmt`, over the file that the name means.

        A `json:` name has a tree of its own, and its driver holds where `fmt` is None; of others,
        `node_options` may say more.
        Raises: ImageError: no such name, or no such format.
        """
        tree = parse_filename(name, file_options)
        if not is_json(name):
            tree = {**copy.deepcopy(self.node_options.get(name, {})), "file": tree}
        if fmt is not None and fmt != tree.get("driver"):
            self._check_format(name, fmt)
            tree["driver"] = fmt
        return tree

    def said_of(self, name: str) -> dict[str, Any]:
        """What is said of the format's node of the image `name` besides its driver and its file.
        Raises: ImageError: no such name."""
        if not is_json(name):
            return self.node_options.get(name, {})
        tree = parse_filename(name, {})
        return {key: value for key, value in tree.items() if key not in ("driver", "file")}

    def _check_format(self, name: str, fmt: str) -> None:
        """Raises: ImageError, when `fmt` is no format of images."""
        driver = self.drivers.find(fmt)
        if driver is None or driver.is_protocol:
            raise ImageError(name, f"there is no image format '{fmt}'")

    async def open_named(
        self,
        name: str,
        *,
        fmt: str | None,
        options: dict[str, Any],
        file_options: dict[str, Any],
        qcow2_options: dict[str, Any] | None = None,
        alone: bool = False,
    ) -> BlockDriverState:
        """Open the image that a user calls `name`.

        `options` are those of the image's node, `qcow2_options` more of them if it turns out to be
        a qcow2 image, `file_options` those of a host file below it. `fmt` None: found out, unless
        the name says it; an image that names other files is then refused.
        `alone`: without the files that it names, and not refused.
        Suspends: while images are read. Raises: ImageError.
        """
        tree = self.image_options(name, fmt, file_options=file_options)
        try:
            return await self._open_tree(name, tree, options, qcow2_options or {}, alone=alone)
        except ImageError as error:
            raise _about(name, error) from error

    async def _open_tree(
        self,
        name: str,
        tree: dict[str, Any],
        options: dict[str, Any],
        qcow2_options: dict[str, Any],
        *,
        alone: bool,
    ) -> BlockDriverState:
        if "driver" in tree:
            return await self.open(self._with(tree, options, qcow2_options, alone=alone))
        shared = {key: value for key, value in options.items() if key in _OF_ALL_BELOW}
        file = await self._open_file(name, tree.pop("file", None), shared)
        try:
            tree["driver"] = await self.guess_format(name, file, trusted=alone)
            tree["file"] = file.node_name
            return await self.open(self._with(tree, options, qcow2_options, alone=alone))
        except BaseException:
            if file.node_name in self.nodes:
                await file.close()
            raise

    def _with(
        self,
        tree: dict[str, Any],
        options: dict[str, Any],
        qcow2_options: dict[str, Any],
        *,
        alone: bool,
    ) -> dict[str, Any]:
        driver = self.drivers.find(tree["driver"]) if isinstance(tree["driver"], str) else None
        tree |= options
        if tree["driver"] == "qcow2":
            tree |= qcow2_options
        if alone and driver is not None:
            tree |= driver.options_alone(read_only=bool(options.get("read-only")))
        return tree

    async def open_file(
        self, name: str, *, options: dict[str, Any], file_options: dict[str, Any]
    ) -> BlockDriverState:
        """Open what lies below the image `name`: the host file, or the export. Raises: ImageError.

        For those who look at the bytes of a format themselves.
        """
        tree = parse_filename(name, file_options)
        return await self._open_file(name, tree.get("file", tree), options)

    async def _open_file(self, name: str, tree: Any, options: dict[str, Any]) -> BlockDriverState:
        if not isinstance(tree, dict):
            raise ImageError(name, "says neither 'driver' nor 'file'")
        return await self.open({**tree, **options})

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
        overlap_check: str | None = None,
        snapshot: str | None = None,
        no_io: bool = False,
        no_flush: bool = False,
        offset: int = 0,
    ) -> BlockDriverState:
        """Open the image at `path` the way the command line does.

        `fmt` None means: probe, and refuse an image that names other files. `overlap_check` is for
        a qcow2 image. `no_flush`: of an image that is thrown away. `offset`: leave out so many
        bytes at the disk's start.
        Raises: ImageError.
        """
        options: dict[str, Any] = {
            "read-only": read_only,
            "force-share": force_share,
            "no-io": no_io,
            "discard": discard,
            "detect-zeroes": detect_zeroes,
        }
        if node_name is not None:
            options["node-name"] = node_name
        if snapshot is not None:
            options["snapshot"] = snapshot
        file_options = {"aio": aio, "cache": {"direct": direct, "no-flush": no_flush}}
        node = await self.open_named(
            path,
            fmt=fmt,
            options=options,
            file_options=file_options,
            qcow2_options={} if overlap_check is None else {"overlap-check": overlap_check},
        )
        return await self._window(path, node, offset) if offset else node

    async def _window(self, path: str, disk: BlockDriverState, offset: int) -> BlockDriverState:
        """All of `disk` but its first `offset` bytes. It is closed if that fails."""
        try:
            if offset > disk.length_bytes:
                reason = f"offset {offset} lies past the disk's end at {disk.length_bytes}"
                raise ImageError(path, reason)
            options = {"driver": "raw", "file": disk.node_name, "offset": offset}
            return await self.open({**options, "read-only": disk.read_only})
        except BaseException:
            await disk.close()
            raise

    async def probe(self, name: str) -> str:
        """The format of the image `name`: what the name says, or else by its first bytes.

        Raises: ImageError: unreadable, or it names other files, which a probed format may not.
        """
        shared: dict[str, Any] = {"read-only": True, "force-share": True}
        tree = parse_filename(name, {"aio": "threads"})
        if is_json(name) and "driver" in tree:
            return take_str(name, tree, "driver")  # type: ignore[no-any-return]
        file = await self._open_file(name, tree if "driver" in tree else tree.get("file"), shared)
        try:
            return await self.guess_format(name, file)
        finally:
            await file.close()

    async def guess_format(
        self, name: str, file: BlockDriverState, *, trusted: bool = False
    ) -> str:
        """The format that recognises the first bytes of `file`; raw when none does.

        Raises: ImageError: unreadable, or, unless `trusted`, it names other files.
        """
        start = bytearray(min(PROBE_BYTES, file.length_bytes))
        try:
            await file.preadv(0, memoryview(start))
        except OSError as error:
            raise ImageError.from_os_error(name, error) from error
        driver = self.drivers.guess(bytes(start))
        if driver is None:
            return "raw"
        other = None if trusted else driver.names_other_file(bytes(start))
        if other is not None:
            raise ImageError(
                name,
                f"names another file, '{other}', and its format was only guessed: say "
                f"-f {driver.name} to open both, or -f raw to use the bytes as they are",
            )
        return driver.name


def _about(name: str, error: ImageError) -> ImageError:
    """The same failure under the image's name, where it has only a node's that was made up."""
    made_up = error.name == "options" or error.name.startswith(_MADE_UP)
    return ImageError(name, error.reason) if made_up else error


def _take_policies(node: BlockDriverState, options: dict[str, Any]) -> None:
    """What the node does with discards and with written zeroes. Raises: ImageError."""
    name = node.node_name
    node.unmap = take_choice(name, options, "discard", ("unmap", "ignore"), "unmap") == "unmap"
    mode = take_choice(name, options, "detect-zeroes", DETECT_ZEROES, "off")
    if mode == "unmap" and not node.unmap:
        raise ImageError(name, "detect-zeroes=unmap goes with discard=unmap only")
    node.set_detect_zeroes(mode)
