# SPDX-License-Identifier: Apache-2.0
"""Isolation: does an export answer as fast while the daemon's main thread is busy?

One client at depth 1 reads from an export on an IOThread; its p99 is measured while the main thread
is idle, while it answers control commands at full speed, and (ours) while it runs Python code all
the time. The same control load on qemu-storage-daemon, which has no interpreter, shows what is to
be had.

On a machine of few cores a busy main thread also takes a core away from the client and from the
export's thread. That isn't ours to mend, and must not pass for the interpreter's lock, or hide it.
So each load has a control with the same appetite for CPU in another process: the control commands
go to a second daemon of the same kind, the Python code runs in an unrelated process. What p99 gains
from the control to the load itself is the daemon's own doing.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.contestants import OURS
from benchmarks.controlled import BusyDaemon, ControlledQsd, QmpLoad
from benchmarks.decoy import Decoy
from benchmarks.images import copy_image, make_master
from benchmarks.isolation_report import BUSY, BUSY_BESIDE, IDLE, QMP, QMP_BESIDE, QSD, Sample
from benchmarks.load import run_load
from benchmarks.measure import rotated
from benchmarks.workloads import MIB, WORKLOADS, Setting
from tests.peers.process import ServerFailed, nbd_uri
from tests.peers.qemu import ToolFailed

SETTING = Setting("raw", direct=False)
SIZE_BYTES = 64 * MIB
WORKLOAD = next(workload for workload in WORKLOADS if workload.name == "randread-4k-d1")

# Round by round in rotated order; qemu-storage-daemon has no Python to be busy with.
TURNS = (
    (OURS, IDLE),
    (QSD, IDLE),
    (OURS, QMP),
    (QSD, QMP),
    (OURS, QMP_BESIDE),
    (QSD, QMP_BESIDE),
    (OURS, BUSY),
    (OURS, BUSY_BESIDE),
    (QSD, BUSY_BESIDE),
)

BUSY_PROCESS = (sys.executable, "-I", "-S", "-c", "while True: pass")


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """A process that has nothing to do with us and takes what CPU it can get."""
    with subprocess.Popen(BUSY_PROCESS, stdin=subprocess.DEVNULL) as child:
        try:
            yield
        finally:
            child.kill()


@dataclass
class Bench:
    """The servers: ours stays up; qemu-storage-daemon's are new for each turn (see decoy.py)."""

    folder: Path
    runtime_s: float
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        master = make_master(self.folder, SETTING, SIZE_BYTES)
        self._images = {
            name: copy_image(master, self.folder / f"{name}.img", direct=False)
            for name in (OURS, f"{OURS}-beside", QSD, f"{QSD}-beside")
        }
        self._ours: BusyDaemon | None = None

    def _our_daemon(self, name: str) -> BusyDaemon:
        return BusyDaemon(
            self._images[name],
            socket_path=self.folder / f"{name}.sock",
            control_path=self.folder / f"{name}.qmp",
        )

    def _qsd(self, name: str) -> ControlledQsd:
        return ControlledQsd(
            self._images[name],
            socket_path=self.folder / f"{name}.real",
            control_path=self.folder / f"{name}.qmp",
            aio="io_uring",
        )

    @contextlib.contextmanager
    def _serving_ours(self) -> Iterator[tuple[BusyDaemon, str]]:
        if self._ours is None:
            self._ours = self._our_daemon(OURS).__enter__()
        yield self._ours, self._ours.uri

    @contextlib.contextmanager
    def _serving_qsd(self) -> Iterator[tuple[ControlledQsd, str]]:
        public = self.folder / f"{QSD}.sock"
        server = self._qsd(QSD)
        try:
            server.start()
            decoy = Decoy(real=server.socket_path, public=public, size_bytes=SIZE_BYTES)
            with contextlib.closing(decoy):
                yield server, nbd_uri(public, server.export)
        finally:
            server.discard()

    def _load_ours(self, phase: str, stack: contextlib.ExitStack) -> tuple[str, QmpLoad | None]:
        server, uri = stack.enter_context(self._serving_ours())
        if phase == BUSY:
            server.set_busy(busy=True)
            stack.callback(server.set_busy, busy=False)
        if phase == QMP:
            return uri, stack.enter_context(QmpLoad(server.control_path))
        if phase == QMP_BESIDE:
            other = self._our_daemon(f"{OURS}-beside")
            stack.enter_context(other)
            return uri, stack.enter_context(QmpLoad(other.control_path))
        return uri, None

    def _load_qsd(self, phase: str, stack: contextlib.ExitStack) -> tuple[str, QmpLoad | None]:
        server, uri = stack.enter_context(self._serving_qsd())
        if phase == QMP:
            return uri, stack.enter_context(QmpLoad(server.control_path))
        if phase == QMP_BESIDE:
            other = self._qsd(f"{QSD}-beside")
            stack.callback(other.discard)
            other.start()
            return uri, stack.enter_context(QmpLoad(other.control_path))
        return uri, None

    def measure(self, server: str, phase: str, turn: int) -> None:
        """One fio run while `phase` is on. Raises: ServerFailed, ToolFailed."""
        with contextlib.ExitStack() as stack:
            if phase == BUSY_BESIDE:
                stack.enter_context(busy_process())
            prepare = self._load_ours if server == OURS else self._load_qsd
            uri, control = prepare(phase, stack)
            found = run_load(
                uri,
                WORKLOAD,
                runtime_s=self.runtime_s,
                under_load=control.check if control is not None else lambda: None,
            )
        per_s = control.per_s if control is not None else 0.0
        self.samples.append(
            Sample(
                server, phase, turn, found.iops, found.mean_us, found.p50_us, found.p99_us, per_s
            )
        )

    def close(self) -> None:
        """Stop what stays up."""
        if self._ours is not None:
            self._ours.discard()
            self._ours = None


def run_isolation(
    folder: Path,
    servers: Sequence[str],
    *,
    rounds: int,
    runtime_s: float,
    complain: Callable[[str], None],
) -> list[Sample]:
    """All turns, round by round; a server that fails is dropped with a word."""
    bench = Bench(folder, runtime_s)
    turns = [(server, phase) for server, phase in TURNS if server in servers]
    with contextlib.closing(bench):
        for turn in range(rounds):
            for server, phase in rotated(turns, turn):
                if (server, phase) not in turns:
                    continue  # dropped in this round
                try:
                    bench.measure(server, phase, turn)
                except (ServerFailed, ToolFailed) as error:
                    line = str(error).splitlines()[0]
                    complain(f"isolation: {server} is out: {line}")
                    turns = [one for one in turns if one[0] != server]
            if not turns:
                break
    return bench.samples
