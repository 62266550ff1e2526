# SPDX-License-Identifier: Apache-2.0
"""`blockemu img amend` on the key slots of encrypted images; qemu-io says who gets in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.peers.qemu import run_tool
from tests.unit.img.side_by_side import our_output, ours


class Keys:
    """An image with the passphrase `sec0`, and two more secrets."""

    def __init__(self, folder: Path, fmt: str) -> None:
        self.fmt = fmt
        self.prefix = "encrypt." if fmt == "qcow2" else ""
        self.path = folder / f"a.{fmt}"
        self.objects: list[str] = []
        for number in range(3):
            secret = folder / f"pass{number}"
            secret.write_text(f"horse number {number}")
            self.objects += ["--object", f"secret,id=sec{number},file={secret}"]
        options = "encrypt.format=luks," if fmt == "qcow2" else ""
        options += f"{self.prefix}key-secret=sec0,{self.prefix}iter-time=1"
        our_output("create", "-q", "-f", fmt, *self.objects, "-o", options, self.path, "1M")

    def opts(self, secret: str = "sec0") -> str:
        return f"driver={self.fmt},file.filename={self.path},{self.prefix}key-secret={secret}"

    def words(self, options: str, *more: str, secret: str = "sec0") -> list[str]:
        """Of `img amend`."""
        text = ",".join(self.prefix + option for option in options.split(","))
        return ["amend", *more, *self.objects, "-o", text, "--image-opts", self.opts(secret)]

    def opens_with(self, secret: str) -> bool:
        told = run_tool(
            ["qemu-io", *self.objects, "-c", "read 0 4k", "--image-opts", self.opts(secret)],
            check=False,
        )
        return told.code == 0 and "failed" not in told.stdout

    def active(self) -> list[int]:
        facts = json.loads(run_tool(["qemu-img", "info", "--output=json", self.path]).stdout)
        data = facts["format-specific"]["data"]
        slots = data.get("encrypt", data)["slots"]
        return [index for index, slot in enumerate(slots) if slot["active"]]


@pytest.fixture(params=["qcow2", "luks"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> Keys:
    return Keys(tmp_path, request.param)


def test_a_second_passphrase_opens_the_image_and_the_first_goes(keys: Keys) -> None:
    our_output(*keys.words("state=active,new-secret=sec1,iter-time=1"))
    assert keys.active() == [0, 1]
    assert keys.opens_with("sec0")
    assert keys.opens_with("sec1")

    our_output(*keys.words("state=inactive,old-secret=sec0", secret="sec1"))

    assert keys.active() == [1]
    assert not keys.opens_with("sec0")
    assert keys.opens_with("sec1")


def test_a_slot_by_its_number(keys: Keys) -> None:
    our_output(*keys.words("state=active,new-secret=sec1,iter-time=1,keyslot=7"))
    assert keys.active() == [0, 7]
    our_output(*keys.words("state=inactive,keyslot=0", secret="sec1"))
    assert keys.active() == [7]
    our_output(*keys.words("state=active,new-secret=sec2,iter-time=1,keyslot=7", "--force",
                           secret="sec1"))  # fmt: skip
    assert keys.active() == [7]
    assert keys.opens_with("sec2")
    assert not keys.opens_with("sec1")


def test_qemu_takes_away_what_we_gave(keys: Keys) -> None:
    our_output(*keys.words("state=active,new-secret=sec1,iter-time=1"))
    run_tool(["qemu-img", "amend", *keys.objects, "--image-opts", "-o",
              f"{keys.prefix}state=inactive,{keys.prefix}old-secret=sec0",
              keys.opts("sec1")])  # fmt: skip
    assert keys.active() == [1]
    our_output("map", "--output", "json", *keys.objects, "--image-opts", keys.opts("sec1"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("new-secret=sec1", "option 'state' must say"),
        ("state=active", "'new-secret' must name"),
        ("state=active,new-secret=sec1,keyslot=0", "LUKS key slot 0 is active: erase it first"),
        ("state=active,new-secret=sec9", "there is no secret 'sec9'"),
        ("state=active,new-secret=sec1,keyslot=8", "there is no key slot 8"),
        ("state=active,new-secret=sec1,old-secret=sec2", "the secret is wrong"),
        ("state=inactive", "say which key slot to erase"),
        ("state=inactive,keyslot=3", "LUKS key slot 3 is not active"),
        ("state=inactive,old-secret=sec1", "no LUKS key slot has this old secret"),
        ("state=inactive,keyslot=0", "its last active key slots are not erased"),
        ("state=inactive,keyslot=0,new-secret=sec1", "go with state=active only"),
    ],
)
def test_what_can_not_be_is_one_line_and_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: str, reason: str
) -> None:
    keys = Keys(tmp_path, "qcow2")
    before = keys.path.read_bytes()

    result = ours(capfd, *keys.words(options))

    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert reason in result.err
    assert "horse" not in result.err
    assert keys.path.read_bytes() == before


def test_the_last_passphrase_goes_by_force(keys: Keys) -> None:
    our_output(*keys.words("state=inactive,keyslot=0", "--force"))
    assert keys.active() == []
    assert not keys.opens_with("sec0")
