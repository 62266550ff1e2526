# SPDX-License-Identifier: Apache-2.0
"""Encrypted images that QEMU made and wrote, read here: LUKS and legacy AES.

`qemu-img create` measures PBKDF2 for seconds, whatever `iter-time` says, so few of them are made.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from blockemu.drivers.crypto.offload import in_place
from blockemu.drivers.errors import ImageError
from tests.unit.drivers.qcow2.support import KIB, MIB, Images

ATTEMPTS = 10
SECRET = b"correct horse"

PATTERNS = ((0, 100 * KIB, 0x11), (1 * MIB + 512, 1536, 0x22), (3 * MIB, 128 * KIB, 0x33))
"""Written by qemu-io: offset, length, byte."""


class EncryptedImage:
    """Makes and fills images by qemu-img and qemu-io."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = folder / "secret"
        self.secret.write_bytes(SECRET)
        self.objects = ("--object", f"secret,id=sec0,file={self.secret}")

    def make(self, name: str, options: str, size: str = "4M") -> Path:
        path = self.folder / name
        words = (
            "qemu-img", "create", "-q", "-f", "qcow2", *self.objects,
            "-o", f"encrypt.key-secret=sec0,{options}", str(path), size,
        )  # fmt: skip
        for _ in range(ATTEMPTS):
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
            if "accurate CPU usage" not in done.stderr:  # it measures PBKDF2 by a coarse clock
                break
        assert done.returncode == 0, done.stderr
        return path

    def io(self, path: Path, *commands: str) -> str:
        words = [word for command in commands for word in ("-c", command)]
        tree = f"driver=qcow2,encrypt.key-secret=sec0,file.driver=file,file.filename={path}"
        return self._run("qemu-io", *self.objects, "--image-opts", tree, *words)

    def fill(self, path: Path) -> None:
        """Write the patterns."""
        self.io(path, *(f"write -P {byte} {offset} {length}" for offset, length, byte in PATTERNS))

    def _run(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "failed" not in done.stdout, done.stdout
        return done.stdout


def patterns_of_disk() -> bytes:
    """A disk's whole content, when the patterns are on it."""
    content = bytearray(4 * MIB)
    for offset, length, byte in PATTERNS:
        content[offset : offset + length] = bytes([byte]) * length
    return bytes(content)


@pytest.fixture
def qemu(tmp_path: Path) -> EncryptedImage:
    return EncryptedImage(tmp_path)


@pytest.fixture(scope="module")
def luks_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the patterns, and clusters of 64 KiB. Nobody writes to it."""
    qemu = EncryptedImage(tmp_path_factory.mktemp("luks"))
    path = qemu.make("a.qcow2", LUKS)
    qemu.fill(path)
    return path


@pytest.fixture
def unlocking(images: Images) -> Images:
    images.opener.offload = in_place
    images.opener.secrets.add("sec0", SECRET)
    images.opener.secrets.add("wrong", b"incorrect horse")
    return images


LUKS = "encrypt.format=luks,encrypt.iter-time=10"


@pytest.mark.parametrize(
    "options",
    [
        f"{LUKS},compat=0.10,cluster_size=512,encrypt.cipher-alg=aes-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,"
        "encrypt.ivgen-hash-alg=sha256,encrypt.hash-alg=sha1",
        "encrypt.format=aes",
        "encrypt.format=aes,cluster_size=512",
    ],
)
def test_what_qemu_wrote_is_read(qemu: EncryptedImage, unlocking: Images, options: str) -> None:
    path = qemu.make("a.qcow2", options)
    qemu.fill(path)
    content = patterns_of_disk()
    unlocking.load("a.qcow2", path)

    disk = unlocking.open("a.qcow2", read_only=True, **{"encrypt.key-secret": "sec0"})

    assert disk.read(0, 4 * MIB) == content
    assert disk.read(1 * MIB + 700, 3) == content[1 * MIB + 700 :][:3]
    disk.close()
    raw = path.read_bytes()
    for _, _, byte in PATTERNS:
        assert bytes([byte]) * 512 not in raw


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "'encrypt.key-secret' must name its secret"),
        ({"encrypt.key-secret": "none"}, "there is no secret 'none'"),
        ({"encrypt.key-secret": "wrong"}, "the secret is wrong"),
        ({"encrypt.key-secret": "sec0", "encrypt.format": "aes"}, "encrypted by luks, not by aes"),
        ({"encrypt.key-secret": "sec0", "encrypt.pin": "1"}, "'pin'"),
    ],
)
def test_a_luks_image_opens_with_its_secret_only(
    luks_image: Path, unlocking: Images, options: dict[str, str], reason: str
) -> None:
    unlocking.load("a.qcow2", luks_image)

    with pytest.raises(ImageError, match=reason) as caught:
        unlocking.open("a.qcow2", **options)

    assert "horse" not in str(caught.value)


def test_a_luks_image_is_read(luks_image: Path, unlocking: Images) -> None:
    unlocking.load("a.qcow2", luks_image)

    disk = unlocking.open("a.qcow2", read_only=True, **{"encrypt.key-secret": "sec0"})

    assert disk.read(0, 4 * MIB) == patterns_of_disk()
    assert disk.driver.direct_map() is None
    disk.close()


def test_a_legacy_aes_image_is_not_written(qemu: EncryptedImage, unlocking: Images) -> None:
    unlocking.load("a.qcow2", qemu.make("a.qcow2", "encrypt.format=aes"))

    with pytest.raises(ImageError, match="read-only"):
        unlocking.open("a.qcow2", **{"encrypt.key-secret": "sec0"})


def test_without_encryption_a_secret_is_refused(unlocking: Images) -> None:
    unlocking.create("a.qcow2", MIB)

    with pytest.raises(ImageError, match="not encrypted"):
        unlocking.open("a.qcow2", **{"encrypt.key-secret": "sec0"})


def test_a_locked_image_is_described_and_not_read(luks_image: Path, unlocking: Images) -> None:
    unlocking.load("a.qcow2", luks_image)

    disk = unlocking.open("a.qcow2", read_only=True, no_io=True)

    assert disk.driver.info()["encrypted"] is True
    with pytest.raises(OSError, match="encrypted"):
        disk.read(0, 512)
    disk.close()
