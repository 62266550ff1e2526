# SPDX-License-Identifier: Apache-2.0
"""The TLS options of qemu-nbd, and what nbdinfo tells through TLS, of either's server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.peers.certificates import Pki, make_pki
from tests.peers.nbd_command import PROGRAMS, NbdCommand
from tests.peers.qemu import run_tool
from tests.peers.requirement import require_peer
from tests.unit.nbdinfo.side_by_side import ours, theirs


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    for peer in ("qemu-nbd", "nbdinfo"):
        require_peer(peer)
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[dict[str, NbdCommand]]:
    """Both programs, by the same command line."""
    folder = tmp_path_factory.mktemp("tls")
    disk = folder / "disk.raw"
    disk.write_bytes(bytes(range(256)) * 4096)
    creds = f"tls-creds-x509,id=tls0,dir={pki.folder},endpoint=server"
    words = ["-t", "-r", "-e", "0", "-x", "disk", "--object", creds, "--tls-creds", "tls0"]
    with ExitStack() as stack:
        yield {
            program: stack.enter_context(
                NbdCommand(
                    program, [*words, "-f", "raw", disk], socket_path=folder / program,
                    export="disk",
                )
            )
            for program in PROGRAMS
        }  # fmt: skip


def secure(server: NbdCommand, pki: Pki) -> str:
    return f"{server.uri.replace('nbd+', 'nbds+')}&tls-certificates={pki.folder}"


def test_both_serve_the_same_through_tls(servers: dict[str, NbdCommand], pki: Pki) -> None:
    found = {}
    for program, server in servers.items():
        said = json.loads(theirs("--no-content", "--json", secure(server, pki)).out)
        del said["exports"][0]["uri"]
        found[program] = said
    assert found["blockemu"] == found["qemu-nbd"]
    assert found["blockemu"]["TLS"] is True


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_told_through_tls_is_what_nbdinfo_tells(
    servers: dict[str, NbdCommand], program: str, pki: Pki, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = secure(servers[program], pki)
    assert ours(capfd, "info", uri).out == theirs("--no-content", uri).out.expandtabs(4)
    assert ours(capfd, "list", uri).out == theirs("--list", uri).out.expandtabs(4)
    assert ours(capfd, "info", "--map", uri).out == theirs("--map", uri).out
    assert ours(capfd, "info", "--is", "tls", uri).code == theirs("--is", "tls", uri).code == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_who_comes_without_tls_is_refused(
    servers: dict[str, NbdCommand], program: str, capfd: pytest.CaptureFixture[str]
) -> None:
    result = ours(capfd, "info", servers[program].uri)
    assert result.code == theirs("--no-content", servers[program].uri).code == 1
    assert "the server wants TLS" in result.err


@pytest.mark.parametrize("program", PROGRAMS)
def test_list_goes_through_tls_as_qemu_nbds(
    servers: dict[str, NbdCommand], program: str, pki: Pki, capfd: pytest.CaptureFixture[str]
) -> None:
    creds = f"tls-creds-x509,id=tls0,dir={pki.folder},endpoint=client"
    words = ["-L", "--object", creds, "--tls-creds", "tls0", "--tls-hostname", "localhost"]
    words += ["-k", str(servers[program].socket_path)]
    expected = run_tool(["qemu-nbd", *words])
    assert ours(capfd, *words).out == expected.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tls-authz", "x", "disk"], "goes with --tls-creds only"),
        (["--tls-creds", "nosuch", "disk"], "nosuch"),
        (["--tls-hostname", "x", "disk"], "--tls-hostname goes with --list only"),
        (["-L", "--tls-authz", "x"], "--tls-authz doesn't go with --list"),
    ],
)
def test_tls_that_cannot_be_meant_is_refused(
    words: list[str], reason: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = ours(capfd, "-k", str(tmp_path / "s"), *words)
    assert result.code != 0
    assert reason in result.err
    assert run_tool(["qemu-nbd", "-k", tmp_path / "s", *words], check=False).code == 1
