# SPDX-License-Identifier: Apache-2.0
"""How a command ends: the exit status, and one line for whoever has to mend it.

What the world does wrong (an image, an address, an option's value) is `blockemu: NAME: reason` and
status 1. Wrong usage is click's message and status 2. Anything else is a bug of ours: one line that
says so, and the traceback for those who asked with -v.
"""

from __future__ import annotations

import errno
import logging
import os
import sys

import click

from blockemu.cli.verbosity import CliState, configure_logging
from blockemu.drivers.errors import ImageError
from blockemu.errors import DaemonError
from blockemu.loop.current import is_only_thread

PROGRAM = "blockemu"


def run_command(command: click.Command, arguments: list[str], state: CliState) -> int:
    """Run `command` and return its exit status; nothing is raised."""
    configure_logging(0)
    for stream in (sys.stdout, sys.stderr):
        # File names are bytes; those that aren't UTF-8 come out as they went in.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")
    try:
        status = command.main(args=arguments, prog_name=PROGRAM, standalone_mode=False, obj=state)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except (ImageError, DaemonError) as error:
        report(str(error))
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): nothing to say, and nobody to say it to.
        sys.stdout = None
    except OSError as error:
        report(describe_os_error(error))
    except Exception as error:
        report_bug(error, verbose=state.verbosity > 0)
    return 1


def leave(status: int) -> None:
    """End the process here, if nothing is left to wait for; else return.

    Taking the interpreter apart, module by module, takes 15 ms: a sixth of a short command.
    """
    if not is_only_thread():
        return
    logging.shutdown()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return  # the interpreter's own end knows what to say of it
    os._exit(status)


def describe_os_error(error: OSError) -> str:
    """`NAME: reason` of an error of the host, as far as it names anything."""
    reason = error.strerror or errno.errorcode.get(error.errno or 0, "I/O error")
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def report_bug(error: Exception, *, verbose: bool) -> None:
    """One line about something that should not have happened."""
    if verbose:
        import traceback  # a bug may take its time

        traceback.print_exception(error)
    report(
        f"internal error: {type(error).__name__}: {error} (a bug in blockemu: please report it, "
        "with what the same command prints when run with -v)"
    )


def report(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    try:
        click.echo(f"{PROGRAM}: {one_line(message)}", err=True)
    except OSError:
        pass  # stderr is gone; the exit status still speaks


def one_line(text: str) -> str:
    """`text` with control characters escaped, so that a file's name can't forge a second line."""
    return "".join(c if c.isprintable() or _is_raw_byte(c) else _escaped(c) for c in text)


def _is_raw_byte(character: str) -> bool:
    """A byte of a file name that isn't UTF-8 (PEP 383)."""
    return "\udc80" <= character <= "\udcff"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
