# SPDX-License-Identifier: Apache-2.0
"""Help that helps: every command says what it does, with examples, and every option too."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

import blockemu
from blockemu.cli import cli


def commands(command: click.Command, path: str) -> dict[str, click.Command]:
    found = {path: command}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            found.update(commands(child, f"{path} {name}"))
    return found


COMMANDS = commands(cli, "blockemu")


@pytest.mark.parametrize("path", COMMANDS)
def test_command_and_its_options_have_a_help_text(path: str) -> None:
    command = COMMANDS[path]
    assert command.help, f"{path}: write a docstring"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{path} {parameter.opts[0]}: say what it does"


@pytest.mark.parametrize("path", COMMANDS)
def test_command_has_examples(path: str) -> None:
    assert "Examples:" in (COMMANDS[path].epilog or ""), f"{path}: add an epilog with examples"


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("path", COMMANDS)
def test_help_works_everywhere(path: str, option: str) -> None:
    result = CliRunner().invoke(cli, [*path.split()[1:], option])
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_version_is_the_packages() -> None:
    result = CliRunner().invoke(cli, ["--version"], prog_name="blockemu")
    assert result.output == f"blockemu {blockemu.__version__}\n"
