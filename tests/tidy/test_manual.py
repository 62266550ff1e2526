# SPDX-License-Identifier: Apache-2.0
"""The comparison of manual and commands sees what is missing on either side."""

from __future__ import annotations

import click
import pytest

from tests.tidy.manual import command_lines, command_tree, invented, sections, undocumented


@click.group()
@click.option("-v", "--verbose", is_flag=True)
def program(verbose: bool) -> None: ...


@program.command()
@click.option("-f", "--format", "fmt")
@click.option("--read-only", is_flag=True)
@click.option("--secret", hidden=True)
def serve(fmt: str, read_only: bool, secret: str) -> None: ...


TREE = command_tree(program)
GOOD = """
# Manual
## `blockemu serve`
- `-f, --format FMT`: which.
- `--read-only`: no writes.
"""


def test_manual_complete_is_silent() -> None:
    assert list(undocumented(TREE, GOOD)) == []
    assert list(invented(TREE, GOOD, "docs/cli.md")) == []


def test_option_not_in_its_section_is_named() -> None:
    page = GOOD.replace("`--read-only`", "`--read`") + "## Other\n`--read-only`\n"
    [complaint] = undocumented(TREE, page)
    assert "`blockemu serve` has --read-only" in complaint
    assert "describe it" in complaint


def test_command_without_section_is_named() -> None:
    [complaint] = undocumented(TREE, "# Manual\n")
    assert "no section for `blockemu serve`" in complaint


def test_section_of_no_command_is_named() -> None:
    complaints = list(invented(TREE, "## `blockemu steam`\n", "docs/cli.md"))
    assert "isn't a command" in complaints[0]


@pytest.mark.parametrize(
    "text",
    [
        "## `blockemu serve`\n`--readonly` is safe.",
        "Try `blockemu serve --readonly disk`.",
        "```\n$ blockemu serve \\\n    --readonly disk\n```",
        "```\nsudo .venv/bin/blockemu -v serve --readonly=yes disk\n```",
        "`blockemu --readonly serve`",
    ],
)
def test_option_that_does_not_exist_is_named(text: str) -> None:
    [complaint] = invented(TREE, text, "README.md")
    assert complaint.startswith("README.md: ")
    assert "has no --readonly" in complaint


def test_command_that_does_not_exist_is_named() -> None:
    [complaint] = invented(TREE, "`blockemu steam disk`", "README.md")
    assert "no command steam" in complaint


@pytest.mark.parametrize(
    "text",
    [
        "`qemu-img info --output=json`",
        "`blockemu serve -fraw --format raw -v disk | grep --color x`",
        "`blockemu ...`, `blockemu COMMAND`, `blockemu.loop`",
        "```\nblockemu serve disk  # not --this\n```",
    ],
)
def test_good_command_line_is_silent(text: str) -> None:
    assert list(invented(TREE, text, "README.md")) == []


def test_heading_inside_a_fence_is_no_section() -> None:
    assert sections("```\n## `blockemu serve`\n```\n") == {}


def test_command_lines_are_found_in_code_only() -> None:
    page = "blockemu serve prose\n`blockemu serve inline`\n```\nblockemu serve fenced\n```\n"
    assert list(command_lines(page)) == ["blockemu serve inline", "blockemu serve fenced"]


class WithDefault(click.Group):
    default = "serve"


@click.group(cls=WithDefault, commands={"serve": serve})
def program_with_default() -> None: ...


def test_command_that_may_be_left_out_is_understood() -> None:
    tree = command_tree(click.Group("blockemu", commands={"nbd": program_with_default}))
    good = "`blockemu nbd -f raw disk`, `blockemu nbd disk`, `blockemu nbd serve disk`"
    assert list(invented(tree, good, "README.md")) == []
    [complaint] = invented(tree, "`blockemu nbd --nosuch disk`", "README.md")
    assert "has no --nosuch" in complaint
