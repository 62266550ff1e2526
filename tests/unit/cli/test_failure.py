# SPDX-License-Identifier: Apache-2.0
"""Bad input ends with one line that names the thing and the reason; bugs say that they are bugs."""

from __future__ import annotations

import socket
from pathlib import Path

import click
import pytest

from blockemu.cli import main
from blockemu.cli.failure import one_line, run_command
from blockemu.cli.verbosity import CliState
from blockemu.listen import listen_unix, remove_unix_path


def fails(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command, which must exit with 1 after one line; the line without the program."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    output = capfd.readouterr()
    assert caught.value.code == 1
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("blockemu: ")
    assert "internal error" not in output.err
    return output.err.removeprefix("blockemu: ").rstrip("\n")


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(bytes(1 << 20))
    return "disk.raw"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.raw", "none.raw: No such file or directory"),
        (".", ".: Is a directory"),
        ("-f qcow2 disk.raw", "disk.raw: not a qcow2 image"),
        ("disk.raw disk.raw", "disk.raw: export name 'disk' is taken by disk.raw"),
        ("disk.raw --name a --name b", "b: there are more --name options than images"),
        ("disk.raw --iothread a --iothread b", "--iothread: given 2 times for 1 images"),
        ("disk.raw --bind a..b", "a..b:10809: bad address: "),
        ("disk.raw --bind 192.0.2.1", "192.0.2.1:10809: Cannot assign requested address"),
        ("disk.raw --socket disk.raw", "disk.raw: exists and isn't a socket"),
        ("disk.raw --socket none/s", "none/s: No such file or directory"),
        ("disk.raw --socket s --control none/s", "none/s: No such file or directory"),
        ("disk.raw --socket s --control s", "s: is given to both --socket and --control"),
        ("disk.raw /dev/null --port 0", "/dev/null: "),
    ],
)
def test_serve_of_what_can_not_be_is_one_line(
    raw: str, capfd: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert fails(capfd, "serve", *arguments.split()).startswith(message)


def test_serve_on_socket_in_use_is_one_line(raw: str, capfd: pytest.CaptureFixture[str]) -> None:
    listener = listen_unix("s")
    try:
        line = fails(capfd, "serve", raw, "--socket", "s")
    finally:
        remove_unix_path(listener)
    assert line == "s: in use by a running server"


def test_serve_on_port_in_use_is_one_line(raw: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = fails(capfd, "serve", raw, "--port", str(port))
    assert line == f"127.0.0.1:{port}: Address already in use"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x.raw", "x.raw: a new image needs a size"),
        ("x.raw 12x", "x.raw: '12x' is not a size"),
        ("x.raw 1M -o size=2M", "x.raw: the size is given twice"),
        ("-f vmdk x 1M", "x: can't create format 'vmdk'; known: luks, qcow2, raw"),
        ("-o nope=1 x 1M", "x: format raw has no option 'nope'"),
        ("-o preallocation=metadata x 1M", "x: format raw has no preallocation 'metadata'"),
        ("-o preallocation x 1M", "x: option 'preallocation' needs a value"),
        ("-b disk.raw -F raw x 1M", "x: format raw has no backing files"),
        ("-f qcow2 -b disk.raw x", "x: the backing file's format must be given"),
        ("-f qcow2 -b none -F raw x", "none: is the backing file of x: No such file"),
        ("-f qcow2 -b x -F raw x", "x: an image can't be its own backing file"),
        ("-f qcow2 -F raw x 1M", "x: a backing format without a backing file"),
        ("-f qcow2 -u -b none -F raw x", "x: a new image needs a size when"),
        ("-f qcow2 -o lazy_refcounts=maybe x 1M", "x: option 'lazy_refcounts' is 'on' or 'off'"),
        ("-f qcow2 -o cluster_size=1000 x 1M", "x: cluster_size must be a power of two"),
        ("-f qcow2 -o cluster_size=12x x 1M", "x: option 'cluster_size': '12x' is not a size"),
        ("none/x 1M", "none/x: No such file or directory"),
    ],
)
def test_create_of_what_can_not_be_is_one_line_and_leaves_no_file(
    raw: str, capfd: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert fails(capfd, "img", "create", *arguments.split()).startswith(message)
    assert [path.name for path in Path().iterdir()] == [raw]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none", "none: No such file or directory"),
        ("-f qcow2 disk.raw", "disk.raw: not a qcow2 image"),
        ("-f vmdk disk.raw", "disk.raw: there is no image format 'vmdk'"),
        ("-f file disk.raw", "disk.raw: there is no image format 'file'"),
    ],
)
def test_info_of_what_can_not_be_is_one_line(
    raw: str, capfd: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert fails(capfd, "img", "info", *arguments.split()).startswith(message)


def test_name_with_line_break_makes_no_second_line(
    raw: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fails(capfd, "img", "info", "a\nb\x1b[31m") == (
        "a\\nb\\x1b[31m: No such file or directory"
    )


def test_name_that_is_not_utf8_comes_out_as_it_went_in() -> None:
    assert one_line("\udcff\n") == "\udcff\\n"


def test_wrong_usage_exits_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["serve"], ["nope"], ["serve", "x", "--socket-mode", "660"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "Traceback" not in capfd.readouterr().err


@click.command()
def broken() -> None:
    raise KeyError("oops")


def test_bug_is_one_line_that_says_how_to_report_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(broken, [], CliState()) == 1
    error = capfd.readouterr().err
    assert error.startswith("blockemu: internal error: KeyError: 'oops'")
    assert "report" in error
    assert error.count("\n") == 1


def test_bug_with_verbose_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(broken, [], CliState(verbosity=1)) == 1
    assert "Traceback" in capfd.readouterr().err
