# SPDX-License-Identifier: Apache-2.0
"""Images with an external data file, ours and QEMU's, each in the hands of the other's tools.

Where we differ from QEMU 7.2, and why:

- `map` of a raw data file shows its holes as zeroes. QEMU calls all of it data, since all of it is
  mapped; the same bytes are zeroes either way.
- `check` finds L2 entries whose offset isn't the guest's. qemu-img has no eye for them, yet QEMU
  refuses to read what they name.
- The data file's name is relative to the image; QEMU takes it from the working directory. In these
  tests, both are one.
- Zeroes and discards in a raw data file leave the L2 entries alone (drivers/qcow2/data_file.py).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.peers.requirement import require_peer
from tests.unit.drivers.qcow2.structures import COPIED
from tests.unit.img.side_by_side import our_output, ours, theirs

DISK_BYTES = 2 * 1024 * 1024 + 512
STEPS = 25
LAYOUTS = (
    "cluster_size=512", "cluster_size=4096", "cluster_size=65536",
    "cluster_size=16384,extended_l2=on", "cluster_size=65536,extended_l2=on",
)  # fmt: skip
KINDS = ("write -P {fill}", "write -P {fill}", "write -z", "write -z -u", "discard")


@pytest.fixture(autouse=True)
def _peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_peer("qemu-img")
    require_peer("qemu-io")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[False, True], ids=["mapped", "raw"])
def raw(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def options(name: str, *, raw: bool, layout: str = "cluster_size=65536", **more: str) -> list[str]:
    text = f"data_file={name}.data,data_file_raw={'on' if raw else 'off'},{layout}"
    text += "".join(f",{key}={more[key]}" for key in more)
    return ["-f", "qcow2", "-o", text]


def scribble(path: Path, rng: random.Random) -> None:
    commands = []
    for _ in range(STEPS):
        offset = rng.randrange(DISK_BYTES // 512) * 512
        length = min(rng.choice((512, 4096, 70_144, 300_032)), DISK_BYTES - offset)
        kind = rng.choice(KINDS).format(fill=rng.randrange(1, 255))
        commands.append(f"{kind} {offset} {length}")
    QemuIo(path, fmt="qcow2").run(*commands)


def our_map(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        our_output("map", "-f", "qcow2", "--output", "json", path)
    )
    return found


def spread(entries: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A map in sectors, without what the list above names."""
    found = []
    for entry in entries:
        for sector in range(entry["start"], entry["start"] + entry["length"], 512):
            offset = entry.get("offset")
            place = None if offset is None else offset + sector - entry["start"]
            found.append((sector, entry["depth"], entry["present"], entry["data"], place))
    return found


def assert_same_answers(path: Path, *, raw: bool) -> None:
    """Both tools say the same of an image."""
    for command in ("info", "check"):
        both = [json.loads(our_output(command, "-f", "qcow2", "--output", "json", path)),
                json.loads(theirs(command, "-f", "qcow2", "--output=json", path).out)]  # fmt: skip
        assert both[0] == both[1]
    assert our_output("info", path) == theirs("info", path).out
    if raw:
        assert spread(our_map(path)) == spread(QemuImg.map(path, fmt="qcow2"))
    else:
        assert our_map(path) == QemuImg.map(path, fmt="qcow2")
        human = theirs("map", "-f", "qcow2", path.name).out
        assert our_output("map", "-f", "qcow2", path.name) == human


@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_of_qemus_making_is_the_same_to_us(
    tmp_path: Path, seed: int, raw: bool, layout: str
) -> None:
    rng = random.Random(f"{seed} {raw} {layout}")
    path = tmp_path / "disk"
    run_tool(["qemu-img", "create", "-q", *options("disk", raw=raw, layout=layout),
              path, str(DISK_BYTES)])  # fmt: skip
    scribble(path, rng)
    assert_same_answers(path, raw=raw)
    our_output("convert", "-f", "qcow2", "-O", "raw", path, "copy.raw")
    QemuImg.compare(path, tmp_path / "copy.raw", one_fmt="qcow2")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_of_our_making_is_the_same_to_qemu(
    tmp_path: Path, seed: int, raw: bool, layout: str
) -> None:
    rng = random.Random(f"{seed} {raw} {layout}")
    made = options("disk", raw=raw, layout=layout)
    said = our_output("create", *made, "disk", str(DISK_BYTES))
    assert said == run_tool(["qemu-img", "create", *made, "disk", str(DISK_BYTES)]).stdout
    facts = [QemuImg.info(tmp_path / "disk")]
    our_output("create", "-q", *made, "disk", str(DISK_BYTES))
    facts.append(QemuImg.info(tmp_path / "disk"))
    for fact in facts:
        fact.pop("actual-size")
    assert facts[0] == facts[1]
    assert_same_answers(tmp_path / "disk", raw=raw)
    scribble(tmp_path / "disk", rng)
    assert_same_answers(tmp_path / "disk", raw=raw)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_preallocated_image_is_the_same_to_qemu(
    tmp_path: Path, raw: bool, preallocation: str, layout: str
) -> None:
    made = options("disk", raw=raw, preallocation=preallocation, layout=layout)
    our_output("create", "-q", *made, "disk", str(DISK_BYTES))
    assert_same_answers(tmp_path / "disk", raw=raw)
    given = (tmp_path / "disk.data").stat().st_blocks * 512
    assert (given >= DISK_BYTES) == (preallocation != "metadata")


@pytest.mark.parametrize("layout", LAYOUTS[2:4])
def test_copies_to_and_from_a_data_file_are_identical(
    tmp_path: Path, seed: int, raw: bool, layout: str
) -> None:
    source = QemuImg.create(tmp_path / "source", DISK_BYTES)
    scribble(source, random.Random(f"{seed} {raw}"))
    target = ["-f", "qcow2", "-O", "qcow2", *options("copy", raw=raw, layout=layout)[2:]]
    our_output("convert", *target, source, "copy")
    QemuImg.compare(source, tmp_path / "copy", one_fmt="qcow2", other_fmt="qcow2")
    assert QemuImg.check(tmp_path / "copy")[:3] == (0, 0, 0)
    if raw:
        QemuImg.compare(source, tmp_path / "copy.data", one_fmt="qcow2")
    assert "identical" in our_output("compare", "-f", "qcow2", "-F", "qcow2", source, "copy")
    sizes = ["measure", "-O", "qcow2", "-f", "qcow2", "copy"]
    if not raw:  # of a raw one's holes we know that they are zeroes
        assert our_output(*sizes) == theirs(*sizes).out
    new = ["measure", "-O", "qcow2", *options("new", raw=raw, layout=layout)[2:], "--size", "1G"]
    assert our_output(*new) == theirs(*new).out


@pytest.mark.parametrize("length", [1 << 20, 5 << 20])
@pytest.mark.parametrize("layout", LAYOUTS[2:4])
def test_resized_image_is_the_same_to_qemu(
    tmp_path: Path, raw: bool, length: int, layout: str
) -> None:
    made = options("disk", raw=raw, layout=layout)
    our_output("create", "-q", *made, "disk", str(DISK_BYTES))
    QemuIo(tmp_path / "disk", fmt="qcow2").run(f"write -P 7 0 {DISK_BYTES}")
    our_output("resize", "-q", "-f", "qcow2", "--shrink", "disk", str(length))
    assert_same_answers(tmp_path / "disk", raw=raw)
    kept = min(length, DISK_BYTES)
    commands = [f"read -P 7 0 {kept}"]
    if length > kept:
        commands.append(f"read -P 0 {kept} {length - kept}")
    QemuIo(tmp_path / "disk", fmt="qcow2").run(*commands)
    assert (tmp_path / "disk.data").stat().st_size == length


def test_overlay_with_a_data_file_is_rebased_and_committed(tmp_path: Path, seed: int) -> None:
    base = QemuImg.create(tmp_path / "base", DISK_BYTES)
    scribble(base, random.Random(seed))
    our_output("convert", "-f", "qcow2", "-O", "qcow2", base, "other")
    QemuIo(tmp_path / "other", fmt="qcow2").run("write -P 9 0 1M")
    made = options("top", raw=False)
    our_output("create", "-q", *made, "-b", "base", "-F", "qcow2", "top")
    scribble(tmp_path / "top", random.Random(f"{seed} top"))
    our_output("convert", "-f", "qcow2", "-O", "raw", "top", "before")
    our_output("rebase", "-f", "qcow2", "-b", "other", "-F", "qcow2", "top")
    QemuImg.compare(tmp_path / "top", tmp_path / "before", one_fmt="qcow2")
    assert QemuImg.check(tmp_path / "top")[:3] == (0, 0, 0)
    our_output("commit", "-q", "-f", "qcow2", "top")
    for name in ("top", "other"):
        QemuImg.compare(tmp_path / name, tmp_path / "before", one_fmt="qcow2")
        assert QemuImg.check(tmp_path / name)[:3] == (0, 0, 0)


REFUSED = (
    "create -f qcow2 -o data_file_raw=on new 1M",
    "create -f qcow2 -o data_file=d,compat=0.10 new 1M",
    "create -f qcow2 -o data_file=new new 1M",
    "create -f qcow2 -o data_file=nowhere/d new 1M",
    "create -f qcow2 -o data_file=d,data_file_raw=on -b plain -F qcow2 new",
    "amend -f qcow2 -o data_file=d plain",
    "amend -f qcow2 -o data_file_raw=on plain",
    "amend -f qcow2 -o data_file_raw=on mapped",
    "amend -f qcow2 -o compat=0.10 mapped",
    "rebase -u -f qcow2 -b plain -F qcow2 raw",
    "rebase -f qcow2 -b plain -F qcow2 raw",
    "snapshot -c one mapped",
    "map -f qcow2 lost",
)


@pytest.mark.parametrize("command", REFUSED)
def test_what_qemu_img_refuses_we_refuse(
    tmp_path: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    QemuImg.create(tmp_path / "plain", 1 << 20)
    for name in ("mapped", "raw", "lost"):
        our_output("create", "-q", *options(name, raw=name == "raw"), name, "1M")
    (tmp_path / "lost.data").unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    words = command.split()
    result = ours(capfd, *words)
    assert result.code == 1
    assert len(result.err.splitlines()) == 1, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert theirs(*words).code == 1


def test_amended_data_file_is_where_the_header_says(tmp_path: Path, raw: bool) -> None:
    our_output("create", "-q", *options("disk", raw=raw), "disk", "1M")
    QemuIo(tmp_path / "disk", fmt="qcow2").run("write -P 7 0 64k")
    (tmp_path / "moved.data").write_bytes((tmp_path / "disk.data").read_bytes())
    our_output("amend", "-q", "-f", "qcow2", "-o", "data_file=moved.data", "disk")
    (tmp_path / "disk.data").unlink()
    QemuIo(tmp_path / "disk", fmt="qcow2").run("read -P 7 0 64k")
    our_output("amend", "-q", "-f", "qcow2", "-o", "data_file_raw=off", "disk")
    specific = QemuImg.info(tmp_path / "disk")["format-specific"]["data"]
    assert (specific["data-file"], specific["data-file-raw"]) == ("moved.data", False)


OFFSET_1 = COPIED | 0x10000
DAMAGE = {
    "no COPIED": 0x10000,
    "zero without COPIED": 0x10001,
    "not aligned": OFFSET_1 | 0x200,
    "compressed": 1 << 62 | 0x10000,
    "reserved bit": OFFSET_1 | 2,
    "allocated zero": OFFSET_1 | 1,
    "plain zero": 1,
    "unallocated": 0,
}


@pytest.mark.parametrize("repair", [[], ["-r", "all"]], ids=str)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_found_and_repaired_as_by_qemu_img(
    tmp_path: Path, damage: str, repair: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = damaged(tmp_path, DAMAGE[damage])
    content = path.read_bytes()
    reference = theirs("check", "--output=json", *repair, path)
    path.write_bytes(content)
    result = ours(capfd, "check", "--output", "json", *repair, path)
    assert (result.code, json.loads(result.out)) == (reference.code, json.loads(reference.out))


def test_entry_of_another_offset_is_a_corruption_that_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = damaged(tmp_path, COPIED | 0x20000)
    for repair in ([], ["-r", "all"]):
        result = ours(capfd, "check", *repair, path)
        assert result.code == 2
        assert "names offset 0x20000 of the data file, but guest offset 0x10000" in result.err
    assert theirs("check", path).code == 0
    assert "corrupt" in QemuIo(path, fmt="qcow2").run("read 64k 512", check=False)


def damaged(tmp_path: Path, word: int) -> Path:
    """An image with four mapped clusters, the second of which has this L2 entry."""
    path = tmp_path / "disk"
    our_output("create", "-q", *options("disk", raw=False), path, "1M")
    QemuIo(path, fmt="qcow2").run("write 0 192k", "write 512k 64k")
    content = bytearray(path.read_bytes())
    table = int.from_bytes(content[0x30000:0x30008], "big") & ~COPIED
    content[table + 8 : table + 16] = word.to_bytes(8, "big")
    path.write_bytes(content)
    return path
