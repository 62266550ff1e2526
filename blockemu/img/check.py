# SPDX-License-Identifier: Apache-2.0
"""`img check`: what a check finds and what a repair mends, in qemu-img's words.

The image's file is opened, not the image: a damaged one need not open. Its backing file isn't
touched, so a format that was only guessed does no harm here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from blockemu.drivers.child import BdrvChild, Permission, Role
from blockemu.drivers.errors import ImageError
from blockemu.drivers.qcow2.findings import CheckResult, Say, say_nothing
from blockemu.drivers.qcow2.repair import Repair, check_image
from blockemu.drivers.registry import Opener
from blockemu.img.session import run_session
from blockemu.loop.host_file import FileEngine

if TYPE_CHECKING:
    from blockemu.drivers.node import BlockDriverState

STATUS_CLEAN = 0
STATUS_NOT_CHECKED = 1
STATUS_CORRUPT = 2
STATUS_LEAKS = 3
STATUS_NO_CHECK = 63
"""The format has nothing to check. All five are qemu-img's."""

_OPTIONAL = ("corruptions", "leaks", "corruptions-fixed", "leaks-fixed", "total-clusters",
             "allocated-clusters", "fragmented-clusters", "compressed-clusters")  # fmt: skip
"""Keys that JSON leaves out where they are 0, as QEMU does."""


class FormatHasNoCheck(Exception):
    """`str()` is the line to show."""


class CheckReport(NamedTuple):
    """What `read_check` found."""

    filename: str
    fmt: str
    result: CheckResult

    @property
    def status(self) -> int:
        """The exit status: what remains, the worst first."""
        if self.result.check_errors:
            return STATUS_NOT_CHECKED
        if self.result.corruptions:
            return STATUS_CORRUPT
        return STATUS_LEAKS if self.result.leaks else STATUS_CLEAN


def read_check(
    path: str,
    *,
    fmt: str | None = None,
    repair: Repair | None = None,
    force_share: bool = False,
    say: Say = say_nothing,
    files: FileEngine | None = None,
) -> CheckReport:
    """Open the file at `path`, check the image in it, repair it, close it.

    `say` is told each finding. `force_share`: also while another process writes, which can make
    findings of what is only under way; not with `repair`. Context, and what an
    interrupt does: as `run_session`. Raises: ImageError, FormatHasNoCheck.
    """
    if force_share and repair is not None:
        raise ImageError(path, "can't be repaired while others may use it (-U)")
    return run_session(
        lambda opener: _read_check(opener, path, fmt, repair, force_share, say), files=files
    )


async def _read_check(
    opener: Opener,
    path: str,
    fmt: str | None,
    repair: Repair | None,
    force_share: bool,
    say: Say,
) -> CheckReport:
    node = await opener.open_file(
        path,
        options={"read-only": repair is None, "force-share": force_share},
        file_options={},
    )
    try:
        if fmt is None:
            fmt = await opener.guess_format(path, node, trusted=True)
        driver = opener.drivers.find(fmt)
        if driver is None or driver.is_protocol:
            raise ImageError(path, f"there is no image format '{fmt}'")
        if fmt != "qcow2":
            raise FormatHasNoCheck(f"{path}: images of format '{fmt}' have nothing to check")
        edge = file_edge(node, writable=repair is not None)
        node.add_parent(edge)
        try:
            return CheckReport(path, fmt, await check_image(path, edge, repair=repair, say=say))
        finally:
            node.remove_parent(edge)
    finally:
        await node.close()


def file_edge(node: BlockDriverState, *, writable: bool) -> BdrvChild:
    """Our hold on the file: nobody else writes meanwhile, and nobody reads what we repair."""
    perm = Permission.CONSISTENT_READ
    if writable:
        perm |= Permission.WRITE | Permission.RESIZE
    return BdrvChild(
        "file", node, parent=None, role=Role.DATA | Role.METADATA, perm=perm,
        shared=Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED, owner="img check",
    )  # fmt: skip


def facts(report: CheckReport) -> dict[str, Any]:
    """The report as QEMU's ImageCheck."""
    result = report.result
    found: dict[str, Any] = {
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "check-errors": result.check_errors,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks-fixed": result.leaks_fixed,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
        "filename": report.filename,
        "format": report.fmt,
    }
    return {key: value for key, value in found.items() if value or key not in _OPTIONAL}


def format_json(report: CheckReport) -> str:
    """`--output json`."""
    return json.dumps(facts(report), indent=4)


def format_human(report: CheckReport) -> str:
    """`--output human`, line for line as qemu-img 7.2 does it."""
    result = report.result
    lines = []
    if result.corruptions_fixed or result.leaks_fixed:
        lines += [
            "The following inconsistencies were found and repaired:",
            "",
            f"    {result.leaks_fixed} leaked clusters",
            f"    {result.corruptions_fixed} corruptions",
            "",
            "Double checking the fixed image now...",
        ]
    lines += _verdict(result)
    if result.total_clusters and result.allocated_clusters:
        allocated = result.allocated_clusters
        lines.append(
            f"{allocated}/{result.total_clusters} = "
            f"{allocated * 100 / result.total_clusters:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}")
    return "\n".join(lines)


def _verdict(result: CheckResult) -> list[str]:
    if result.is_clean and not result.leaks:
        return ["No errors were found on the image."]
    lines = []
    if result.corruptions:
        lines += [
            "",
            f"{result.corruptions} errors were found on the image.",
            "Data may be corrupted, or further writes to the image may corrupt it.",
        ]
    if result.leaks:
        lines += [
            "",
            f"{result.leaks} leaked clusters were found on the image.",
            "This means waste of disk space, but no harm to data.",
        ]
    if result.check_errors:
        lines += ["", f"{result.check_errors} internal errors have occurred during the check."]
    return lines
