# SPDX-License-Identifier: Apache-2.0
"""What a daemon is asked to do, as data: which images, under which names, where to listen.

`serve_config` turns what a user types into it, fills in the defaults, and refuses what can't be
meant, before anything is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from blockemu.addresses import Address, InheritedAddress, TcpAddress, UnixAddress
from blockemu.drivers.crypto.user_objects import UserObjects
from blockemu.drivers.metadata_budget import METADATA_BYTES_MAX
from blockemu.errors import DaemonError
from blockemu.export_names import (
    AliasConfig,
    check_description,
    export_names,
    parse_alias,
)
from blockemu.exports import ExportSpec
from blockemu.limits import Limits
from blockemu.loop.iothread import default_poll_params
from blockemu.loop.poller import PollParams
from blockemu.nbd.tls import TlsPolicy

IMAGES_MAX = 256
"""Images of one `serve`: each has a thread of its own unless told otherwise."""

EXPORTS_MAX = 1024
"""Further names of them. A listing of all of them is a quarter of a megabyte."""

LISTENERS_MAX = 64
"""Addresses to listen on; each is a descriptor or two."""


LISTINGS = ("all", "local", "none")
"""Who may ask what exports there are: everybody, clients on unix sockets, nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """One image, and the export that it becomes."""

    path: str
    export: ExportSpec
    iothread: str
    fmt: str | None = None
    """None: probe."""
    read_only: bool = False
    snapshot: str | None = None
    """Id or name of the internal snapshot to show; read-only."""
    direct: bool = False
    aio: str = "native"
    discard: str = "unmap"
    detect_zeroes: str = "off"
    overlap_check: str | None = None
    """Of qcow2 images; None: the driver's default."""
    no_flush: bool = False
    """Flushes do nothing: for an image that is thrown away."""
    offset: int = 0
    """Bytes at the disk's start that are left out."""

    @property
    def export_name(self) -> str:
        """What clients ask for."""
        return self.export.name


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """Everything that a daemon knows when it starts."""

    images: tuple[ImageConfig, ...]
    aliases: tuple[AliasConfig, ...] = ()
    """Further exports of the images' nodes."""
    default_export: str | None = None
    """What clients get who name none; None: the first that isn't hidden."""
    addresses: tuple[Address, ...] = (TcpAddress(),)
    listing: str = "all"
    """One of LISTINGS."""
    until_last_client: bool = False
    """End when the last client has left, once there was one."""
    tls: TlsPolicy | None = None
    """Of the NBD server; None: it has no TLS."""
    control_path: str | None = None
    control_sockets: tuple[InheritedAddress, ...] = ()
    """Control sockets that we were started with."""
    poll_params: PollParams = field(default_factory=default_poll_params)
    """Of all IOThreads."""
    limits: Limits = field(default_factory=Limits)
    metadata_bytes_max: int = METADATA_BYTES_MAX
    """What caches of all images' metadata may take, together."""
    objects: UserObjects = field(default_factory=UserObjects)
    """What unlocks encrypted images, and TLS credentials; QMP adds more."""


def serve_config(
    paths: Sequence[str],
    *,
    names: Sequence[str] = (),
    iothreads: Sequence[str] = (),
    fmt: str | None = None,
    read_only: bool = False,
    snapshot: str | None = None,
    direct: bool = False,
    aio: str = "native",
    discard: str = "unmap",
    detect_zeroes: str = "off",
    overlap_check: str | None = None,
    descriptions: Sequence[str] = (),
    hidden: Sequence[str] = (),
    default_export: str | None = None,
    aliases: Sequence[str] = (),
    export_connections_max: int | None = None,
    rotational: bool | None = None,
    resizable: bool = False,
    bitmaps: Sequence[str] = (),
    allocation_depth: bool = False,
    address: Address | Sequence[Address] | None = None,
    listing: str = "all",
    control_path: str | None = None,
    control_sockets: tuple[InheritedAddress, ...] = (),
    poll_params: PollParams | None = None,
    limits: Limits | None = None,
    metadata_bytes_max: int = METADATA_BYTES_MAX,
    objects: UserObjects | None = None,
    tls: TlsPolicy | None = None,
) -> DaemonConfig:
    """The configuration of `blockemu serve`. `names` and `descriptions` are the images', in their
    order; `hidden` and `default_export` are names of exports, `bitmaps` those of every image.

    Raises: DaemonError.
    """
    if not paths:
        raise DaemonError("serve", "no image given")
    if len(paths) > IMAGES_MAX:
        raise DaemonError("serve", f"more than {IMAGES_MAX} images")
    if detect_zeroes == "unmap" and discard != "unmap":
        raise DaemonError("--detect-zeroes unmap", "goes with --discard unmap only")
    limits = limits or Limits()
    threads = _threads(len(paths), iothreads)
    if len(descriptions) > len(paths):
        reason = "there are more --description options than images"
        raise DaemonError(descriptions[len(paths)], reason)
    specs = []
    for index, name in enumerate(export_names(paths, names, limits)):
        description = descriptions[index] if index < len(descriptions) else ""
        check_description(f"export '{name}'", description, limits)
        specs.append(
            ExportSpec(
                name=name,
                writable=not read_only and snapshot is None,
                description=description,
                hidden=name in hidden,
                connections_max=export_connections_max,
                rotational=rotational,
                resizable=resizable,
                bitmaps=tuple(bitmaps),
                allocation_depth=allocation_depth,
            )
        )
    others = _aliases(aliases, specs, limits)
    all_names = [spec.name for spec in specs] + [alias.spec.name for alias in others]
    wanted = [("--hidden", name) for name in hidden]
    if default_export is not None:
        wanted.append(("--default", default_export))
    for option, name in wanted:
        if name not in all_names:
            raise DaemonError(f"{option} {name}", "there is no export of this name")
    images = tuple(
        ImageConfig(
            path=path,
            export=spec,
            iothread=thread,
            fmt=fmt,
            read_only=read_only or snapshot is not None,
            snapshot=snapshot,
            direct=direct,
            aio=aio,
            discard=discard,
            detect_zeroes=detect_zeroes,
            overlap_check=overlap_check,
        )
        for path, spec, thread in zip(paths, specs, threads, strict=True)
    )
    if address is None:
        addresses: tuple[Address, ...] = (TcpAddress(),)
    else:
        addresses = tuple(address) if isinstance(address, Sequence) else (address,)
    _check_addresses(addresses, control_path)
    return DaemonConfig(
        images=images,
        aliases=others,
        default_export=default_export,
        addresses=addresses,
        listing=listing,
        control_path=control_path,
        control_sockets=control_sockets,
        poll_params=poll_params or default_poll_params(),
        limits=limits,
        metadata_bytes_max=metadata_bytes_max,
        tls=tls,
        objects=objects or UserObjects(),
    )


def _aliases(
    texts: Sequence[str], specs: Sequence[ExportSpec], limits: Limits
) -> tuple[AliasConfig, ...]:
    """The --export options: of exports that are there, with names that aren't."""
    if len(texts) > EXPORTS_MAX:
        raise DaemonError("--export", f"given more than {EXPORTS_MAX} times")
    names = {spec.name: spec for spec in specs}
    found = []
    for text in texts:
        alias = parse_alias(text, limits)
        if alias.of not in names:
            raise DaemonError(f"--export {text}", f"there is no export '{alias.of}'")
        if alias.spec.name in names:
            reason = f"export name '{alias.spec.name}' is taken already"
            raise DaemonError(f"--export {text}", reason)
        names[alias.spec.name] = alias.spec
        found.append(alias)
    return tuple(found)


def _check_addresses(addresses: Sequence[Address], control_path: str | None) -> None:
    if not addresses:
        raise DaemonError("serve", "no address to listen on")
    if len(addresses) > LISTENERS_MAX:
        raise DaemonError("serve", f"more than {LISTENERS_MAX} addresses to listen on")
    paths = set()
    for address in addresses:
        if isinstance(address, UnixAddress):
            if address.path == control_path:
                raise DaemonError(address.path, "is given to both --socket and --control")
            if address.path in paths:
                raise DaemonError(address.path, "is given to --socket twice")
            paths.add(address.path)


def _threads(count: int, iothreads: Sequence[str]) -> list[str]:
    """A thread for each image: one of its own, the one named, or those named, in order."""
    if "" in iothreads:
        raise DaemonError("--iothread", "the name is empty")
    if not iothreads:
        return [f"iothread{index}" for index in range(count)]
    if len(iothreads) == 1:
        return [iothreads[0]] * count
    if len(iothreads) != count:
        raise DaemonError(
            "--iothread",
            f"given {len(iothreads)} times for {count} images; give it once, or once for each",
        )
    return list(iothreads)
