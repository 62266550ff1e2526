# SPDX-License-Identifier: Apache-2.0
"""`blockemu nbd info` and `list` say what nbdinfo says, of servers of three makes.

Differences: `content`, which nbdinfo finds by reading and ours never shows (nbdinfo's --no-content
is compared with); people's output is indented by four spaces, not by tabs; an export that is listed
and then refused ends nbdinfo's list, with JSON that is cut off, and ours goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.peers.blockemu import BlockemuDaemon
from tests.peers.nbdkit import NbdKit
from tests.peers.process import nbd_uri
from tests.peers.qemu import QemuImg, QemuIo, QemuNbd, run_tool
from tests.peers.requirement import require_peer
from tests.unit.nbdinfo.side_by_side import ours, theirs

MIB = 1 << 20


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """By name: exports of servers that run."""
    for peer in ("qemu-nbd", "qemu-img", "qemu-io", "nbdkit", "nbdinfo"):
        require_peer(peer)
    folder = tmp_path_factory.mktemp("nbd")
    base = QemuImg.create(folder / "base.qcow2", 8 * MIB)
    QemuIo(base, fmt="qcow2").run("write -P 1 1M 64k", "write -P 2 5M 128k")
    top = QemuImg.create(folder / "top.qcow2", None, backing=base, backing_fmt="qcow2")
    run_tool(["qemu-img", "bitmap", "--add", "-f", "qcow2", top, "b0"])
    QemuIo(top, fmt="qcow2").run("write -P 3 2M 64k", "write -z 5M 64k")
    odd = folder / "odd.raw"
    odd.write_bytes(b"x" * 1_234_567)
    empty = folder / "empty.raw"
    empty.touch()
    with ExitStack() as stack:
        qemu = QemuNbd(top, fmt="qcow2", socket_path=folder / "q", export="a b/c", bitmaps=["b0"])
        qemu.command += ["-A", "-D", 'It\'s "a" disk']
        read_only = QemuNbd(base, fmt="qcow2", socket_path=folder / "r", read_only=True)
        kit = NbdKit(odd, socket_path=folder / "k", filters=["blocksize-policy"],
                     extra=["blocksize-minimum=1", "blocksize-preferred=64k",
                            "blocksize-maximum=1M"])  # fmt: skip
        simple = NbdKit(odd, socket_path=folder / "s", extra=["--no-sr", "-r"])
        daemon = BlockemuDaemon(
            base, odd, empty, fmt=None, socket_path=folder / "b", read_only=True
        )
        for server in (qemu, read_only, kit, simple, daemon):
            stack.enter_context(server)
        newstyle = NbdKit(empty, socket_path=folder / "n", extra=["--mask-handshake=0"])
        stack.enter_context(newstyle)
        yield {
            "qemu-nbd": qemu.uri,
            "qemu-nbd, read-only": read_only.uri,
            "nbdkit": kit.export_uri("whatever"),
            "nbdkit, simple": simple.uri,
            "nbdkit, old newstyle": newstyle.uri,
            "blockemu, default": daemon.export_uri(""),
            "blockemu, odd": daemon.export_uri("odd"),
            "blockemu, empty": daemon.export_uri("empty"),
        }


SERVED = (
    *("qemu-nbd", "qemu-nbd, read-only", "nbdkit", "nbdkit, simple", "nbdkit, old newstyle"),
    *("blockemu, default", "blockemu, odd", "blockemu, empty"),
)
PROPERTIES = (
    *("connect", "read", "write", "tls", "structured-reply", "structured", "read-only"),
    *("rotational", "cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "zero"),
)
CONTEXTS = (
    *("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"),
    *("qemu:", "base:", "nosuch", "nosuch:x"),
)


@pytest.mark.parametrize("server", SERVED)
def test_an_export_is_described_as_by_nbdinfo(
    uris: dict[str, str], server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = uris[server]
    assert ours(capfd, "info", uri).out == theirs("--no-content", uri).out.expandtabs(4)
    result = ours(capfd, "info", "--json", "--no-content", uri)
    expected = theirs("--no-content", "--json", uri)
    assert result.code == expected.code == 0
    assert json.loads(result.out) == json.loads(expected.out)
    assert list(json.loads(result.out)["exports"][0]) == list(
        json.loads(expected.out)["exports"][0]
    )
    size = ours(capfd, "info", "--size", uri), theirs("--size", uri)
    assert size[0].out == size[1].out


@pytest.mark.parametrize("server", [name for name in SERVED if name != "nbdkit, old newstyle"])
def test_all_exports_are_listed_as_by_nbdinfo(
    uris: dict[str, str], server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = uris[server]
    assert ours(capfd, "list", uri).out == theirs("--list", uri).out.expandtabs(4)
    result, expected = ours(capfd, "list", "--json", uri), theirs("--list", "--json", uri)
    assert result.code == expected.code == 0
    assert json.loads(result.out) == json.loads(expected.out)


def test_a_server_that_cannot_list_says_so(
    uris: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    uri = uris["nbdkit, old newstyle"]
    result = ours(capfd, "list", uri)
    assert result.code == theirs("--list", uri).code == 1
    assert result.err == f"blockemu: {uri}: the server speaks too old a protocol to list exports\n"


@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit", "nbdkit, simple", "blockemu, odd"])
def test_properties_are_answered_by_the_same_exit_status(
    uris: dict[str, str], server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in PROPERTIES:
        result, expected = ours(capfd, "info", "--can", name, uris[server]), theirs(
            "--can", name, uris[server]
        )  # fmt: skip
        assert (name, result.code, result.out) == (name, expected.code, expected.out)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit", "nbdkit, simple", "blockemu, odd"])
def test_maps_are_those_of_nbdinfo(
    uris: dict[str, str], server: str, context: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for flags in ([], ["--json"], ["--totals"], ["--totals", "--json"]):
        words = [f"--map={context}", *flags, uris[server]]
        result, expected = ours(capfd, "info", *words), theirs(*words)
        assert result.code == expected.code
        if result.code:
            assert f"has no meta context '{context}'" in result.err
            assert not result.out
        elif "--json" in flags:
            assert json.loads(result.out) == json.loads(expected.out)
        else:
            assert result.out == expected.out


def test_map_without_a_context_is_that_of_allocation(
    uris: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    uri = uris["qemu-nbd"]
    result = ours(capfd, "info", "--map", uri)
    assert result.out == theirs("--map", uri).out
    assert "hole,zero" in result.out


def test_a_map_of_many_extents_is_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """More than a request can ask for, and replies of more than a buffer holds."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for index in range(20_000):
            file.seek(index * 8192)
            file.write(b"x")
        file.truncate(9 << 30)
    with QemuNbd(disk, fmt="raw", socket_path=tmp_path / "s", read_only=True) as server:
        result, expected = ours(capfd, "info", "--map", server.uri), theirs("--map", server.uri)
    assert result.out == expected.out
    assert len(result.out.splitlines()) == 40_000


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["info", "http://localhost/"], "is no NBD URI"),
        (["info", "disk.raw"], "is no NBD URI"),
        (["list", "nbd+foo:///"], "there is no NBD over 'foo'"),
        (["info", "nbd+unix:///x"], "is no URI of a unix socket"),
        (["info", "nbd://localhost:1/"], "connecting to localhost:1 failed: Connection refused"),
        (["list", "nbd+unix:///?socket=/nosuch"], "/nosuch failed: No such file or directory"),
        (["info", "--can", "fly", "nbd://localhost"], "fly: is nothing that can be asked for"),
        (["info", "--totals", "nbd://localhost"], "--totals goes with --map only"),
        (["info", "--size", "--map", "nbd://localhost"], "go one at a time"),
        (["info", "--nosuch", "nbd://localhost"], "No such option"),
        (["info"], "Missing argument"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    words: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the exit status 1, for 2 is an answer of --can."""
    result = ours(capfd, *words)
    assert result.code == 1
    assert reason in result.err.splitlines()[-1]


@pytest.mark.parametrize("flags", [[], ["--json"], ["--map"], ["--size"], ["--can", "connect"]])
def test_an_unknown_export_is_refused_in_the_servers_words(
    uris: dict[str, str], flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    uri = uris["qemu-nbd"].replace("a%20b%2Fc", "nosuch")
    result = ours(capfd, "info", *flags, uri)
    assert result.code == theirs(*flags, uri).code == 1
    said = "the server has no such export ('export 'nosuch' not present')"
    assert result.err == f"blockemu: {uri}: {said}\n"


def test_tls_that_the_server_wants_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    psk = tmp_path / "psk"
    psk.write_text("user:" + "ab" * 32 + "\n")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(4096))
    kit = NbdKit(disk, socket_path=tmp_path / "s", extra=["--tls=require", f"--tls-psk={psk}"])
    with kit:
        result = ours(capfd, "info", kit.uri)
    assert result.code == 1
    assert "the server wants TLS" in result.err


REFUSING = """
case "$1" in
    list_exports) printf 'NAMES\\nfirst\\nbad\\nlast\\n' ;;
    open) if test "$3" = bad; then echo "EPERM not for you" >&2; exit 1; fi ;;
    get_size) echo 1M ;;
    pread) head -c "$3" /dev/zero ;;
    *) exit 2 ;;
esac
"""


def test_an_export_that_is_refused_ends_no_list(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "plugin.sh"
    script.write_text(f"#!/bin/sh\n{REFUSING}")
    script.chmod(0o755)
    kit = NbdKit(script, socket_path=tmp_path / "s")
    kit.command = ["nbdkit", "-f", "sh", str(script)]
    with kit:
        result = ours(capfd, "list", "--json", nbd_uri(tmp_path / "s"))
    names = [export["export-name"] for export in json.loads(result.out)["exports"]]
    assert (result.code, names) == (1, ["first", "last"])
    assert result.err.startswith("blockemu: export 'bad': the server has no such export")
