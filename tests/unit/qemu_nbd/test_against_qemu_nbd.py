# SPDX-License-Identifier: Apache-2.0
"""The same command line for qemu-nbd and for blockemu nbd: what clients are told, what they read
and write, who gets in, and how it ends.

Differences, all of them:
- a raw image whose length isn't one of sectors: qemu-nbd adds the rest of the last one;
- sizes (`-o 1M`) may have suffixes;
- an encrypted image's smallest block: 512 bytes; ours aligns;
- a client that names no export gets the one that there is, whatever it is called (so `-x name`
  doesn't hide it); qemu-nbd refuses;
- wrong usage is exit status 2; qemu-nbd has 1 for everything (REFUSED);
- bitmaps are offered in the order given; qemu-nbd turns it round;
- `-b` is 127.0.0.1 by default, not 0.0.0.0, for NBD has no passwords; a unix socket is its owner's
  (0600) where qemu-nbd leaves it to the umask; `-k` may be relative;
- `--aio` is native by default, and goes with the page cache, too;
- the pid file is removed at the end.
"""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.peers.nbd_command import PROGRAMS, NbdCommand
from tests.peers.nbd_tools import NbdCopy
from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.peers.requirement import require_peer

MIB = 1 << 20
BOTH = tuple(PROGRAMS)
READY_S = 30.0


@pytest.fixture(scope="module", autouse=True)
def _peers() -> None:
    for peer in ("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo", "nbdcopy"):
        require_peer(peer)


def make_images(folder: Path) -> None:
    """The same in every folder."""
    folder.mkdir()
    (folder / "disk.raw").write_bytes(bytes(range(256)) * 8192)
    disk = QemuImg.create(folder / "disk.qcow2", 8 * MIB)
    QemuIo(disk, fmt="qcow2").run("write -P 1 1M 64k", "write -P 2 5M 128k")
    run_tool(["qemu-img", "snapshot", "-c", "before", disk])
    run_tool(["qemu-img", "bitmap", "--add", "-f", "qcow2", disk, "b0"])
    QemuIo(disk, fmt="qcow2").run("write -P 3 1M 1M")
    # Named as in the folders into which all of it is copied.
    top = ["-b", disk.name, "-F", "qcow2", str(folder / "top.qcow2")]
    run_tool(["qemu-img", "create", "-q", "-f", "qcow2", *top])
    run_tool(["qemu-img", "bitmap", "--add", "-f", "qcow2", folder / "top.qcow2", "b1"])
    QemuIo(folder / "top.qcow2", fmt="qcow2").run("write -P 4 6M 64k", "write -z 5M 64k")
    (folder / "key").write_text("sesame")
    # qemu-img takes its time to measure how many iterations there are to a moment.
    secret = ["--object", f"secret,id=sec0,file={folder / 'key'}"]
    options = ["-o", "key-secret=sec0,iter-time=10"]
    create = [sys.executable, "-m", "blockemu", "img", "create", "-f", "luks"]
    run_tool([*create, *secret, *options, folder / "disk.luks", "1M"])


@pytest.fixture
def folders(tmp_path: Path, made: Path) -> dict[str, Path]:
    """A folder with the images for each program."""
    for program in BOTH:
        run_tool(["cp", "-r", "--sparse=always", made, tmp_path / program])
    return {program: tmp_path / program for program in BOTH}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "made"
    make_images(folder)
    return folder


def words_in(folder: Path, line: str) -> list[str]:
    """The words of a command line; an `@` is the folder."""
    return line.replace("@", f"{folder}/").split()


def describe(uri: str) -> dict[str, Any]:
    """What nbdinfo says of it, but for where it is."""
    found: dict[str, Any] = json.loads(run_tool(["nbdinfo", "--no-content", "--json", uri]).stdout)
    (export,) = found["exports"]
    del export["uri"]
    export["contexts"].sort()
    return found


def maps(uri: str, contexts: list[str]) -> dict[str, str]:
    """The map of each meta context."""
    return {name: run_tool(["nbdinfo", f"--map={name}", uri]).stdout for name in contexts}


LINES = {
    "raw": "-t -f raw @disk.raw",
    "probed": "-t @disk.qcow2",
    "read-only for two": "-t -r -e 2 -f qcow2 @disk.qcow2",
    "for all": "--persistent --shared=0 --format=qcow2 @disk.qcow2",
    "named": "-t -x a/b -D described -e 0 -f raw @disk.raw",
    "offset, writethrough": "-t -o 512 --cache=writethrough -f raw @disk.raw",
    "offset, discard": "-t -o 1048576 --discard=on --detect-zeroes=unmap -f qcow2 @disk.qcow2",
    "snapshot": "-t --load-snapshot=snapshot.name=before -f qcow2 @disk.qcow2",
    "past the cache": "-t -n --aio=native -f qcow2 @disk.qcow2",
    "directsync": "-t --cache=directsync --detect-zeroes=on -f qcow2 @disk.qcow2",
    "unsafe": "-t --cache=unsafe --aio=threads -f qcow2 @disk.qcow2",
    "image-opts": "-t --image-opts driver=qcow2,file.driver=file,file.filename=@disk.qcow2",
    "contexts": "-t -r -A -B b0 -B b1 -f qcow2 @top.qcow2",
    "contexts of a disk": "-t --allocation-depth --bitmap=b0 -f qcow2 @disk.qcow2",
    "luks": "-t --object secret,id=s,file=@key --image-opts "
    "driver=luks,key-secret=s,file.driver=file,file.filename=@disk.luks",
}
EXPORTS = {"named": "a/b"}
WRITES = (
    *("write -P 9 100k 70k", "write -z 10k 20k", "discard 0 4k", "flush"),
    "read -P 9 100k 70k",
)


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_serves_what_qemu_nbd_serves(
    folders: dict[str, Path], line: str, tmp_path: Path
) -> None:
    said, read, mapped = {}, {}, {}
    with ExitStack() as stack:
        servers = {
            program: stack.enter_context(
                NbdCommand(
                    program,
                    words_in(folder, LINES[line]),
                    socket_path=tmp_path / f"{program}.sock",
                    export=EXPORTS.get(line, ""),
                )
            )
            for program, folder in folders.items()
        }
        for program, server in servers.items():
            said[program] = describe(server.uri)
            mapped[program] = maps(server.uri, said[program]["exports"][0]["contexts"])
            copy = tmp_path / f"{program}.copy"
            NbdCopy.copy(server.uri, copy)
            read[program] = copy.read_bytes()
            if not said[program]["exports"][0]["is_read_only"]:
                QemuIo(server.uri).run(*WRITES)
    if line == "luks":
        for one in said.values():
            del one["exports"][0]["block_size_minimum"]
    assert said["blockemu"] == said["qemu-nbd"]
    assert mapped["blockemu"] == mapped["qemu-nbd"]
    assert read["blockemu"] == read["qemu-nbd"]
    for name in ("disk.raw", "disk.qcow2"):
        fmt = name.removeprefix("disk.")
        QemuImg.compare(*(folder / name for folder in folders.values()), one_fmt=fmt, other_fmt=fmt)


@pytest.mark.parametrize("program", BOTH)
def test_a_temporary_overlay_takes_the_writes(
    folders: dict[str, Path], program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    monkeypatch.setenv("TMPDIR", str(overlays))
    disk = folders[program] / "disk.qcow2"
    before = disk.read_bytes()
    server = NbdCommand(
        program, ["-t", "-s", "-f", "qcow2", disk], socket_path=tmp_path / "s"
    )  # fmt: skip
    with server:
        QemuIo(server.uri).run("write -P 9 1M 2M", "read -P 9 1M 2M", "read -P 2 5M 128k")
        assert os.listdir(overlays) == []
    assert disk.read_bytes() == before


# --- who gets in, and when it ends ---


@contextmanager
def client(path: Path, *, negotiated: bool) -> Iterator[socket.socket]:
    """One that has seen the server's greeting, and has chosen its export if `negotiated`."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(READY_S)
        sock.connect(str(path))
        assert sock.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGIC")
        if negotiated:
            sock.sendall(b"\0\0\0\3IHAVEOPT" + (1).to_bytes(4, "big") + bytes(4))
            assert len(sock.recv(10, socket.MSG_WAITALL)) == 10
        yield sock
        if negotiated:
            with suppress(BrokenPipeError):  # the server may be gone
                sock.sendall(bytes.fromhex("25609513 0000 0002") + bytes(20))


def is_let_in(sock: socket.socket, *, within_s: float) -> bool | None:
    """Whether the server greets; None, when it neither does nor hangs up."""
    sock.settimeout(within_s)
    try:
        return bool(sock.recv(18))
    except TimeoutError:
        return None
    except ConnectionError:
        return False


def raw_server(folders: dict[str, Path], program: str, path: Path, *words: str) -> NbdCommand:
    return NbdCommand(
        program, [*words, "-f", "raw", folders[program] / "disk.raw"], socket_path=path
    )


@pytest.mark.parametrize("program", BOTH)
@pytest.mark.parametrize("shared", [1, 2])
def test_one_client_more_waits_until_one_leaves(
    folders: dict[str, Path], program: str, shared: int, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    words = ["-t", *(["-e", str(shared)] if shared > 1 else [])]
    with (
        raw_server(folders, program, path, *words),
        socket.socket(socket.AF_UNIX) as late,
    ):
        with client(path, negotiated=True):
            others = [client(path, negotiated=True) for _ in range(shared - 1)]
            for other in others:
                other.__enter__()
            late.connect(str(path))
            assert is_let_in(late, within_s=0.2) is None
        assert is_let_in(late, within_s=READY_S) is True


@pytest.mark.parametrize("program", BOTH)
def test_the_end_comes_with_the_last_client_and_who_waited_is_sent_away(
    folders: dict[str, Path], program: str, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    server = raw_server(folders, program, path)
    with server, socket.socket(socket.AF_UNIX) as late:
        with client(path, negotiated=True):
            late.connect(str(path))
        assert server.wait() == 0
        assert is_let_in(late, within_s=READY_S) is False


@pytest.mark.parametrize("program", BOTH)
def test_who_only_asks_or_is_refused_does_not_end_it(
    folders: dict[str, Path], program: str, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    server = raw_server(folders, program, path)
    with server:
        with client(path, negotiated=False):
            pass
        run_tool(["nbdinfo", "--list", server.uri])
        assert run_tool(["nbdinfo", server.export_uri("nosuch")], check=False).code == 1
        assert server.running
        with client(path, negotiated=True):
            pass
        assert server.wait() == 0


@pytest.mark.parametrize("program", BOTH)
def test_a_client_that_stays_does_not_hold_up_a_signal(
    folders: dict[str, Path], program: str, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    server = raw_server(folders, program, path)
    with server, client(path, negotiated=True):
        server.stop()


# --- going to the background ---


def wait_for_end(pid: int) -> Callable[[], None]:
    """A function that waits for a process that isn't our child."""
    fd = os.pidfd_open(pid)

    def wait() -> None:
        try:
            assert select.select([fd], [], [], READY_S)[0], "it goes on"
        finally:
            os.close(fd)

    return wait


@pytest.mark.parametrize("program", BOTH)
def test_fork_returns_when_it_serves_and_says_nothing(
    folders: dict[str, Path], program: str, tmp_path: Path
) -> None:
    path, pid_path = tmp_path / "s", tmp_path / "pid"
    words = ["--fork", "--pid-file", str(pid_path), "-k", str(path), "-f", "raw"]
    done = subprocess.run(
        [*PROGRAMS[program], *words, folders[program] / "disk.raw"],
        capture_output=True, timeout=READY_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    text = pid_path.read_text()
    pid = int(text)
    wait = wait_for_end(pid)
    assert text == f"{pid}\n"
    assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null"] * 3
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    with client(path, negotiated=True):
        pass
    wait()
    assert not path.exists()
    if program == "blockemu":
        assert not pid_path.exists()


@pytest.mark.parametrize("program", BOTH)
def test_fork_that_fails_says_why(program: str, tmp_path: Path) -> None:
    result = run_tool(
        [*PROGRAMS[program], "--fork", "-k", tmp_path / "s", "-f", "raw", tmp_path / "nosuch"],
        check=False,
    )
    assert result.code == 1
    assert "No such file or directory" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_pid_file_of_a_server_that_runs_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pid_path = tmp_path / "pid"
    words = ["-t", "--pid-file", str(pid_path), "-f", "raw", str(folders["blockemu"] / "disk.raw")]
    other = ["--pid-file", str(pid_path), "-f", "raw", str(folders["qemu-nbd"] / "disk.raw")]
    with (
        NbdCommand("blockemu", words, socket_path=tmp_path / "s") as server,
        client(tmp_path / "s", negotiated=False),
    ):
        assert pid_path.read_text() == f"{server.pid}\n"
        result = run_tool([*PROGRAMS["blockemu"], *other, "-k", tmp_path / "t"], check=False)
    assert result.code == 1
    assert result.stderr == f"blockemu: {pid_path}: belongs to a server that runs\n"
    assert not (tmp_path / "t").exists()
    assert not pid_path.exists()


def test_a_unix_socket_is_its_owners_and_may_be_relative(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    done = subprocess.run(
        [*PROGRAMS["blockemu"], "--fork", "--pid-file", "pid", "-k", "sock", "disk.raw"],
        cwd=folders["blockemu"], timeout=READY_S, check=True,
    )  # fmt: skip
    assert done.returncode == 0
    path = folders["blockemu"] / "sock"
    wait = wait_for_end(int((folders["blockemu"] / "pid").read_text()))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with client(path, negotiated=True):
        pass
    wait()
    assert not path.exists()


# --- command lines that can't be meant ---

REFUSED = {
    "-f raw @nosuch": (1, "No such file or directory"),
    "-f qcow2 @disk.raw": (1, "not a qcow2 image"),
    "-f raw -B nosuch @disk.raw": (1, "Bitmap 'nosuch' is not found"),
    "-f raw -o 99999999 @disk.raw": (1, "lies past the disk's end"),
    "-f qcow2 -l nosuch @disk.qcow2": (1, "no snapshot"),
    "-f raw --detect-zeroes=unmap @disk.raw": (1, "goes with --discard unmap only"),
    "-f raw --object foo,id=x @disk.raw": (1, "there is no object type 'foo'"),
    "-f raw --pid-file=/nosuch/pid @disk.raw": (1, "No such file or directory"),
    "-f raw -p 0 -b nosuch.invalid @disk.raw": (1, "bad address"),
    "-f foo @disk.raw": (2, "'foo' is not one of"),
    "-f raw": (2, "Missing argument 'IMAGE'"),
    "-f raw @disk.raw @disk.qcow2": (2, "unexpected extra argument"),
    "-f raw -e x @disk.raw": (2, "'x' is not a valid integer"),
    "-f raw -e -1 @disk.raw": (2, "-1 is not in the range"),
    "-f raw -o x @disk.raw": (2, "'x'"),
    "-f raw -P 1 @disk.raw": (2, "No such option '-P'"),
    "-f raw --cache=foo @disk.raw": (2, "'foo' is not one of"),
    "-f raw --aio=foo @disk.raw": (2, "'foo' is not one of"),
    "-f raw --discard=foo @disk.raw": (2, "'foo' is not one of"),
    "-f raw --detect-zeroes=foo @disk.raw": (2, "'foo' is not one of"),
    "-f raw -n --cache=none @disk.raw": (2, "--nocache is --cache none"),
    "-f raw --image-opts driver=raw": (2, "mutually exclusive"),
    "-L @disk.raw": (2, "--list takes no image"),
    "-c /dev/nbd0 @disk.raw": (2, "nbd-client -unix PATH /dev/nbd0"),
    "-d /dev/nbd0": (2, "nbd-client -d /dev/nbd0"),
    "--selinux-label=x @disk.raw": (2, "the service manager"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_both_refuse(
    line: str, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from blockemu.cli import main

    def place_of(program: str) -> list[str]:
        return [] if "-b " in line else ["-k", str(folders[program] / "s")]

    theirs = run_tool(
        ["qemu-nbd", *place_of("qemu-nbd"), *words_in(folders["qemu-nbd"], line)], check=False
    )
    with pytest.raises(SystemExit) as caught:
        main(["nbd", *place_of("blockemu"), *words_in(folders["blockemu"], line)])
    code, reason = REFUSED[line]
    error = capfd.readouterr().err
    assert (caught.value.code, theirs.code) == (code, 1)
    assert reason in error
    assert "internal error" not in error


def test_sockets_that_were_handed_over_are_the_only_ones(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As with qemu-nbd."""
    for program in BOTH:
        words = ["-k", str(tmp_path / "k"), "-f", "raw", str(folders[program] / "disk.raw")]
        server = NbdCommand(program, words, socket_path=tmp_path / "s")
        with server:
            assert server.wait() in (1, 2)
        assert "socket" in server.stderr


# --- the other way to ask ---


def test_list_says_what_qemu_nbd_says(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from blockemu.cli import main

    for program in BOTH:
        words = words_in(folders[program], "-t -x disk -D described -f qcow2 @disk.qcow2")
        path = tmp_path / f"{program}.sock"
        with NbdCommand(program, words, socket_path=path):
            theirs = run_tool(["qemu-nbd", "-L", "-k", path])
            capfd.readouterr()
            with pytest.raises(SystemExit) as caught:
                main(["nbd", "-L", "-k", str(path)])
            assert caught.value.code == 0
            assert capfd.readouterr().out == theirs.stdout


def test_nbdinfo_starts_it_as_it_starts_qemu_nbd(folders: dict[str, Path]) -> None:
    """By socket activation, which is how libnbd runs servers."""
    sizes = [
        run_tool(["nbdinfo", "--size", "--", "[", *command, "-r", "-f", "qcow2",
                  folders[program] / "disk.qcow2", "]"]).stdout
        for program, command in PROGRAMS.items()
    ]  # fmt: skip
    assert sizes == [f"{8 * MIB}\n"] * 2


def test_a_client_that_names_no_export_gets_the_one_there_is(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    words = words_in(folders["blockemu"], "-t -x x -f raw @disk.raw")
    with NbdCommand("blockemu", words, socket_path=tmp_path / "s") as server:
        assert describe(server.export_uri("x")) == describe(server.export_uri(""))
