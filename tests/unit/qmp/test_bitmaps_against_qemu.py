# SPDX-License-Identifier: Apache-2.0
"""The block-dirty-bitmap commands beside qemu-storage-daemon's: the same answers, word for word,
and the same list of bitmaps, for the same requests."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

from blockemu.config import UnixAddress, serve_config
from tests.peers.qemu import QemuImg, run_tool
from tests.peers.requirement import require_peer
from tests.unit.daemon_thread import DaemonThread
from tests.unit.drivers.qcow2.checker import Checker

Request = tuple[str, dict[str, Any]]

REQUESTS: list[Request] = [
    ("add", {"name": "a"}),
    ("add", {"name": "a"}),
    ("add", {"node": "no", "name": "a"}),
    ("add", {"name": ""}),
    ("add", {"name": "z", "granularity": 100}),
    ("add", {"name": "z", "granularity": 1}),
    ("add", {"name": "p", "persistent": True, "disabled": True, "granularity": 4096}),
    ("add", {"name": "q", "persistent": True}),
    ("enable", {"name": "p"}),
    ("disable", {"name": "a"}),
    ("clear", {"name": "a"}),
    ("clear", {"name": "x"}),
    ("enable", {"name": "x"}),
    ("disable", {"node": "no", "name": "x"}),
    ("remove", {"name": "x"}),
    ("enable", {"name": "theirs"}),
    ("clear", {"name": "broken"}),
    ("merge", {"target": "a", "bitmaps": ["broken"]}),
    ("merge", {"target": "a", "bitmaps": ["p", "theirs", {"node": "NODE", "name": "q"}]}),
    ("merge", {"target": "p", "bitmaps": ["theirs", "x"]}),
    ("merge", {"target": "x", "bitmaps": ["a"]}),
    ("merge", {"target": "a", "bitmaps": [{"node": "no", "name": "x"}]}),
    ("merge", {"target": "a", "bitmaps": [{"name": "x"}]}),
    ("merge", {"target": "a"}),
    ("add", {"name": "a", "bitmap": "a"}),
    ("remove", {"name": "q"}),
]


def image(path: Path) -> Path:
    """With a bitmap "theirs" in which something is dirty, and one that a crash has left."""
    QemuImg.create(path, 8 << 20)
    run_tool(["qemu-img", "bitmap", "--add", path, "theirs"])
    run_tool(["qemu-io", "-f", "qcow2", "-c", "write 1M 200k", path])
    run_tool(["qemu-img", "bitmap", "--disable", path, "theirs"])
    run_tool(["qemu-img", "bitmap", "--add", path, "broken"])
    content = bytearray(path.read_bytes())
    content[content.rindex(b"broken") - 9] |= 1
    path.write_bytes(content)
    return path


def wire(requests: list[Request], node: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for verb, members in requests:
        text = json.dumps({"node": node, **members}).replace('"NODE"', f'"{node}"')
        found.append({"execute": f"block-dirty-bitmap-{verb}", "arguments": json.loads(text)})
        found.append({"execute": "query-named-block-nodes", "arguments": {"flat": True}})
    return found


def answers(lines: list[str], node: str) -> list[Any]:
    """Of each request: what is returned, or the sentence; of a query, the node's bitmaps."""
    found: list[Any] = []
    for response in map(json.loads, lines):
        if "error" in response:
            found.append(response["error"]["desc"])
        elif isinstance(response["return"], list):
            (shown,) = [facts for facts in response["return"] if facts["node-name"] == node]
            found.append(shown.get("dirty-bitmaps"))
        else:
            found.append(response["return"])
    return found


def ask_qemu(path: Path) -> list[Any]:
    requests = [{"execute": "qmp_capabilities"}, *wire(REQUESTS, "disk"), {"execute": "quit"}]
    command = [
        "qemu-storage-daemon", "--blockdev", f"file,node-name=file,filename={path}",
        "--blockdev", "qcow2,node-name=disk,file=file",
        "--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp",
    ]  # fmt: skip
    done = subprocess.run(
        command, input="".join(map(json.dumps, requests)), capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "QMP" not in line and "event" not in line]
    return answers(lines[1 : 1 + 2 * len(REQUESTS)], "disk")


def ask_us(path: Path, folder: Path) -> list[Any]:
    control = str(folder / "control")
    config = serve_config(
        [str(path)], address=UnixAddress(str(folder / "nbd")), control_path=control
    )
    with DaemonThread(config), socket.socket(socket.AF_UNIX) as client:
        client.connect(control)
        file = client.makefile("rw")

        def ask(request: dict[str, Any]) -> str:
            file.write(json.dumps(request))
            file.flush()
            return file.readline()

        assert "QMP" in file.readline()
        ask({"execute": "qmp_capabilities"})
        (export,) = json.loads(ask({"execute": "query-block-exports"}))["return"]
        node = export["node-name"]
        return answers([ask(request) for request in wire(REQUESTS, node)], node)


def test_same_requests_have_the_same_answers(tmp_path: Path) -> None:
    require_peer("qemu-storage-daemon")
    ours, theirs = image(tmp_path / "ours"), image(tmp_path / "theirs")
    found, wanted = ask_us(ours, tmp_path), ask_qemu(theirs)
    assert len(found) == len(wanted) == 2 * len(REQUESTS)
    for index, (mine, qemus) in enumerate(zip(found, wanted, strict=True)):
        request = REQUESTS[index // 2]
        if isinstance(qemus, list):
            assert by_name(mine) == by_name(qemus), request
        elif isinstance(qemus, str) and "is inconsistent" in qemus:
            assert mine.startswith(qemus), request  # and says what can be done
        else:
            assert mine == qemus, request
    for path in (ours, theirs):
        verdict = QemuImg.check(path)
        assert (verdict.corruptions, verdict.leaks, verdict.errors) == (0, 0, 0), verdict.text
    stored = Checker(ours.read_bytes()).bitmaps()
    assert stored == Checker(theirs.read_bytes()).bitmaps()
    assert sorted(stored) == ["broken", "p", "theirs"]


def by_name(bitmaps: list[dict[str, Any]]) -> dict[str, Any]:
    """The order of those that an image has isn't promised; nor is `recording` of one that a crash
    has left, which nothing records in."""
    found = {facts["name"]: facts for facts in bitmaps}
    for facts in found.values():
        if facts.get("inconsistent"):
            del facts["recording"]
    return found
