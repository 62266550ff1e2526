# SPDX-License-Identifier: Apache-2.0
"""Encrypted images as their users meet them: `blockemu img`, and served over NBD."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.peers.blockemu import BlockemuDaemon
from tests.peers.qemu import QemuIo, run_tool
from tests.unit.img.side_by_side import our_output, ours

QUICK = "iter-time=1"


class Folder:
    """A folder with a passphrase's file, and what the tools are told about it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "pass").write_text("correct horse")
        (path / "wrong").write_text("incorrect horse")
        self.objects = ["--object", f"secret,id=sec0,file={path / 'pass'}"]
        self.wrong = ["--object", f"secret,id=sec0,file={path / 'wrong'}"]

    def qcow2(self, name: str = "a.qcow2") -> str:
        return f"driver=qcow2,file.filename={self.path / name},encrypt.key-secret=sec0"

    def luks(self, name: str = "a.luks") -> str:
        return f"driver=luks,file.filename={self.path / name},key-secret=sec0"

    def make(self, fmt: str = "qcow2", *more: str) -> Path:
        path = self.path / f"a.{fmt}"
        prefix = "encrypt." if fmt == "qcow2" else ""
        options = f"{prefix}key-secret=sec0,{prefix}{QUICK}"
        if fmt == "qcow2":
            options += ",encrypt.format=luks"
        our_output("create", "-q", "-f", fmt, *self.objects, "-o", options, *more, path, "4M")
        return path

    def qemu(self, tool: str, *words: str) -> str:
        verb, *rest = words
        head = [tool, verb] if tool == "qemu-img" else [tool]
        tail = rest if tool == "qemu-img" else list(words)
        told = run_tool([*head, *self.objects, "--image-opts", *tail])
        assert "failed" not in told.stdout, told.stdout
        return told.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def described(tool: str, path: Path) -> dict[str, Any]:
    if tool == "ours":
        text = our_output("info", "--output", "json", path)
    else:
        text = run_tool(["qemu-img", "info", "--output=json", path]).stdout
    facts: dict[str, Any] = json.loads(text)
    facts.pop("actual-size")
    return facts


@pytest.mark.parametrize("fmt", ["qcow2", "luks"])
def test_a_locked_image_is_described_as_qemu_img_does_it(folder: Folder, fmt: str) -> None:
    path = folder.make(fmt)
    assert described("ours", path) == described("theirs", path)
    theirs = run_tool(["qemu-img", "info", path]).stdout
    assert our_output("info", path) == theirs


def test_qemu_writes_into_our_images_and_we_convert_them(folder: Folder) -> None:
    folder.make()
    folder.qemu("qemu-io", "-c", "write -P 5 1000 70000", "-c", "write -P 6 2M 1M", folder.qcow2())
    raw = folder.path / "a.raw"

    our_output("convert", "-O", "raw", *folder.objects, "--image-opts", folder.qcow2(), raw)

    folder.qemu("qemu-img", "compare", folder.qcow2(), f"driver=raw,file.filename={raw}")
    our_output("convert", "-f", "raw", "-O", "qcow2", *folder.objects, "-o",
               f"encrypt.format=luks,encrypt.key-secret=sec0,encrypt.{QUICK},cluster_size=4k",
               raw, folder.path / "b.qcow2")  # fmt: skip
    folder.qemu("qemu-img", "compare", folder.qcow2("b.qcow2"), folder.qcow2())
    folder.qemu("qemu-img", "check", folder.qcow2("b.qcow2"))
    our_output("convert", "-f", "raw", "-O", "luks", *folder.objects, "-o",
               f"key-secret=sec0,{QUICK}", raw, folder.path / "b.luks")  # fmt: skip
    folder.qemu("qemu-img", "compare", folder.luks("b.luks"), folder.qcow2())
    assert our_output("compare", *folder.objects, "--image-opts", folder.qcow2(),
                      folder.qcow2("b.qcow2")) == "Images are identical.\n"  # fmt: skip


def test_an_encrypted_overlay_is_committed_into_an_encrypted_base(folder: Folder) -> None:
    base = folder.make()
    folder.qemu("qemu-io", "-c", "write -P 5 0 1M", folder.qcow2())
    options = f"encrypt.format=luks,encrypt.key-secret=sec0,encrypt.{QUICK}"
    our_output("create", "-q", "-f", "qcow2", *folder.objects, "-o", options, "-b", base,
               "-F", "qcow2", folder.path / "over.qcow2")  # fmt: skip
    over = folder.qcow2("over.qcow2") + ",backing.encrypt.key-secret=sec0"
    folder.qemu("qemu-io", "-c", "write -P 7 512k 1M", over)
    raw = folder.path / "a.raw"
    our_output("convert", "-O", "raw", *folder.objects, "--image-opts", over, raw)
    folder.qemu("qemu-img", "compare", over, f"driver=raw,file.filename={raw}")

    our_output("commit", *folder.objects, "--image-opts", over)

    folder.qemu("qemu-img", "compare", folder.qcow2(), f"driver=raw,file.filename={raw}")
    folder.qemu("qemu-img", "check", folder.qcow2())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("map {path}", "{path}: the image is encrypted: option 'encrypt.key-secret' must name"),
        ("map {wrong} --image-opts {opts}", "{path}: the secret is wrong: it unlocks no LUKS"),
        ("map --image-opts {opts}", "{path}: there is no secret 'sec0'"),
        ("convert -c -f raw -O qcow2 {objects} -o encrypt.format=luks,encrypt.key-secret=sec0 "
         "{path} x", "x: compression (-c) and encryption don't go together"),
        ("create -f qcow2 -o encrypt.format=luks x 1M", "x: an encrypted image needs a secret"),
        ("create -f qcow2 -o encrypt.format=aes x 1M", "x: AES encryption is legacy"),
        ("create -f qcow2 {objects} -o encrypt.format=luks,encrypt.key-secret=sec0,"
         "encrypt.cipher-alg=twofish-256 x 1M", "x: cipher algorithm 'twofish-256' is not"),
        ("info --object secret,id=a x", "secret 'a': takes one of 'file' and 'data'"),
        ("info --object secret,id=a,file=/none x", "/none: No such file or directory"),
        ("info --object tls,id=a x", "--object: there is no object type 'tls'"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_one_line(
    folder: Folder,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    reason: str,
) -> None:
    monkeypatch.chdir(folder.path)
    path = folder.make()
    names = {"path": path, "opts": folder.qcow2(), "objects": " ".join(folder.objects),
             "wrong": " ".join(folder.wrong)}  # fmt: skip

    result = ours(capfd, *words.format(**names).split())

    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert result.err.startswith("blockemu: " + reason.format(**names)), result.err
    assert "horse" not in result.err
    assert not (folder.path / "x").exists()


def test_a_secret_on_the_command_line_is_warned_of(
    folder: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.make()
    said = ours(capfd, "map", "--object", "secret,id=sec0,data=correct horse", "--image-opts",
                folder.qcow2())  # fmt: skip
    assert said.code == 0
    assert "warning: secret 'sec0' stands on the command line" in said.err
    assert "horse" not in said.err


@pytest.mark.parametrize("fmt", ["qcow2", "luks"])
def test_an_encrypted_image_is_served(folder: Folder, socket_path: Path, fmt: str) -> None:
    folder.make(fmt)
    opts = folder.qcow2() if fmt == "qcow2" else folder.luks()
    with BlockemuDaemon(
        Path(opts), fmt=None, socket_path=socket_path, export="disk",
        extra=[*folder.objects, "--image-opts"],
    ) as daemon:  # fmt: skip
        QemuIo(daemon.uri).run(
            "write -P 7 1000 3M", "write -z 64k 64k", "write -P 8 4000000 100", "flush",
            "read -P 7 128k 1M", "read -P 0 64k 64k", "read -P 8 4000000 100",
        )  # fmt: skip
    assert "Traceback" not in daemon.stderr
    folder.qemu("qemu-io", "-c", "read -P 7 128k 1M", "-c", "read -P 0 64k 64k",
                "-c", "read -P 8 4000000 100", opts)  # fmt: skip
