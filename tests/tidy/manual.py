# SPDX-License-Identifier: Apache-2.0
"""Does the manual say what the commands do? Both are read, and compared both ways.

The commands are asked through click. In docs/cli.md each has a section, whose heading names it:
``## `blockemu img create` ``. A section names every option of its command, and no option that the
command doesn't have; nor does any `blockemu ...` command line in any page.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import click

MANUAL = "docs/cli.md"
HEADING = re.compile(r"^#+ +`?(?P<command>blockemu(?: [a-z][a-z-]*)*)`?$")
FENCE = re.compile(r"^ *(```|~~~)")
INLINE_CODE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"^--?[a-zA-Z][a-zA-Z0-9-]*")
SHELL_ENDS_COMMAND = {"|", "||", "&", "&&", ";", ">", "<", "2>", ">>", "#"}


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the tree: its options by every name that they have, its sub-commands, and
    which of these is meant where none is named."""

    options: tuple[tuple[str, ...], ...]
    subcommands: Mapping[str, Command]
    default: str | None = None

    def knows(self, option: str) -> bool:
        """Whether `option` is one of its names; `-n4` is `-n` with its value."""
        names = {name for names in self.options for name in names}
        return option in names or (not option.startswith("--") and option[:2] in names)


def command_tree(command: click.Command) -> Command:
    """Ask click."""
    context = click.Context(command)
    options = tuple(
        (*parameter.opts, *parameter.secondary_opts)
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option) and not parameter.hidden
    )
    names = command.list_commands(context) if isinstance(command, click.Group) else []
    default = getattr(command, "default", None) if isinstance(command, click.Group) else None
    return Command(options, {name: command_tree(_get(command, name)) for name in names}, default)


def _get(group: click.Command, name: str) -> click.Command:
    assert isinstance(group, click.Group)
    command = group.get_command(click.Context(group), name)
    assert command is not None, name
    return command


def walk(command: Command, name: str = "blockemu") -> Iterator[tuple[str, Command]]:
    """Every command of the tree with the words that call it."""
    yield name, command
    for word, subcommand in command.subcommands.items():
        yield from walk(subcommand, f"{name} {word}")


def sections(page: str) -> dict[str, str]:
    """The page's text by the command that each heading names."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    in_fence = False
    for line in page.splitlines():
        in_fence ^= FENCE.match(line) is not None
        heading = HEADING.match(line) if not in_fence else None
        if heading is not None:
            current = found.setdefault(heading["command"], [])
        elif line.startswith("#") and not in_fence:
            current = None
        elif current is not None:
            current.append(line)
    return {command: "\n".join(lines) for command, lines in found.items()}


def undocumented(root: Command, page: str) -> Iterator[str]:
    """Commands without a section, and options that their command's section doesn't name."""
    texts = sections(page)
    for name, command in walk(root):
        if command.subcommands:
            continue
        if name not in texts:
            yield f"{MANUAL}: no section for `{name}`: add one with the heading ## `{name}`"
            continue
        words = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", texts[name]))
        for names in command.options:
            if "--help" not in names and not words.intersection(names):
                option = max(names, key=len)
                yield f"{MANUAL}: `{name}` has {option}, its section doesn't: describe it there"


def invented(root: Command, page: str, path: str) -> Iterator[str]:
    """Options that the page tells of and that don't exist."""
    commands = dict(walk(root))
    for name, text in sections(page).items():
        if name not in commands:
            yield f"{path}: a section for `{name}`, which isn't a command: remove or rename it"
            continue
        for code in INLINE_CODE.findall(text):
            option = OPTION.match(code)
            if option is not None and not commands[name].knows(option[0]):
                yield f"{path}: `{name}` has no {option[0]}: correct the page, or add the option"
    for line in command_lines(page):
        yield from (f"{path}: {complaint}" for complaint in unknown_words(root, line))


def command_lines(page: str) -> Iterator[str]:
    """The `blockemu ...` command lines in the page's code, continued lines joined."""
    in_fence = False
    for line in page.replace("\\\n", " ").splitlines():
        if FENCE.match(line):
            in_fence = not in_fence
            continue
        for code in [line] if in_fence else INLINE_CODE.findall(line):
            words = code.strip().removeprefix("$ ").removeprefix("sudo ")
            if re.match(r"(\S*/)?blockemu ", words):
                yield words


def unknown_words(root: Command, line: str) -> Iterator[str]:
    """Sub-commands and options of a command line that don't exist."""
    command, called = root, "blockemu"
    try:
        words = shlex.split(line, comments=True)[1:]
    except ValueError:
        words = line.split()[1:]
    for word in words:
        if word in SHELL_ENDS_COMMAND:
            return
        if command.default is not None and word not in (*command.subcommands, "--help", "-h"):
            command = command.subcommands[command.default]
        option = OPTION.match(word)
        if option is not None and not command.knows(option[0]) and not root.knows(option[0]):
            yield f"in `{line}`: `{called}` has no {option[0]}: correct the page, or add the option"
        elif option is None and command.subcommands:
            if word not in command.subcommands:
                if word.islower():  # neither `...` nor COMMAND
                    yield f"in `{line}`: `{called}` has no command {word}"
                return
            command, called = command.subcommands[word], f"{called} {word}"
