# SPDX-License-Identifier: Apache-2.0
"""Several exports of one image: what real clients see of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockemu.addresses import UnixAddress, VsockAddress
from blockemu.config import serve_config
from blockemu.errors import DaemonError
from tests.peers.libnbd import require_libnbd
from tests.peers.nbd_tools import NbdInfo
from tests.peers.requirement import require_peer
from tests.unit.daemon_thread import DaemonThread

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


@pytest.mark.parametrize("native", [True, False])
def test_two_names_of_one_image_share_its_bytes_and_not_their_rights(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    if not native:
        monkeypatch.setenv("BLOCKEMU_NATIVE", "0")
    nbd = require_libnbd()
    config = serve_config(
        [str(image)],
        aliases=["name=look,of=disk,writable=off,description=only look,, don't touch"],
        address=UnixAddress(str(tmp_path / "s")),
    )
    with DaemonThread(config) as running:
        write, look = nbd.NBD(), nbd.NBD()
        write.connect_uri(running.uris[0])
        look.set_full_info(True)
        look.connect_uri(running.uris[1])
        assert (write.is_read_only(), look.is_read_only()) == (False, True)
        assert look.get_export_description() == "only look, don't touch"
        write.pwrite(b"both see this", 4096)
        assert look.pread(13, 4096) == b"both see this"
        look.set_strict_mode(0)
        with pytest.raises(nbd.Error, match=r"(?i)permitted"):
            look.pwrite(b"not from here", 4096)
        write.pwrite(b"and this, too", 4096)
        assert look.pread(13, 4096) == b"and this, too"
        exports = list(running.daemon.exports)
        assert exports[0].backend.node is exports[1].backend.node
        write.shutdown()
        look.shutdown()
    assert image.read_bytes()[4096:][:13] == b"and this, too"


def test_a_further_name_has_meta_contexts_of_its_own() -> None:
    text = "name=look,of=disk,bitmap=a,,b,bitmap=c,allocation-depth=on"
    config = serve_config(["disk.raw"], aliases=[text])
    spec = config.aliases[0].spec
    assert (spec.bitmaps, spec.allocation_depth) == (("a,b", "c"), True)
    assert not config.images[0].export.bitmaps


def test_what_is_hidden_and_what_is_the_default(image: Path, tmp_path: Path) -> None:
    require_peer("nbdinfo")
    config = serve_config(
        [str(image)],
        aliases=["name=spare,of=disk,hidden=on", "name=main,of=spare"],
        hidden=["disk"],
        default_export="spare",
        address=UnixAddress(str(tmp_path / "s")),
    )
    with DaemonThread(config) as running:
        uri = f"nbd+unix:///?socket={tmp_path}/s"
        assert NbdInfo.export_names(uri) == ["main"]
        assert NbdInfo.describe(uri)["export-size"] == MIB
        assert NbdInfo.size(running.uris[0]) == MIB


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name=a", "lacks 'of'"),
        ("of=disk", "lacks 'name'"),
        ("name=a,of=none", "there is no export 'none'"),
        ("name=disk,of=disk", "export name 'disk' is taken already"),
        ("name=a,of=disk,colour=red", "there is no 'colour'; known: name, of"),
        ("name=a,of=disk,hidden", "'hidden' needs a value"),
        ("name=a,of=disk,hidden=maybe", "'hidden' is on or off, not 'maybe'"),
        ("name=a,of=disk,name=b", "'name' is given twice"),
        ("name=a,of=disk,bitmap=", "'bitmap' needs the name of one"),
        ("name=a,of=disk,allocation-depth=2", "'allocation-depth' is on or off, not '2'"),
        ("name=a,of=disk,max-connections=0", "'max-connections' is a number from 1, not '0'"),
        ("name=a,of=disk,max-connections=x", "'max-connections' is a number from 1, not 'x'"),
        (f"name={'x' * 4097},of=disk", "at most 4096 bytes"),
        (f"name=a,of=disk,description={'x' * 4097}", "at most 4096 bytes"),
        ("name=\udcff,of=disk", "isn't UTF-8"),
    ],
)
def test_a_bad_export_option_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(DaemonError) as caught:
        serve_config(["disk.raw"], aliases=[text])
    assert complaint in str(caught.value)


def test_options_that_name_no_export_are_refused() -> None:
    with pytest.raises(DaemonError, match="--hidden b: there is no export"):
        serve_config(["a.raw"], hidden=["b"])
    with pytest.raises(DaemonError, match="--default b: there is no export"):
        serve_config(["a.raw"], default_export="b")
    with pytest.raises(DaemonError, match="more --description options than images"):
        serve_config(["a.raw"], descriptions=["one", "two"])


def test_a_writable_name_for_a_read_only_image_is_refused(image: Path, tmp_path: Path) -> None:
    config = serve_config(
        [str(image)],
        read_only=True,
        aliases=["name=w,of=disk"],
        address=UnixAddress(str(tmp_path / "s")),
    )
    with pytest.raises(Exception, match=r"disk\.raw: is read-only"), DaemonThread(config):
        pass


def test_addresses_that_clash_are_refused() -> None:
    with pytest.raises(DaemonError, match="s: is given to --socket twice"):
        serve_config(["a.raw"], address=[UnixAddress("s"), UnixAddress("s")])
    with pytest.raises(DaemonError, match="s: is given to both --socket and --control"):
        serve_config(["a.raw"], address=[VsockAddress(), UnixAddress("s")], control_path="s")
