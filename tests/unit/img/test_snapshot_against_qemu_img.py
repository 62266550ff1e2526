# SPDX-License-Identifier: Apache-2.0
"""`img snapshot` beside `qemu-img snapshot`: the same list, snapshots that either can use."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from blockemu.cli import cli
from blockemu.config import UnixAddress, serve_config
from blockemu.drivers.errors import ImageError
from tests.peers.qemu import QemuImg, QemuIo, run_tool
from tests.peers.requirement import require_peer
from tests.unit.daemon_thread import DaemonThread


@pytest.fixture(autouse=True)
def _peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_peer("qemu-img")
    require_peer("qemu-io")
    monkeypatch.chdir(tmp_path)
    QemuImg.create(Path("disk"), 4 << 20)


def blockemu(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments))
    assert isinstance(result.exception, ImageError)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def qemu_img(*arguments: str) -> str:
    return run_tool(["qemu-img", *arguments]).stdout


def prints_as_we_do() -> bool:
    """Columns have moved in later versions."""
    return "version 7." in qemu_img("--version")


def write(value: int) -> None:
    QemuIo(Path("disk"), fmt="qcow2").run(f"write -P {value} 0 1M")


def check_content(value: int) -> None:
    QemuIo(Path("disk"), fmt="qcow2").run(f"read -P {value} 0 1M")
    verdict = QemuImg.check(Path("disk"))
    assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text


def compare_lists() -> None:
    theirs = json.loads(qemu_img("info", "--output=json", "disk"))
    ours = json.loads(blockemu("img", "info", "--output", "json", "disk"))
    assert ours.get("snapshots") == theirs.get("snapshots")
    if prints_as_we_do():
        assert blockemu("img", "snapshot", "-l", "disk") == qemu_img("snapshot", "-l", "disk")
        assert blockemu("img", "info", "disk") == qemu_img("info", "disk")


NAMES = ["first", "2", "a name that is longer than its column", "first", "", "ümläut", "a  b"]


def test_list_is_qemu_imgs() -> None:
    assert blockemu("img", "snapshot", "-l", "disk") == ""
    compare_lists()
    for number, name in enumerate(NAMES):
        if number % 2:
            qemu_img("snapshot", "-c", name, "disk")
        else:
            assert blockemu("img", "snapshot", "-c", name, "disk") == ""
        compare_lists()
    assert blockemu("img", "snapshot", "disk") == blockemu("img", "snapshot", "-l", "disk")
    listed = json.loads(blockemu("img", "info", "--output", "json", "disk"))["snapshots"]
    assert [entry["name"] for entry in listed] == NAMES
    assert [entry["id"] for entry in listed] == [str(1 + number) for number in range(len(NAMES))]


def test_clocks_and_states_of_a_machine_are_listed_as_theirs() -> None:
    qemu_img("snapshot", "-c", "state", "disk")
    image = bytearray(Path("disk").read_bytes())
    (table,) = struct.unpack_from(">Q", image, 64)
    struct.pack_into(">Q", image, table + 24, 363_723_456_789_012)  # 101 hours
    struct.pack_into(">QQQ", image, table + 40, 5 << 32, 4 << 20, 123_456_789_012)
    Path("disk").write_bytes(image)
    compare_lists()
    struct.pack_into(">Q", image, table + 56, 2**64 - 1)
    Path("disk").write_bytes(image)
    compare_lists()


def test_snapshot_is_gone_back_to_and_deleted() -> None:
    write(1)
    blockemu("img", "snapshot", "-q", "-c", "one", "disk")
    write(2)
    qemu_img("snapshot", "-c", "two", "disk")
    write(3)
    blockemu("img", "snapshot", "-a", "two", "-f", "qcow2", "disk")
    check_content(2)
    qemu_img("snapshot", "-a", "one", "disk")
    check_content(1)
    blockemu("img", "snapshot", "-d", "one", "disk")
    compare_lists()
    check_content(1)
    blockemu("img", "snapshot", "-a", "2", "disk")
    qemu_img("snapshot", "-d", "two", "disk")
    check_content(2)


def test_size_comes_back_with_the_disk() -> None:
    blockemu("img", "snapshot", "-c", "small", "disk")
    qemu_img("resize", "disk", "1G")
    blockemu("img", "snapshot", "-a", "small", "disk")
    assert QemuImg.info(Path("disk"))["virtual-size"] == 4 << 20


def test_image_with_a_backing_file_needs_no_format() -> None:
    QemuImg.create(Path("over"), None, backing=Path("disk"), backing_fmt="qcow2")
    blockemu("img", "snapshot", "-c", "s", "over")
    assert "s" in blockemu("img", "snapshot", "-l", "over")
    blockemu("img", "snapshot", "-d", "s", "over")
    assert QemuImg.check(Path("over")).leaks == 0


def test_snapshot_is_served_for_reading(tmp_path: Path) -> None:
    write(1)
    blockemu("img", "snapshot", "-c", "s", "disk")
    write(2)
    qemu_img("resize", "disk", "8M")
    Path("content").write_bytes(b"\1" * (1 << 20) + bytes(3 << 20))
    address = UnixAddress(str(tmp_path / "socket"))
    config = serve_config(["disk"], fmt="qcow2", snapshot="s", address=address)
    with DaemonThread(config) as running:
        assert "(qcow2, 4 MiB, read-only)" in running.lines[0]
        QemuImg.compare(running.uris[0], Path("content"))
    config = serve_config(["content"], fmt="raw", snapshot="s", address=address)
    with pytest.raises(ImageError, match="'raw' has no option 'snapshot'"), DaemonThread(config):
        pass


def test_refusals_name_the_image_and_the_reason() -> None:
    QemuImg.create(Path("raw"), 1 << 20, fmt="raw")
    QemuImg.create(Path("narrow"), 1 << 20, options={"refcount_bits": 1})
    assert refusal("img", "snapshot", "-d", "no", "disk") == "disk: there is no snapshot 'no'"
    assert refusal("img", "snapshot", "-a", "no", "disk") == "disk: there is no snapshot 'no'"
    assert refusal("img", "snapshot", "-c", "s", "raw") == (
        "raw: format raw has no internal snapshots"
    )
    assert blockemu("img", "snapshot", "-l", "raw") == ""
    assert "refcount_bits=1" in refusal("img", "snapshot", "-c", "s", "narrow")
    assert "at most 255 bytes" in refusal("img", "snapshot", "-c", "n" * 256, "disk")


@pytest.mark.parametrize("options", ["-l -c x", "-a x -d y", "-c x -U"])
def test_options_that_exclude_each_other_are_wrong_usage(options: str) -> None:
    result = CliRunner().invoke(cli, ["img", "snapshot", *options.split(), "disk"])
    assert result.exit_code == 2


def test_image_in_use_is_refused_but_for_a_look_at_it() -> None:
    qemu_img("snapshot", "-c", "s", "disk")
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "disk"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        while b"4 MiB" not in user.stdout.readline():
            pass
        before = Path("disk").read_bytes()
        for option in ("-c", "-a", "-d"):
            said = refusal("img", "snapshot", option, "s", "disk")
            assert "is in use by another process" in said
        assert Path("disk").read_bytes() == before
        assert "s " in blockemu("img", "snapshot", "-l", "-U", "disk")
        user.communicate(b"quit\n")
