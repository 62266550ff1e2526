# SPDX-License-Identifier: Apache-2.0
"""The house's rules (rules.py, manual.py), applied to this repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tidy import manual
from tests.tidy.rules import FLOORS, RULES, Rule, Source, names_no_path_of_this_machine

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = (*(folder for _, folder in FLOORS), "benchmarks", "docs", "examples", "tests", "tools")
CODE_SUFFIXES = {".py", ".c", ".h", ".sh", ".yml", ".toml"}
CODE_NAMES = {"Dockerfile", "Makefile", "run"}  # and what begins with a shebang
IGNORED_PARTS = {"__pycache__", "results"}
GENERATED = {
    "loop/_libaio.c",
    "loop/_poll.c",
    "drivers/_direct_map.c",
    "blockemu/nbd/_transmission.c",
}


def files() -> Iterator[Path]:
    """Every text file that is written by hand."""
    yield from (path for path in sorted(REPOSITORY.iterdir()) if path.is_file())
    for folder in (*FOLDERS, ".ci"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.is_file() and not IGNORED_PARTS.intersection(path.parts):
                yield path


def sources() -> list[Source]:
    """Their texts; what isn't text (a compiled module, an image) is left out."""
    found = []
    for path in files():
        name = path.relative_to(REPOSITORY).as_posix()
        with path.open("rb") as stream:
            binary = b"\0" in stream.read(4096)
        if not binary and name not in GENERATED:
            found.append(Source(name, path.read_text(encoding="utf-8", errors="replace")))
    return found


def is_code(source: Source) -> bool:
    """Whether the rules for code apply to it."""
    path = Path(source.path)
    return path.suffix in CODE_SUFFIXES or path.name in CODE_NAMES or source.text.startswith("#!")


@pytest.fixture(scope="module")
def everything() -> list[Source]:
    return sources()


def report(complaints: list[str]) -> None:
    """Fail with all complaints, one a line."""
    if complaints:
        pytest.fail("\n".join(["", *complaints]), pytrace=False)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.__name__))
def test_code_keeps_the_rule(rule: Rule, everything: list[Source]) -> None:
    report([complaint for source in everything if is_code(source) for complaint in rule(source)])


def test_nothing_names_a_path_of_this_machine(everything: list[Source]) -> None:
    report([c for source in everything for c in names_no_path_of_this_machine(source, REPOSITORY)])


@pytest.mark.parametrize("folder", [folder for _, folder in FLOORS])
def test_every_folder_with_modules_is_a_package(folder: str) -> None:
    folders = {path.parent for path in (REPOSITORY / folder).rglob("*.py")}
    report(
        [
            f"{path.relative_to(REPOSITORY)}/ has modules but isn't installed: add an __init__.py"
            for path in sorted(folders)
            if not (path / "__init__.py").exists()
        ]
    )


@pytest.fixture(scope="module")
def commands() -> manual.Command:
    from blockemu.cli import cli

    return manual.command_tree(cli)


def test_every_option_is_in_the_manual(commands: manual.Command) -> None:
    report(list(manual.undocumented(commands, (REPOSITORY / manual.MANUAL).read_text())))


def test_every_option_in_a_page_exists(commands: manual.Command, everything: list[Source]) -> None:
    report(
        [
            complaint
            for source in everything
            if source.path.endswith(".md")
            for complaint in manual.invented(commands, source.text, source.path)
        ]
    )
