# SPDX-License-Identifier: Apache-2.0
"""The house's rules, as functions from a source file to complaints.

What a reviewer would have to say again and again is said here once. A rule is a pure function that
takes a `Source` and yields sentences; each names what to do instead. `test_tidy.py` runs them
over the repository, `test_rules.py` shows for each that it can fail.

A new rule is a function here, a line in RULES, and a test of both its answers. A new exception to
a rule is a line in a table here, with its reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LINES_MAX = 600  # past it, look for the file's second idea
LICENCE = "SPDX-License-Identifier: Apache-2.0"
LICENCE_WITHIN_LINES = 3  # a shebang may come first

# Each floor's package and folder, the lowest first. A floor imports from itself and those below.
FLOORS = (
    ("blockemu.loop", "loop"),
    ("blockemu.drivers", "drivers"),
    ("blockemu.jobs", "jobs"),
    ("blockemu", "blockemu"),
)

# Folders and files of these names collect what nobody wanted to name.
GRAB_BAGS = {"common", "helper", "helpers", "misc", "util", "utils"}


@dataclass(frozen=True, slots=True)
class Seam:
    """Modules and functions that only some files may use, and what the others do instead.

    A name is a module (`time`), or one of its functions (`os.pread`). `only` are path prefixes.
    """

    names: frozenset[str]
    only: tuple[str, ...]
    instead: str


FILE_CALLS = frozenset(
    {"os.open", "os.lseek", "os.sendfile", "os.copy_file_range"}
    | {"os.read", "os.readv", "os.pread", "os.preadv"}
    | {"os.write", "os.writev", "os.pwrite", "os.pwritev"}
    | {"os.fsync", "os.fdatasync", "os.truncate", "os.ftruncate"}
    | {"os.posix_fallocate", "os.posix_fadvise"}
)

SEAMS = (
    Seam(
        frozenset({"time", "datetime"}),
        ("loop/clock.py",),
        "take the time from ctx.now_ns(), wait with sleep_ns() or a Timer",
    ),
    Seam(
        frozenset({"random", "secrets", "uuid", "os.urandom"}),
        ("loop/entropy.py",),
        "let the caller hand in the generator, so that one seed replays everything",
    ),
    Seam(
        frozenset({"threading", "_thread", "queue", "concurrent", "multiprocessing"}),
        ("loop/",),
        "run it with ctx.thread_pool.run(), or on an IOThread",
    ),
    Seam(
        frozenset({"select", "selectors"}),
        ("loop/",),
        "register the fd with ctx.set_fd_handler()",
    ),
    Seam(
        frozenset({"asyncio"}),
        (),
        "coroutines are driven by an AioContext: see loop/coroutine.py",
    ),
    Seam(
        FILE_CALLS | {"fcntl", "mmap"},
        ("loop/",),
        "open the file through the FileEngine that was handed in (loop/host_file.py)",
    ),
    Seam(
        frozenset({"socket", "socketserver"}),
        # A signal's wake-up byte needs a socket pair.
        ("blockemu/", "loop/signals.py", "loop/stream_socket.py", "loop/socket_options.py")
        + ("loop/tls_stream.py",),
        "servers are floor 4's; a client gets its socket from loop/stream_socket.py",
    ),
    Seam(
        frozenset({"ssl"}),
        ("loop/tls_stream.py", "drivers/crypto/tls_"),
        "credentials make streams (drivers/crypto/tls_credentials.py), and these look like sockets",
    ),
    Seam(
        frozenset({"signal.signal", "signal.set_wakeup_fd", "signal.sigwait"}),
        ("loop/signals.py",),
        "use SignalWatcher of loop/signals.py",
    ),
    Seam(
        frozenset({"ctypes"}),
        (),
        "C is called through cffi's API mode: see loop/_libaio_build.py",
    ),
)

# Built-in calls that go around a seam, on the floors that must not.
OPEN_FORBIDDEN_IN = ("drivers/", "jobs/")


@dataclass(frozen=True)
class Source:
    """One file of the repository: its path from the root, and its text."""

    path: str
    text: str

    @property
    def is_python(self) -> bool:
        """Whether the Python rules apply."""
        return self.path.endswith(".py")

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text, self.path)

    @property
    def floor(self) -> int | None:
        """Its floor's index in FLOORS; None for a file outside the house (tests, tools)."""
        return next(
            (
                level
                for level, (_, folder) in enumerate(FLOORS)
                if self.path.startswith(f"{folder}/")
            ),
            None,
        )


Rule = Callable[[Source], Iterator[str]]


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Each imported name with its line: `from os import pread` is `os.pread`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module or ''}.{alias.name}"


def attributes(source: Source) -> Iterator[tuple[int, str]]:
    """Each use of `module.name` with its line, under the module's own name, whatever its alias."""
    modules = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in modules:
            yield node.lineno, f"{modules[node.value.id]}.{node.attr}"


def is_or_is_in(name: str, parent: str) -> bool:
    """Whether the dotted `name` is `parent`, or something in it."""
    return name == parent or name.startswith(f"{parent}.")


def floors_import_downwards(source: Source) -> Iterator[str]:
    """A floor knows those below it, and nothing of those above."""
    if source.floor is None or not source.is_python:
        return
    for line, name in imports(source):
        target = next(
            (i for i, (package, _) in enumerate(FLOORS) if is_or_is_in(name, package)), None
        )
        if target is not None and target > source.floor:
            yield (
                f"{source.path}:{line}: {FLOORS[source.floor][0]} imports {name} from a floor "
                "above it: hand it in from above, or move what is needed down"
            )


def imports_are_absolute(source: Source) -> Iterator[str]:
    """`blockemu.loop.timer`, neither `.timer` nor `loop.timer`: one name for one module."""
    folders = {folder for package, folder in FLOORS if package != folder}
    for node in ast.walk(source.tree) if source.is_python else ():
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            yield f"{source.path}:{node.lineno}: relative import: write out the package's name"
    for line, name in imports(source) if source.is_python else ():
        if name.split(".")[0] in folders:
            yield f"{source.path}:{line}: imports {name}: write blockemu.{name}"


def seams_are_kept(source: Source) -> Iterator[str]:
    """The clock, the poller, files, threads and sockets each have their one place."""
    if source.floor is None or not source.is_python:
        return
    used = set(imports(source)) | set(attributes(source))
    for seam in SEAMS:
        if source.path.startswith(seam.only or ("\0",)):
            continue
        for line, name in sorted(used):
            if any(is_or_is_in(name, forbidden) for forbidden in seam.names):
                places = ", ".join(seam.only) or "no file"
                yield f"{source.path}:{line}: {name} belongs in {places}: {seam.instead}"


def files_are_opened_through_the_engine(source: Source) -> Iterator[str]:
    """Drivers and jobs see files only as HostFile, or no simulation could stand in for one."""
    if not source.is_python or not source.path.startswith(OPEN_FORBIDDEN_IN):
        return
    for node in ast.walk(source.tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "open"
        ):
            yield (
                f"{source.path}:{node.lineno}: open() goes around the FileEngine: take the "
                "HostFile from the opener"
            )


def no_test_sleeps(source: Source) -> Iterator[str]:
    """A test that sleeps is slow when it passes, and fails when the machine is slow."""
    if not source.is_python or not source.path.startswith("tests/"):
        return
    for line, name in [*imports(source), *attributes(source)]:
        if name == "time.sleep":
            yield (
                f"{source.path}:{line}: time.sleep in a test: advance a VirtualClock, or wait for "
                "the event itself (a ready line, an exit, a readable fd) with a timeout"
            )


def licence_is_named(source: Source) -> Iterator[str]:
    """Each source file says its licence."""
    if LICENCE not in "\n".join(source.text.splitlines()[:LICENCE_WITHIN_LINES]):
        yield f"{source.path}:1: no licence: begin with a comment `{LICENCE}`"


def module_says_what_it_is(source: Source) -> Iterator[str]:
    """Each module opens with its docstring."""
    if source.is_python and not ast.get_docstring(source.tree):
        yield f"{source.path}:1: no docstring: begin with the module's contract and its why"


def file_is_short(source: Source) -> Iterator[str]:
    """A file that doesn't fit in a head holds two ideas."""
    lines = len(source.text.splitlines())
    if lines > LINES_MAX:
        yield f"{source.path}: {lines} lines, over {LINES_MAX}: give its second idea a file"


def name_says_something(source: Source) -> Iterator[str]:
    """No grab-bags."""
    for part in re.split(r"[/.]", source.path):
        if part in GRAB_BAGS:
            yield f"{source.path}: `{part}` says nothing: name the module for what it holds"


def names_no_path_of_this_machine(source: Source, repository: Path) -> Iterator[str]:
    """What names the place where it was written works only there.

    A clone directly below the root (`/src`) can't be told from a path in a container: it isn't
    looked for.
    """
    forbidden = [r"/home/[a-z]", re.escape(str(repository)) + r"(?![\w-])"]
    if len(repository.parts) <= 2:
        del forbidden[1]
    pattern = re.compile("|".join(forbidden))
    for number, line in enumerate(source.text.splitlines(), 1):
        found = pattern.search(line)
        if found is not None and source.path != "tests/tidy/rules.py":
            yield (
                f"{source.path}:{number}: names {found[0]}, a place of this machine: say it from "
                "the repository's root, or make it an option"
            )


RULES: tuple[Rule, ...] = (
    floors_import_downwards,
    imports_are_absolute,
    seams_are_kept,
    files_are_opened_through_the_engine,
    no_test_sleeps,
    licence_is_named,
    module_says_what_it_is,
    file_is_short,
    name_says_something,
)
