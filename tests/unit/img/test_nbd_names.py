# SPDX-License-Identifier: Apache-2.0
"""Images on NBD servers: everything that takes an image takes one, and says what qemu-img says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.peers.blockemu import BlockemuDaemon
from tests.peers.nbdkit import NbdKit
from tests.peers.process import nbd_uri
from tests.peers.qemu import QemuImg, QemuIo, QemuNbd, run_tool
from tests.peers.requirement import require_peer
from tests.peers.scripted_nbd import Client, ScriptedNbd
from tests.unit.img.side_by_side import Animal, our_output, ours, random_bytes, theirs

MIB = 1 << 20


@pytest.fixture(scope="module")
def served(
    zoo: dict[str, Animal], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """URIs of some of the zoo's images on servers of several kinds; to read only."""
    for peer in ("qemu-nbd", "nbdkit"):
        require_peer(peer)
    folder = tmp_path_factory.mktemp("sockets")
    with ExitStack() as stack:
        uris = {}
        for name in ("raw-sparse", "raw-odd-data", "qcow2-65536-1.1", "chain"):
            animal = zoo[name]
            server = QemuNbd(
                animal.path, fmt=animal.fmt, socket_path=folder / name, export="e", read_only=True
            )
            uris[f"qemu-nbd of {name}"] = stack.enter_context(server).uri
        for name in ("raw-sparse", "raw-full", "qcow2-4096-0.10"):
            kit = NbdKit(zoo[name].path, socket_path=folder / f"{name}-kit", extra=["-r"])
            uris[f"nbdkit of {name}"] = stack.enter_context(kit).uri
        daemon = BlockemuDaemon(
            zoo["chain"].path, fmt="qcow2", socket_path=folder / "own", export="e", read_only=True
        )
        uris["blockemu of chain"] = stack.enter_context(daemon).uri
        yield uris


SERVED = (
    *("qemu-nbd of raw-sparse", "qemu-nbd of raw-odd-data", "qemu-nbd of qcow2-65536-1.1"),
    *("qemu-nbd of chain", "nbdkit of raw-sparse", "nbdkit of raw-full"),
    *("nbdkit of qcow2-4096-0.10", "blockemu of chain"),
)


@pytest.mark.parametrize(
    "command",
    [
        ("info",),
        ("info", "--output=json"),
        ("info", "--backing-chain"),
        ("map",),
        ("map", "--output=json"),
        ("measure", "-O", "qcow2"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("image", SERVED)
def test_what_is_said_of_an_export_is_what_qemu_img_says(
    served: dict[str, str], image: str, command: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    result, expected = ours(capfd, *command, served[image]), theirs(*command, served[image])
    assert result.code == expected.code
    if "--output=json" in command:
        assert json.loads(result.out) == json.loads(expected.out)
    else:
        assert result.out == expected.out


@pytest.mark.parametrize("image", SERVED)
def test_an_export_is_read(
    served: dict[str, str], image: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fmt = "qcow2" if image == "nbdkit of qcow2-4096-0.10" else "raw"
    QemuImg.convert(served[image], tmp_path / "theirs", source_fmt=fmt, target_fmt="raw")
    our_output("convert", "-f", fmt, served[image], tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert ours(capfd, "compare", served[image], tmp_path / "ours").code == 0
    our_output("dd", f"if={served[image]}", f"of={tmp_path / 'part'}", "bs=512", "skip=1")
    assert (tmp_path / "part").read_bytes() == (tmp_path / "theirs").read_bytes()[512:]


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit", "blockemu"])
def test_an_export_is_written(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`convert -n`, also to a qcow2 image on the server, and an image is resized no further."""
    source, disk, sock = tmp_path / "source", tmp_path / "disk", tmp_path / "sock"
    source.write_bytes(bytes(MIB) + random_bytes(1, MIB) + bytes(MIB))
    disk.write_bytes(random_bytes(2, 3 * MIB))
    server = {
        "qemu-nbd": lambda: QemuNbd(disk, fmt="raw", socket_path=sock),
        "nbdkit": lambda: NbdKit(disk, socket_path=sock),
        "blockemu": lambda: BlockemuDaemon(disk, fmt="raw", socket_path=sock, export="x"),
    }[kind]()
    with server:
        our_output("convert", "-n", "-f", "raw", "-O", "raw", source, server.uri)
        refused = ours(capfd, "convert", "-f", "raw", source, server.uri)
        assert refused.code == 1
        assert "an image can't be created there" in refused.err
        assert ours(capfd, "resize", "-f", "raw", server.uri, "4M").code == 1
    assert disk.read_bytes() == source.read_bytes()
    QemuImg.create(disk, 3 * MIB)
    with disk.open("ab") as file:
        file.truncate(8 * MIB)
    with QemuNbd(disk, fmt="raw", socket_path=sock) as server:
        our_output("convert", "-n", "-f", "raw", "-O", "qcow2", source, server.uri)
        our_output("check", server.uri)
    assert ours(capfd, "compare", "-f", "raw", "-F", "qcow2", source, disk).code == 0


def test_two_daemons_are_a_chain(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a client of the second writes lies in the first one's file; both see it."""
    disk = tmp_path / "disk"
    disk.write_bytes(random_bytes(3, 2 * MIB))
    with (
        BlockemuDaemon(disk, fmt="raw", socket_path=tmp_path / "1", export="one") as first,
        BlockemuDaemon(first.uri, fmt="raw", socket_path=tmp_path / "2", export="two") as second,
    ):
        QemuIo(second.uri).run("write -P 7 100k 300k", "flush", "write -z 1M 64k")
        for uri in (first.uri, second.uri):
            QemuIo(uri).run("read -P 7 100k 300k", "read -P 0 1M 64k")
        out = ours(capfd, "compare", first.uri, second.uri)
        assert out.code == 0, out.err
    content = disk.read_bytes()
    assert content[100 << 10 : 400 << 10] == b"\7" * (300 << 10)
    assert content[MIB : MIB + 65536] == bytes(65536)


def test_backing_file_on_a_server_is_used_as_qemu_uses_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    base.write_bytes(random_bytes(4, MIB))
    other.write_bytes(base.read_bytes()[: MIB // 2] + random_bytes(5, MIB // 2))
    with (
        QemuNbd(base, fmt="raw", socket_path=tmp_path / "1", read_only=True, shared=4) as server,
        NbdKit(other, socket_path=tmp_path / "2", extra=["-r"]) as second,
    ):
        for name, create in (("ours", our_output), ("theirs", theirs)):
            words = ("create", "-f", "qcow2", "-b", server.uri, "-F", "raw")
            create(*words, tmp_path / name)
            QemuIo(tmp_path / name, fmt="qcow2").run("write -P 9 64k 64k")
        for command in ("info", "map", "info --backing-chain", "map --output=json"):
            words = (*command.split(), "-f", "qcow2", tmp_path / "ours")
            assert ours(capfd, *words).out == theirs(*words).out
        assert ours(capfd, "info", tmp_path / "ours").code == 0
        unproved = ours(capfd, "map", tmp_path / "ours")
        assert unproved.code == 1
        assert "its format was only guessed" in unproved.err
        both = ("-f", "qcow2", "-F", "qcow2", tmp_path / "ours", tmp_path / "theirs")
        assert ours(capfd, "compare", *both).code == 0
        our_output("rebase", "-f", "qcow2", "-b", second.uri, "-F", "raw", tmp_path / "ours")
        assert QemuImg.info(tmp_path / "ours")["backing-filename"] == second.uri
        assert theirs("compare", *both).code == 0
        our_output("rebase", "-f", "qcow2", "-b", "", tmp_path / "ours")
        assert theirs("compare", *both).code == 0


def test_backing_file_on_a_server_that_is_gone_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = nbd_uri(tmp_path / "gone")
    run_tool(
        ["qemu-img", "create", "-u", "-f", "qcow2", "-b", uri, "-F", "raw", tmp_path / "a", "1M"]
    )
    result = ours(capfd, "map", "-f", "qcow2", tmp_path / "a")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert f"connecting to {tmp_path / 'gone'} failed: No such file or directory" in result.err


def test_export_that_names_a_file_isnt_believed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever can write to an export could have put a header there."""
    secret, disk = tmp_path / "secret", tmp_path / "disk"
    secret.write_bytes(b"secret" * 1000)
    QemuImg.create(disk, None, backing=secret, backing_fmt="raw")
    with QemuNbd(
        disk, fmt="raw", socket_path=tmp_path / "sock", read_only=True, shared=4
    ) as server:
        for command in ("map", "compare", "convert"):
            more = [] if command == "map" else [str(tmp_path / "target")]
            result = ours(capfd, command, server.uri, *more)
            assert result.code != 0
            assert f"names another file, '{secret}', and its format was only guessed" in result.err
        assert ours(capfd, "map", "-f", "qcow2", server.uri).code == 0


def bad_greeting(client: Client) -> None:
    client.send(b"HTTP/1.1 400 Bad Request")


def bad_cookie(client: Client) -> None:
    client.negotiate()
    while True:
        client.request()
        client.send(bytes.fromhex("67446698 00000000 ffffffffffffffff"))


def short_data(client: Client) -> None:
    client.negotiate()
    cookie, length = client.request()[2], 0
    client.send(bytes.fromhex("67446698 00000000") + cookie + b"x" * length + b"some")


def huge_chunk(client: Client) -> None:
    client.negotiate(structured=True)
    while True:
        cookie = client.request()[2]
        client.send(bytes.fromhex("668e33ef 0001 0001") + cookie + bytes.fromhex("ffffffff"))


def huge_export(client: Client) -> None:
    client.negotiate(size=2**64 - 1)


def bad_blocks(client: Client) -> None:
    client.negotiate(infos=bytes.fromhex("0003 00000003 00001000 02000000"))


def zero_blocks(client: Client) -> None:
    client.negotiate(infos=bytes.fromhex("0003 00000000 00001000 02000000"))


def ragged_export(client: Client) -> None:
    client.negotiate(size=1000, infos=bytes.fromhex("0003 00000200 00001000 02000000"))


def wants_tls(client: Client) -> None:
    client.greet()
    while True:
        client.reply(client.option()[0], 0x80000005, b"get a certificate")


def endless_replies(client: Client) -> None:
    client.greet()
    option = client.option()[0]
    while True:
        client.reply(option, 3, bytes(16000))


def oldstyle(client: Client) -> None:
    client.send(b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(200))


LIARS = {
    bad_greeting: "is no NBD server",
    bad_cookie: "answered a request that it wasn't sent",
    short_data: "the server hung up",
    huge_chunk: "sent 4294967295 bytes in a data chunk",
    huge_export: "server says that the export has 18446744073709551615 bytes",
    bad_blocks: "server's minimum block size is 3",
    zero_blocks: "server's minimum block size is 0",
    ragged_export: "has 1000 bytes, in blocks of 512",
    wants_tls: "the server wants TLS: it takes tls-creds=, or a nbds:// URI ('get a certificate')",
    endless_replies: "server answers EXTENDED_HEADERS with reply type 0x3",
    oldstyle: "speaks the old style of NBD",
}


@pytest.mark.parametrize("liar", LIARS, ids=lambda liar: liar.__name__)
def test_a_server_that_lies_is_one_line_that_names_it(
    liar: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ScriptedNbd(tmp_path / "sock", liar):  # type: ignore[arg-type]
        uri = f"nbd+unix://?socket={tmp_path / 'sock'}"
        result = ours(capfd, "convert", "-f", "raw", uri, tmp_path / "target")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert LIARS[liar] in result.err  # type: ignore[index]
    assert uri in result.err
    assert not (tmp_path / "target").exists()


def test_an_error_of_the_server_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB) + b"x" * MIB)
    server = NbdKit(
        disk,
        socket_path=tmp_path / "sock",
        filters=["error"],
        extra=["error-pread=ENOSPC", "error-pread-rate=100%"],
    )
    with server:
        result = ours(capfd, "convert", "-f", "raw", server.uri, tmp_path / "target")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "No space left on device (the NBD server" in result.err
    assert str(tmp_path / "sock") in result.err


@pytest.mark.parametrize("writes", [False, True], ids=["read", "write"])
def test_second_interrupt_leaves_a_server_that_never_answers(writes: bool, tmp_path: Path) -> None:
    """The first one waits for what is in flight, as for any image."""
    asked = threading.Event()

    def serve(client: Client) -> None:
        client.negotiate()
        client.request()
        asked.set()
        while client.receive(1):
            pass

    disk = tmp_path / "disk"
    disk.write_bytes(random_bytes(6, MIB))
    with ScriptedNbd(tmp_path / "sock", serve):
        names = [f"nbd+unix://?socket={tmp_path / 'sock'}", str(tmp_path / "target")]
        more = ["-n", str(disk), names[0]] if writes else names
        command = [sys.executable, "-m", "blockemu", "img", "convert", "-f", "raw", *more]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
            assert asked.wait(30)
            while child.poll() is None:
                child.send_signal(signal.SIGINT)
                try:
                    child.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
            assert child.stderr is not None
            assert child.stderr.read().count(b"\n") <= 1
        assert child.returncode != 0
    assert not (tmp_path / "target").exists()
