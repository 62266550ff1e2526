# SPDX-License-Identifier: Apache-2.0
"""What a daemon is asked to do, as data: which images, under which names, where to listen.

`serve_config` turns what a user types into it, fills in the defaults, and refuses what can't be
meant, before anything is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from blockemu.drivers.crypto.user_objects import UserObjects
from blockemu.drivers.errors import ImageError
from blockemu.drivers.filename import is_json, local_path, parse_filename
from blockemu.drivers.metadata_budget import METADATA_BYTES_MAX
from blockemu.errors import DaemonError
from blockemu.limits import Limits
from blockemu.loop.iothread import default_poll_params
from blockemu.loop.poller import PollParams
from blockemu.nbd.tls import TlsPolicy

NBD_PORT = 10809
"""Assigned to NBD by IANA."""

IMAGES_MAX = 256
"""Images of one `serve`: each has a thread of its own unless told otherwise."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Port 0 is any free port."""

    host: str = "127.0.0.1"
    port: int = NBD_PORT


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket path."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """One image, and the export that it becomes."""

    path: str
    export_name: str
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """Everything that a daemon knows when it starts."""

    images: tuple[ImageConfig, ...]
    tls: TlsPolicy | None = None
    """Of the NBD server; None: it has no TLS."""
    address: TcpAddress | UnixAddress = field(default_factory=TcpAddress)
    control_path: str | None = None
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
    address: TcpAddress | UnixAddress | None = None,
    control_path: str | None = None,
    poll_params: PollParams | None = None,
    limits: Limits | None = None,
    metadata_bytes_max: int = METADATA_BYTES_MAX,
    objects: UserObjects | None = None,
    tls: TlsPolicy | None = None,
) -> DaemonConfig:
    """The configuration of `blockemu serve`. Raises: DaemonError."""
    if not paths:
        raise DaemonError("serve", "no image given")
    if len(paths) > IMAGES_MAX:
        raise DaemonError("serve", f"more than {IMAGES_MAX} images")
    if detect_zeroes == "unmap" and discard != "unmap":
        raise DaemonError("--detect-zeroes unmap", "goes with --discard unmap only")
    limits = limits or Limits()
    export_names = _export_names(paths, names, limits)
    threads = _threads(len(paths), iothreads)
    images = tuple(
        ImageConfig(
            path=path,
            export_name=name,
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
        for path, name, thread in zip(paths, export_names, threads, strict=True)
    )
    if isinstance(address, UnixAddress) and address.path == control_path:
        raise DaemonError(address.path, "is given to both --socket and --control")
    return DaemonConfig(
        images=images,
        address=address or TcpAddress(),
        control_path=control_path,
        poll_params=poll_params or default_poll_params(),
        limits=limits,
        metadata_bytes_max=metadata_bytes_max,
        tls=tls,
        objects=objects or UserObjects(),
    )


def _export_names(paths: Sequence[str], names: Sequence[str], limits: Limits) -> list[str]:
    """Given names in the order of the images; for those that have none, a file's stem, or the name
    that an export has where it comes from."""
    if len(names) > len(paths):
        raise DaemonError(names[len(paths)], "there are more --name options than images")
    found: dict[str, str] = {}
    for index, path in enumerate(paths):
        name = names[index] if index < len(names) else _name_of(path)
        if name in found:
            raise DaemonError(
                path, f"export name '{name}' is taken by {found[name]}; give each its own --name"
            )
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            reason = "its export name isn't UTF-8, which the protocol wants; give it a --name"
            raise DaemonError(path, reason) from None
        if size > limits.name_length_max:
            raise DaemonError(path, f"an export name has at most {limits.name_length_max} bytes")
        found[name] = path
    return list(found)


def _name_of(image: str) -> str:
    path = local_path(image)
    if path is not None:
        return PurePath(path).stem
    try:
        tree = parse_filename(image, {})
    except ImageError as error:
        raise DaemonError(error.name, error.reason) from error
    if is_json(image):
        raise DaemonError(image, "has no name of its own: give it a --name")
    return str(tree.get("export", ""))


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
