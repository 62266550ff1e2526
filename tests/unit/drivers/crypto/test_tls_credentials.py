# SPDX-License-Identifier: Apache-2.0
"""Credentials as objects: what is taken, and what is refused with which line."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from blockemu.drivers.crypto.secrets import SecretTable
from blockemu.drivers.crypto.tls_credentials import TlsCredentials, x509_credentials
from blockemu.drivers.crypto.tls_priority import parse_priority
from blockemu.drivers.crypto.tls_psk import is_supported, parse_keys, psk_credentials
from blockemu.drivers.crypto.user_objects import UserObjects
from blockemu.drivers.errors import ImageError
from blockemu.loop.small_file import read_small_file
from blockemu.objects import add_command_line_objects
from tests.peers.certificates import CLIENT, SERVER, Authority, Pki, make_pki


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return make_pki(tmp_path_factory.mktemp("pki"))


def make(
    folder: Path,
    endpoint: str = "server",
    *,
    secret: bytes | None = None,
    warnings: list[str] | None = None,
    **options: Any,
) -> TlsCredentials:
    secrets = SecretTable()
    if secret is not None:
        secrets.add("sec0", secret)
    return x509_credentials(
        "tls-creds-x509 'tls0'",
        {"dir": str(folder), "endpoint": endpoint, **options},
        secrets=secrets,
        read_file=read_small_file,
        warn=(warnings if warnings is not None else []).append,
    )


def refusal(folder: Path, endpoint: str = "server", **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        make(folder, endpoint, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_folder_is_taken_for_either_end(pki: Pki) -> None:
    server, client = make(pki.folder), make(pki.folder, "client")
    assert server.names_peers
    assert server.context.verify_mode == client.context.verify_mode == ssl.CERT_REQUIRED
    assert client.named_context.check_hostname
    assert not client.context.check_hostname
    assert server.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert not make(pki.folder, **{"verify-peer": "off"}).names_peers


def test_a_client_needs_no_certificate(pki: Pki) -> None:
    assert make(pki.folder_of("bare"), "client").verifies_peer


@pytest.mark.parametrize("missing", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_missing_file_is_named(pki: Pki, tmp_path: Path, missing: str) -> None:
    for file in pki.folder.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert refusal(tmp_path) == f"{tmp_path / missing}: No such file or directory"


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("ca-cert.pem", "holds no certificate"),
        ("ca-crl.pem", "holds no list of revoked certificates"),
        ("server-cert.pem", "holds no certificate"),
        ("server-key.pem", "holds no private key"),
        ("dh-params.pem", "no start line"),
    ],
)
@pytest.mark.parametrize("sanity_check", [True, False])
def test_a_file_of_something_else_is_named(
    pki: Pki, tmp_path: Path, file: str, reason: str, sanity_check: bool
) -> None:
    for good in pki.folder.iterdir():
        (tmp_path / good.name).write_bytes(good.read_bytes())
    (tmp_path / file).write_text("something else")
    said = refusal(tmp_path, **{"sanity-check": sanity_check})
    assert said.startswith(f"{tmp_path / file}: {reason}")


def test_a_certificate_that_no_peer_would_take_is_refused(pki: Pki) -> None:
    authority = pki.authority
    for name, reason, server in (
        ("expired", "has expired", authority.issue(expired=True)),
        ("client's", "is not for use by a server", authority.issue(purpose=CLIENT)),
        ("authority's", "is an authority's", authority.issue(is_authority=True)),
        ("stranger's", "wasn't issued by an authority in", Authority("other").issue()),
    ):
        folder = pki.folder_of(name, server=server)
        said = refusal(folder)
        assert said.startswith(f"{folder / 'server-cert.pem'}: ")
        assert reason in said
        assert make(folder, **{"sanity-check": False})
    for name, reason, bad in (
        ("old authority", "has expired", Authority(expired=True)),
        ("no authority", "is no certificate of an authority", None),
    ):
        folder = pki.folder_of(name, server=authority.issue(), authority=bad)
        if bad is None:
            pem = authority.issue(purpose=SERVER).certificate.public_bytes(Encoding.PEM)
            (folder / "ca-cert.pem").write_bytes(pem)
        assert refusal(folder).startswith(f"{folder / 'ca-cert.pem'}: ")
        assert reason in refusal(folder)


def test_a_chain_may_lead_to_the_authority(pki: Pki) -> None:
    between = Authority("between")
    signed = pki.authority.issue("between", purpose=None, is_authority=True)
    between.adopt(signed)
    own = between.issue()
    folder = pki.folder_of("chain", server=own)
    assert "wasn't issued" in refusal(folder)
    with (folder / "server-cert.pem").open("ab") as file:
        file.write(signed.certificate.public_bytes(Encoding.PEM))
    assert make(folder)


def test_a_key_must_fit(pki: Pki) -> None:
    folder = pki.folder_of("misfit", server=pki.authority.issue())
    pki.authority.issue().put(folder.parent / "other", "server")
    (folder / "server-key.pem").write_bytes(
        (folder.parent / "other" / "server-key.pem").read_bytes()
    )
    assert "server-key.pem: is another key than that of " in refusal(folder)


def test_an_encrypted_key_takes_its_secret(pki: Pki) -> None:
    folder = pki.folder_of("encrypted")
    pki.authority.issue().put(folder, "server", passphrase=b"sesame")
    assert "is encrypted: passwordid=" in refusal(folder)
    assert "there is no secret 'sec0'" in refusal(folder, passwordid="sec0")
    assert "the passphrase doesn't fit" in refusal(folder, passwordid="sec0", secret=b"open")
    assert make(folder, passwordid="sec0", secret=b"sesame")


def test_a_key_that_everybody_can_read_is_warned_of(pki: Pki) -> None:
    folder = pki.folder_of("open", server=pki.authority.issue())
    warnings: list[str] = []
    make(folder, warnings=warnings)
    assert not warnings
    (folder / "server-key.pem").chmod(0o644)
    make(folder, warnings=warnings)
    assert len(warnings) == 1
    assert "every user of this machine can read this private key" in warnings[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"endpoint": "both"}, "option 'endpoint' is one of server, client"),
        ({"verify-peer": "maybe"}, "option 'verify-peer' is on or off"),
        ({"priority": "LEGACY"}, "begins with none of"),
        ({"priority": "NORMAL:+ARCFOUR-128"}, "is more than OpenSSL can be told"),
        ({"dir": 7}, "option 'dir' takes a text"),
        ({"username": "x"}, "there is no option 'username'"),
    ],
)
def test_options_that_cant_be_meant_are_refused(
    pki: Pki, options: dict[str, Any], reason: str
) -> None:
    said = refusal(pki.folder, **options)
    assert said.startswith("tls-creds-x509 'tls0': ")
    assert reason in said


@pytest.mark.parametrize(
    ("text", "versions"),
    [
        ("NORMAL", (True, True)),
        ("NORMAL:-VERS-TLS1.3", (True, False)),
        ("SECURE256:-VERS-TLS1.2:+ECDHE-PSK", (False, True)),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.2", (True, False)),
        ("@SYSTEM:-VERS-TLS1.0:!VERS-TLS1.1", (True, True)),
        ("NORMAL:-VERS-ALL:+VERS-ALL", (True, True)),
    ],
)
def test_a_priority_chooses_versions(text: str, versions: tuple[bool, bool]) -> None:
    assert parse_priority("x", text) == versions


def test_a_priority_must_leave_a_version() -> None:
    with pytest.raises(ImageError, match="leaves no version"):
        parse_priority("x", "NORMAL:-VERS-ALL")


# --- objects ---


def test_an_id_stands_for_one_object(pki: Pki) -> None:
    objects = UserObjects()
    x509 = f"tls-creds-x509,id=a,dir={pki.folder},endpoint=server"
    add_command_line_objects(objects, [x509, "authz-simple,id=b,identity=x"], warn=print)
    for again in (x509, "authz-simple,id=a,identity=x", "secret,id=b,data=x"):
        with pytest.raises(ImageError, match="exists already"):
            add_command_line_objects(objects, [again], warn=lambda line: None)
    with pytest.raises(ImageError, match="are for a server: a client's have endpoint=client"):
        objects.credentials("x", "a", endpoint="client")
    with pytest.raises(ImageError, match="there are no TLS credentials 'b'"):
        objects.credentials("x", "b", endpoint="client")
    with pytest.raises(ImageError, match="there is no authz object 'a'"):
        objects.authorizer("x", "a")
    assert objects.authorizer("x", "b").allows("x")
    objects.remove("a")
    objects.remove("b")
    with pytest.raises(ImageError, match="no object of this name"):
        objects.remove("a")


def test_secrets_are_there_before_those_who_name_them(pki: Pki, tmp_path: Path) -> None:
    pki.authority.put(tmp_path)
    pki.authority.issue().put(tmp_path, "server", passphrase=b"sesame")
    (tmp_path / "pass").write_text("sesame")
    x509 = f"tls-creds-x509,id=a,dir={tmp_path},endpoint=server,passwordid=s"
    texts = [x509, f"secret,id=s,file={tmp_path / 'pass'}"]
    add_command_line_objects(UserObjects(), texts, warn=print)


def test_anonymous_tls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="anonymous TLS isn't supported"):
        add_command_line_objects(UserObjects(), ["tls-creds-anon,id=a"], warn=print)


# --- pre-shared keys ---


def test_keys_are_read_as_psktool_writes_them() -> None:
    assert parse_keys("f", b"alice:00ff\n\nbob:with:colon:aA\n") == {
        "alice": b"\0\xff",
        "bob:with:colon": b"\xaa",
    }


@pytest.mark.parametrize("data", [b"alice", b"alice:", b":00", b"a:0", b"a:xx", b"\xff:00"])
def test_what_is_no_key_is_refused_without_showing_it(data: bytes) -> None:
    with pytest.raises(ImageError, match="line 2 isn't USER:KEY in hexadecimal") as caught:
        parse_keys("f", b"good:00\n" + data)
    assert "xx" not in str(caught.value)


def test_a_file_without_keys_is_refused() -> None:
    with pytest.raises(ImageError, match="has no key"):
        parse_keys("f", b"\n\n")


def psk(folder: Path, **options: str) -> TlsCredentials:
    return psk_credentials("tls-creds-psk 'p'", None, {"dir": str(folder), **options},
                           read_file=read_small_file)  # fmt: skip


def test_a_client_must_have_a_key(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("alice:0011\n")
    with pytest.raises(ImageError, match="has no key of user 'qemu'"):
        psk(tmp_path)


@pytest.mark.skipif(is_supported(), reason="this Python has pre-shared keys")
def test_an_older_python_says_that_it_has_no_pre_shared_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("alice:0011\n")
    with pytest.raises(ImageError, match=r"Python 3\.1[12] has no pre-shared keys .* 3\.13"):
        psk(tmp_path, endpoint="server")
