# SPDX-License-Identifier: Apache-2.0
"""json: and file: names, on the command line and in headers, beside qemu-img; and whole chains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.peers.qemu import QemuImg, QemuIo
from tests.peers.requirement import require_peer
from tests.unit.img.side_by_side import our_output, ours, theirs

MIB = 1 << 20
GOOD = (
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2"}}',
    'json:{"driver":"qcow2","file.driver":"file","file.filename":"disk.qcow2"}',
    'json:{"driver":"qcow2","file.filename":"disk.qcow2"}',
    'json:{"driver":"qcow2","file.filename":"disk.qcow2","file.cache.direct":false}',
    'json:{"file":{"driver":"file","filename":"disk.qcow2"}}',
    'json:{"driver":"raw","file":{"driver":"file","filename":"disk.qcow2"}}',
    'json:{"driver":"raw","offset":65536,"size":512,"file":{"driver":"file","filename":"raw"}}',
    'json:{"driver":"file","filename":"disk.qcow2"}',
    "file:disk.qcow2",
)
BAD = {
    "json:{bad": "Could not parse the JSON options",
    "json:[]": "Invalid JSON object given",
    'json:{"driver":"nope"}': "there is no driver 'nope'",
    'json:{"driver":7}': "option 'driver' takes a text",
    'json:{"driver":"qcow2"}': "option 'file' is missing",
    'json:{"driver":"qcow2","file.filename":"disk.qcow2","hup":1}': "has no option 'hup'",
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2","hup":1}}': "'hup'",
    'json:{"driver":"qcow2","file":"disk.qcow2"}': "there is no node 'disk.qcow2'",
    'json:{"driver":"qcow2","file":[1]}': "",
    'json:{"driver":"qcow2","file.filename":"gone"}': "gone: No such file or directory",
    'json:{"driver":"nbd","server":{"type":"unix","path":"gone"}}': "connecting to gone failed",
    'json:{"driver":"nbd","server":{"type":"unix","path":"gone"},"x":1}': "connecting to gone",
    'json:{"driver":"nbd"}': "option 'server' is missing",
    "foo:bar": "Unknown protocol 'foo'",
    "nbd://localhost/x?tls-username=me": "goes with nbds:// only",
    "nbd://localhost:0x/": "is no URI",
    "nbd+unix:///x": "is no URI of a unix socket",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with some images."""
    require_peer("qemu-img")
    monkeypatch.chdir(tmp_path)
    QemuImg.create(Path("disk.qcow2"), MIB)
    QemuIo("disk.qcow2", fmt="qcow2").run("write -P 3 0 100k")
    Path("raw").write_bytes(b"r" * 66048)
    Path("sub").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_is_what_it_is_to_qemu_img(
    folder: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("info", "map --output=json", "map"):
        result, expected = ours(capfd, *command.split(), name), theirs(*command.split(), name)
        assert result.code == expected.code == 0, result.err + expected.err
        if command == "info" and '"driver":"file"' in name[:25]:
            # The size of a bare file is told to the byte.
            assert "file format: file" in result.out
            continue
        if command == "info" and '"offset"' in name:
            # QEMU calls a window by its options, and we by its file.
            assert "virtual size: 512 B (512 bytes)" in result.out
            continue
        assert result.out == expected.out
    assert ours(capfd, "compare", name, name).code == 0


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_one_line(folder: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert theirs("info", name).code == 1
    for command in ("info", "map", "convert"):
        result = ours(capfd, command, name, *(["target"] if command == "convert" else []))
        assert result.code == 1
        assert result.err.count("\n") == 1
        assert BAD[name] in result.err
    assert not Path("target").exists()


@pytest.mark.parametrize(
    "backing",
    [
        'json:{"driver":"raw","file":{"driver":"file","filename":"raw"}}',
        'json:{"driver":"raw","file.filename":"raw"}',
        'json:{"file":{"driver":"file","filename":"raw"}}',
        "file:raw",
    ],
)
def test_backing_file_is_named_from_the_current_folder(
    folder: Path, backing: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The image that says the name lies in another folder, with another file of that name."""
    Path("sub/raw").write_bytes(b"wrong" * 20000)
    words = ("create", "-f", "qcow2", "-b", backing, "-F", "raw")
    assert our_output(*words, "sub/ours") == theirs(*words, "sub/ours").out
    our_output(*words, "sub/ours")
    theirs(*words, "sub/theirs")
    for command in ("info", "info --backing-chain", "map", "info --output=json"):
        arguments = (*command.split(), "-f", "qcow2", "sub/ours")
        result, expected = ours(capfd, *arguments).out, theirs(*arguments).out
        if "json" in command:
            assert json.loads(result) == json.loads(expected)
        else:
            assert result == expected
    both = ("-f", "qcow2", "-F", "qcow2", "sub/ours", "sub/theirs")
    assert ours(capfd, "compare", *both).code == 0
    QemuIo("sub/ours", fmt="qcow2").run("read -P 114 0 66048", "write -P 1 0 512")
    our_output("commit", "-f", "qcow2", "sub/ours")
    assert Path("raw").read_bytes()[:513] == b"\1" * 512 + b"r"


def test_image_opts_are_what_they_are_to_qemu_img(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    opts = "driver=qcow2,file.filename=disk.qcow2"
    for command in ("info", "map", "measure -O qcow2", "check"):
        words = (*command.split(), "--image-opts", opts)
        assert ours(capfd, *words).out == theirs(*words).out
    our_output("convert", "--image-opts", opts, "target")
    assert theirs("compare", "target", "disk.qcow2").code == 0
    assert ours(capfd, "info", "--image-opts", "-f", "raw", opts).code == 2
    for bad, reason in (("nonsense", "isn't KEY=VALUE"), ("driver=raw,x=y", "'file' is missing")):
        result = ours(capfd, "info", "--image-opts", bad)
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert reason in result.err


def test_a_chain_is_described_as_qemu_img_does(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, below in (("sub/middle", "../disk.qcow2"), ("top", "sub/middle")):
        our_output("create", "-f", "qcow2", "-b", below, "-F", "qcow2", name)
    for output in ("human", "json"):
        words = ("info", "--backing-chain", "--output", output, "-f", "qcow2", "top")
        result, expected = ours(capfd, *words).out, theirs(*words).out
        if output == "json":
            assert json.loads(result) == json.loads(expected)
        else:
            assert result == expected
    guessed = ours(capfd, "info", "--backing-chain", "top")
    assert guessed.code == 1
    assert "say -f qcow2" in guessed.err


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_a_chain_that_leads_back_to_itself_is_refused(
    folder: Path, names: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for index, name in enumerate(names):
        backing = f"./{names[(index + 1) % len(names)]}"
        theirs("create", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", name, "1M")
    words = ("info", "--backing-chain", "-f", "qcow2", "a")
    result, expected = ours(capfd, *words), theirs(*words)
    assert result.code == expected.code == 1
    assert "infinite loop" in result.err
    assert result.out == expected.out == ""


def test_an_image_isnt_made_where_no_path_leads(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("foo:x", "nbd://localhost:1/x", 'json:{"driver":"file","filename":"x"}'):
        for words in (("create", "-f", "raw", name, "1M"), ("convert", "raw", name)):
            result = ours(capfd, *words)
            assert result.code == 1
            assert result.err.count("\n") == 1
    our_output("create", "-f", "raw", "file:a:b", "1M")
    assert Path("a:b").stat().st_size == MIB
