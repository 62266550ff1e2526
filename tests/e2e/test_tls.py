# SPDX-License-Identifier: Apache-2.0
"""TLS between our server and real clients, and our client and real servers: each pair of minds
about it, good certificates and bad ones, and clients that never finish their handshake.

What every real client reads and writes through TLS is in test_client_matrix.py.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import ssl
import struct
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from cryptography import x509 as certificates
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from blockemu.cli import main
from blockemu.drivers.crypto.tls_certificates import subject_name
from tests.e2e.raw_nbd import OPTION_MAGIC
from tests.peers.blockemu import BlockemuDaemon
from tests.peers.certificates import CLIENT, Authority, Pki, distinguished_name, tls_object
from tests.peers.libnbd import require_libnbd
from tests.peers.process import ServerFailed, ServerProcess
from tests.peers.qemu import QemuNbd, ToolFailed, run_tool
from tests.peers.requirement import require_peer
from tests.unit.img.side_by_side import our_output, ours

MIB = 1 << 20
SIZE_BYTES = 8 * MIB

pytestmark = pytest.mark.usefixtures("only_ours")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    for tool in ("qemu-img", "qemu-nbd", "nbdinfo", "nbdcopy"):
        require_peer(tool)
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(3).randbytes(SIZE_BYTES))
    return path


def daemon(
    image: Path, socket_path: Path, folder: Path, *extra: str, options: str = ""
) -> BlockemuDaemon:
    """Our server with the credentials of a folder."""
    tls = ["--object", tls_object(folder, "server", options), "--tls-creds", "tls0", *extra]
    return BlockemuDaemon(image, fmt="raw", socket_path=socket_path, export="disk", extra=tls)


class TlsQemuNbd(QemuNbd):
    """qemu-nbd with the credentials of a folder."""

    def __init__(self, image: Path, socket_path: Path, folder: Path, *extra: str) -> None:
        super().__init__(image, fmt="raw", socket_path=socket_path, export="disk", shared=0)
        self.command[1:1] = [
            "--object",
            tls_object(folder, "server"),
            "--tls-creds",
            "tls0",
            *extra,
        ]


def secure_uri(socket_path: Path, folder: Path | None, *items: str) -> str:
    """libnbd's kind of URI, and ours."""
    found = [f"socket={socket_path}"]
    if folder is not None:
        found.append(f"tls-certificates={quote(str(folder))}")
    return f"nbds+unix:///disk?{'&'.join([*found, *items])}"


def plain_uri(socket_path: Path) -> str:
    return f"nbd+unix:///disk?socket={socket_path}"


def options(socket_path: Path) -> str:
    """What QEMU's tools and ours take behind --image-opts."""
    address = f"server.type=unix,server.path={socket_path}"
    return f"driver=nbd,{address},export=disk,tls-creds=tls0,tls-hostname=localhost"


# --- content ---


def test_our_img_reads_and_writes_through_tls(
    image: Path, socket_path: Path, pki: Pki, tmp_path: Path
) -> None:
    target, source = tmp_path / "copy", tmp_path / "source"
    source.write_bytes(random.Random(4).randbytes(SIZE_BYTES))
    tls = ("--object", tls_object(pki.folder, "client"))
    before = image.read_bytes()
    with daemon(image, socket_path, pki.folder):
        export = options(socket_path)
        our_output("convert", *tls, "--image-opts", export, "-O", "raw", target)
        assert target.read_bytes() == before
        server = {"type": "unix", "path": str(socket_path)}
        name = {"driver": "nbd", "server": server, "export": "disk", "tls-creds": "tls0"}
        name["tls-hostname"] = "localhost"
        to = f"json:{json.dumps({'file': name})}"
        our_output("convert", *tls, "-n", "-f", "raw", "-O", "raw", source, to)
    assert image.read_bytes() == source.read_bytes()


def test_libnbd_moves_requests_of_all_sizes(
    image: Path, socket_path: Path, pki: Pki, random_seed: int
) -> None:
    nbd = require_libnbd()
    rng = random.Random(random_seed)
    model = bytearray(image.read_bytes())
    with daemon(image, socket_path, pki.folder):
        handle = nbd.NBD()
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_tls_certificates(str(pki.folder))
        handle.set_export_name("disk")
        handle.connect_unix(str(socket_path))
        assert handle.get_tls_negotiated()
        for _ in range(60):
            length = rng.choice([1, 511, 4096, 16383, 16384, 16385, 65536, 70000, 3 * MIB])
            offset = rng.randrange(SIZE_BYTES - length)
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                handle.pwrite(data, offset)
                model[offset : offset + length] = data
            else:
                assert handle.pread(length, offset) == model[offset : offset + length]
        handle.shutdown()
    assert image.read_bytes() == model


def test_our_client_works_with_qemu_nbd(
    image: Path, socket_path: Path, pki: Pki, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(6).randbytes(SIZE_BYTES))
    uri = secure_uri(socket_path, pki.folder, "tls-hostname=localhost")
    with TlsQemuNbd(image, socket_path, pki.folder):
        our_output("convert", "-n", "-f", "raw", "-O", "raw", source, uri)
        our_output("compare", "-f", "raw", source, uri)
    assert image.read_bytes() == source.read_bytes()


# --- who wants what ---


@pytest.mark.parametrize("mode", ["off", "on", "require", "default"])
def test_both_sides_want_what_they_want(
    image: Path, socket_path: Path, pki: Pki, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server's mode, and clients that insist on TLS, or have none."""
    extra = [] if mode == "default" else ["--tls", mode]
    with daemon(image, socket_path, pki.folder, *extra) as server:
        scheme = "nbd" if mode == "off" else "nbds"
        assert server.stdout_lines[0].startswith(f"{scheme}+unix:///disk?")
        for secure in (True, False):
            uri = secure_uri(socket_path, pki.folder) if secure else plain_uri(socket_path)
            works = mode in (("on", "require", "default") if secure else ("off", "on"))
            assert (run_tool(["nbdinfo", uri], check=False).code == 0) == works
            said = ours(capfd, "info", uri)
            assert (said.code == 0) == works
            if not works:
                reason = "no TLS: the server's policy" if secure else "the server wants TLS"
                assert reason in said.err
                assert said.err.count("\n") == 1


def test_a_server_that_requires_tls_shows_qemus_client_nothing(
    image: Path, socket_path: Path, pki: Pki
) -> None:
    with daemon(image, socket_path, pki.folder), pytest.raises(ToolFailed, match="TLS"):
        run_tool(["qemu-img", "info", plain_uri(socket_path)])


@pytest.mark.parametrize("secure", [True, False])
def test_our_client_agrees_with_qemu_nbd_about_tls(
    image: Path, socket_path: Path, pki: Pki, secure: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """qemu-nbd requires it, or has none."""
    if secure:
        server: ServerProcess = TlsQemuNbd(image, socket_path, pki.folder)
        uri, reason = plain_uri(socket_path), "the server wants TLS"
    else:
        server = QemuNbd(image, fmt="raw", socket_path=socket_path, export="disk")
        uri, reason = secure_uri(socket_path, pki.folder), "no TLS: the server's policy forbids it"
    with server:
        said = ours(capfd, "info", uri)
    assert said.code == 1
    assert reason in said.err


# --- certificates ---


@pytest.mark.parametrize("wrong", ["expired", "another host", "another authority", "revoked"])
def test_a_server_with_a_bad_certificate_is_not_trusted(
    image: Path,
    socket_path: Path,
    pki: Pki,
    wrong: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    authority = Authority("stranger") if wrong == "another authority" else pki.authority
    hosts = ["elsewhere.example"] if wrong == "another host" else ["localhost"]
    server = authority.issue(hosts=hosts, expired=wrong == "expired")
    folder = pki.folder_of(f"server {wrong}", server=server, authority=authority)
    client = pki.folder_of(f"client {wrong}", revoked=[server] if wrong == "revoked" else [])
    loose = ",sanity-check=off,verify-peer=off"
    arguments = ("info", "--object", tls_object(client, "client"), "--image-opts")
    with daemon(image, socket_path, folder, options=loose):
        target = options(socket_path)
        if wrong != "revoked":  # qemu-img 7.2 takes it
            assert run_tool(["qemu-img", *arguments, target], check=False).code == 1
        said = ours(capfd, *arguments, target)
    assert said.code == 1
    assert "the peer's certificate isn't accepted" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("server_is_ours", [True, False])
def test_a_client_that_may_not_come_in_learns_nothing(
    image: Path,
    socket_path: Path,
    pki: Pki,
    server_is_ours: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ours and qemu-nbd alike, by the same objects and names."""
    unknown = Authority("stranger").issue("laptop", purpose=CLIENT)
    unlisted = pki.authority.issue("desktop", purpose=CLIENT)
    identity = distinguished_name("laptop").replace(",", ",,")
    extra = ["--object", f"authz-simple,id=auth0,identity={identity}", "--tls-authz", "auth0"]
    make = daemon if server_is_ours else TlsQemuNbd
    with make(image, socket_path, pki.folder, *extra):
        assert "with TLS" in run_tool(["nbdinfo", secure_uri(socket_path, pki.folder)]).stdout
        assert ours(capfd, "info", secure_uri(socket_path, pki.folder)).code == 0
        for name, client in (("none", None), ("unknown", unknown), ("unlisted", unlisted)):
            folder = pki.folder_of(name, client=client)
            assert run_tool(["nbdinfo", secure_uri(socket_path, folder)], check=False).code != 0
            loose = f"{tls_object(folder, 'client')},sanity-check=off"
            refused = ours(capfd, "info", "--object", loose, "--image-opts", options(socket_path))
            assert refused.code == 1
            assert refused.err.count("\n") == 1


def test_names_are_spelt_as_qemu_spells_them(image: Path, socket_path: Path, pki: Pki) -> None:
    """An identity that was written for one is good for the other."""
    oid = NameOID
    attributes = [
        (oid.COUNTRY_NAME, "GB"), (oid.STATE_OR_PROVINCE_NAME, "St, ate"),
        (oid.LOCALITY_NAME, 'Lo+"n<>;\\ #'), (oid.ORGANIZATION_NAME, " space"),
        (oid.ORGANIZATIONAL_UNIT_NAME, "#hash "), (oid.COMMON_NAME, "é=ü"),
        (oid.EMAIL_ADDRESS, "a@b"), (oid.SERIAL_NUMBER, "1"), (oid.SURNAME, "sn"),
        (oid.GIVEN_NAME, "gn"), (oid.TITLE, "t"), (oid.USER_ID, "u"),
        (oid.DOMAIN_COMPONENT, "dc"), (oid.STREET_ADDRESS, "s"), (oid.PSEUDONYM, "p"),
        (oid.DN_QUALIFIER, "q"), (oid.INITIALS, "i"), (oid.GENERATION_QUALIFIER, "g"),
        (oid.POSTAL_CODE, "c"), (oid.BUSINESS_CATEGORY, "b"),
        (oid.JURISDICTION_COUNTRY_NAME, "GB"), (oid.JURISDICTION_LOCALITY_NAME, "l"),
        (oid.JURISDICTION_STATE_OR_PROVINCE_NAME, "s"),
    ]  # fmt: skip
    subject = certificates.Name(
        [certificates.NameAttribute(key, value) for key, value in attributes]
    )
    client = pki.authority.issue(purpose=CLIENT, subject=subject)
    der = client.certificate.public_bytes(serialization.Encoding.DER)
    extra = ["--object", "authz-simple,id=a,identity=x", "--tls-authz", "a"]
    folder = pki.folder_of("many names", client=client)
    with TlsQemuNbd(image, socket_path, pki.folder, *extra) as server:
        run_tool(["nbdinfo", secure_uri(socket_path, folder)], check=False)
    assert f"authz check for {subject_name(der)} is denied" in server.stderr


# --- credentials that can't be meant ---


def starting_fails(image: Path, socket_path: Path, *extra: str) -> str:
    server = BlockemuDaemon(image, fmt="raw", socket_path=socket_path, extra=extra)
    with pytest.raises(ServerFailed, match="ended with 1") as caught, server:
        pass
    lines = caught.value.stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_the_daemon_says_what_is_wrong_with_its_credentials(
    image: Path, socket_path: Path, pki: Pki
) -> None:
    folder = pki.folder_of("expired server", server=pki.authority.issue(expired=True))
    said = starting_fails(
        image, socket_path, "--object", tls_object(folder, "server"), "--tls-creds", "tls0"
    )
    assert "server-cert.pem: is a certificate that has expired" in said
    said = starting_fails(image, socket_path, "--tls-creds", "tls0")
    assert "there are no TLS credentials 'tls0'" in said
    said = starting_fails(
        image, socket_path, "--object", tls_object(pki.folder, "client"), "--tls-creds", "tls0"
    )
    assert "are for a client" in said
    said = starting_fails(image, socket_path, "--tls", "require")
    assert "takes credentials" in said


# --- clients that don't finish ---


def half_a_handshake(socket_path: Path, rng: random.Random) -> socket.socket:
    """Somebody who asked for TLS and got stuck, at one point or another."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(socket_path))
    sock.recv(18, socket.MSG_WAITALL)
    sock.send(struct.pack(">I8sII", 3, OPTION_MAGIC, 5, 0))
    sock.recv(20, socket.MSG_WAITALL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    kind = rng.randrange(3)
    sock.send(rng.randbytes(200) if kind == 0 else hello[: rng.randrange(1, len(hello) + 1)])
    return sock


def test_a_hundred_unfinished_handshakes_cost_others_nothing(
    image: Path, socket_path: Path, pki: Pki, tmp_path: Path, random_seed: int
) -> None:
    """And nothing is left of them: descriptors and memory come back."""
    rng = random.Random(random_seed)
    uri = secure_uri(socket_path, pki.folder)
    target = tmp_path / "copy"
    with daemon(image, socket_path, pki.folder) as server:
        fds = Path(f"/proc/{server.pid}/fd")
        run_tool(["nbdcopy", uri, target])  # what is made once is made
        before, peak_kib = len(os.listdir(fds)), server.peak_rss_kib()
        assert peak_kib is not None
        stuck = [half_a_handshake(socket_path, rng) for _ in range(100)]
        for _ in range(3):
            run_tool(["nbdcopy", uri, target])
            assert target.read_bytes() == image.read_bytes()
        for sock in stuck:
            sock.close()
        run_tool(["nbdinfo", uri])
        while len(os.listdir(fds)) > before:
            run_tool(["nbdinfo", uri])
        after_kib = server.peak_rss_kib()
        assert after_kib is not None
        assert after_kib - peak_kib < 40 * 1024


# --- the other commands ---


def test_nbd_info_and_list_are_as_nbdinfo_says(
    image: Path, socket_path: Path, pki: Pki, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = secure_uri(socket_path, pki.folder)
    with daemon(image, socket_path, pki.folder):
        for ours_, theirs_ in ((["info"], []), (["list"], ["--list"])):
            said = json.loads(our_nbd(capfd, *ours_, "--json", uri))
            expected = json.loads(
                run_tool(["nbdinfo", "--no-content", "--json", *theirs_, uri]).stdout
            )
            assert said["TLS"] is expected["TLS"] is True
            names = [export["export-name"] for export in expected["exports"]]
            assert [export["export-name"] for export in said["exports"]] == names
            again = said["exports"][0]["uri"]
            assert again.startswith("nbds+unix:///")
            assert "with TLS" in run_tool(["nbdinfo", again]).stdout


def our_nbd(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """`blockemu nbd ...`, which must succeed; its stdout."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["nbd", *arguments])
    output = capfd.readouterr()
    assert caught.value.code == 0, output.err
    return output.out


def test_blockemu_nbd_stands_in_for_qemu_nbd(
    image: Path, socket_path: Path, pki: Pki, capfd: pytest.CaptureFixture[str]
) -> None:
    identity = distinguished_name("laptop").replace(",", ",,")
    command = [sys.executable, "-m", "blockemu", "nbd", "-t", "-k", str(socket_path), "-x", "disk"]
    command += ["--object", tls_object(pki.folder, "server"), "--tls-creds", "tls0", "-f", "raw"]
    command += ["--object", f"authz-simple,id=a,identity={identity}", "--tls-authz", "a", "--fork"]
    pid_file = socket_path.parent / "pid"
    run_tool([*command, "--pid-file", pid_file, image])
    try:
        assert run_tool(["nbdinfo", plain_uri(socket_path)], check=False).code != 0
        assert "with TLS" in run_tool(["nbdinfo", secure_uri(socket_path, pki.folder)]).stdout
        tls = ["--object", tls_object(pki.folder, "client"), "--tls-creds", "tls0"]
        tls += ["--tls-hostname", "localhost"]
        listed = our_nbd(capfd, "-L", "-k", str(socket_path), *tls)
        theirs_ = run_tool(["qemu-nbd", "-L", "-k", socket_path, *tls]).stdout
        assert "export: 'disk'" in listed
        assert "export: 'disk'" in theirs_
    finally:
        pid = int(pid_file.read_text())
        with os.fdopen(os.pidfd_open(pid)) as process:
            os.kill(pid, signal.SIGTERM)
            select.select([process], [], [], 30)


def test_qmp_starts_a_server_with_tls(image: Path, run_dir: Path, pki: Pki) -> None:
    control, path = run_dir / "qmp", run_dir / "second"
    server = BlockemuDaemon(
        image, fmt="raw", socket_path=run_dir / "first", export="disk",
        extra=["--control", str(control)],
    )  # fmt: skip
    with server, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(control))
        file = sock.makefile("rwb")
        file.readline()

        def ask(command: str, **arguments: object) -> dict[str, Any]:
            file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            file.flush()
            while True:
                answer: dict[str, Any] = json.loads(file.readline())
                if "event" not in answer:
                    return answer

        assert "return" in ask("qmp_capabilities")
        assert "return" in ask("nbd-server-stop")
        addr = {"type": "unix", "data": {"path": str(path)}}
        missing = ask("nbd-server-start", addr=addr, **{"tls-creds": "tls0"})
        assert "there are no TLS credentials 'tls0'" in missing["error"]["desc"]
        made = ask(
            "object-add",
            **{"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(pki.folder),
               "endpoint": "server", "verify-peer": True},
        )  # fmt: skip
        assert made == {"return": {}}
        assert "return" in ask("nbd-server-start", addr=addr, **{"tls-creds": "tls0"})
        assert "return" in ask(
            "nbd-server-add", device=node_name(ask("query-named-block-nodes")), name="disk"
        )
        assert run_tool(["nbdinfo", plain_uri(path)], check=False).code != 0
        assert "with TLS" in run_tool(["nbdinfo", secure_uri(path, pki.folder)]).stdout
        file.close()


def node_name(answer: dict[str, Any]) -> str:
    """The format's node."""
    names = [node["node-name"] for node in answer["return"] if node["drv"] == "raw"]
    return str(names[0])
