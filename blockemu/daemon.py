# SPDX-License-Identifier: Apache-2.0
"""The daemon: everything that `blockemu serve` holds together, from start to orderly end.

One object, no globals, so that two fit in one process. It runs in the thread that calls `run`,
which becomes the home of two AioContexts on one MainContext: `main` for the graph's life cycle and
the control socket, `iohandler` for signals, listening sockets and negotiation. Exports do their I/O
in IOThreads.

Start: open every image, move its backend to its IOThread, then listen, then announce. What was done
is on a stack of undoings, so a failure half-way and an ordinary end take the same way back:
stop accepting, answer what is in flight, take backends home, flush and close them, stop the
threads, remove the sockets' files.
"""

from __future__ import annotations

import functools
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack

from blockemu.config import DaemonConfig, ImageConfig, UnixAddress
from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.errors import ImageError
from blockemu.drivers.metadata_budget import MetadataBudget
from blockemu.drivers.registry import Opener
from blockemu.exports import Export, ExportTable
from blockemu.img.size import format_size
from blockemu.limits import SECOND_NS
from blockemu.listen import listen_tcp, listen_unix, remove_unix_path
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import run_in_context
from blockemu.loop.host_file import FileEngine, PosixFiles
from blockemu.loop.iothread import IOThread
from blockemu.loop.main_context import MainContext, MainLoop
from blockemu.loop.signals import SignalWatcher
from blockemu.loop.sync import Event
from blockemu.nbd.server import NbdServer
from blockemu.notify import Notify, no_notify
from blockemu.qmp.server import QmpServer
from blockemu.uri import tcp_uri, unix_uri

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Daemon:
    """One daemon. Context: the thread that calls `run`, for all but `stop`."""

    def __init__(
        self,
        config: DaemonConfig,
        *,
        files: FileEngine | None = None,
        notify: Notify = no_notify,
    ) -> None:
        self.config = config
        self.main_ctx = AioContext("main")
        self.iohandler_ctx = AioContext("iohandler")
        self.opener = Opener(
            files=files or PosixFiles(),
            ctx=self.main_ctx,
            metadata_budget=MetadataBudget(config.metadata_bytes_max),
            secrets=config.secrets,
        )
        self.exports = ExportTable()
        self.iothreads: dict[str, IOThread] = {}
        self.nbd = NbdServer(self.iohandler_ctx, self.exports, limits=config.limits)
        self.control: QmpServer | None = None
        self._notify = notify
        self.port = 0
        """The TCP port that was given to us, once we listen."""
        self._stopping = Event()
        self._watcher: SignalWatcher | None = None

    # --- the thread that runs it ---

    def run(
        self,
        *,
        handle_signals: bool = False,
        then_exit: bool = False,
        on_ready: Callable[[list[str]], None] = lambda lines: None,
    ) -> None:
        """Serve until `stop`, or until a signal if `handle_signals` (main thread only).

        `then_exit`: the process has nothing else to do. Signals then do nothing any more, so that
        a second one, which finds the images closed and the interpreter on its way out, doesn't turn
        a clean end into a failed one. Keep the daemon until the process exits.
        `on_ready` is handed one line per export, its URI first, when clients can connect.
        Raises: ImageError, DaemonError, when it can't start; everything is undone then. OSError,
        when an image couldn't be flushed at the end.
        """
        context = MainContext()
        loop = MainLoop(context)
        self.main_ctx.adopt()
        self.iohandler_ctx.adopt()
        self.main_ctx.attach(context)
        self.iohandler_ctx.attach(context)
        try:
            if handle_signals:
                self._watcher = SignalWatcher(self.iohandler_ctx, STOP_SIGNALS, self._on_signal)
                self._hold_signals(hold=True)
            life = self.main_ctx.spawn(self._live(on_ready), name="daemon")
            life.add_done_callback(lambda _: loop.quit())
            if not life.done():
                loop.run()
            life.result()
        finally:
            self.main_ctx.close()
            if self._watcher is not None and not then_exit:
                self._watcher.close()
                self._hold_signals(hold=False)
            self.iohandler_ctx.close()
            context.close()

    def stop(self) -> None:
        """Begin an orderly end. Context: any thread. More than once is once."""
        self.main_ctx.schedule_oneshot(self._stopping.set)

    def _on_signal(self, number: int) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        self.stop()

    def _hold_signals(self, *, hold: bool) -> None:
        """Let signals wait, or let them come.

        They wait during the start, so that the threads which are started then block them too, and
        from the beginning of the end on, when one more means nothing. A thread may live on for a
        moment after it was joined; one that doesn't block a signal would then die of it, and with
        it the process.
        """
        if self._watcher is not None:
            how = signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK
            signal.pthread_sigmask(how, STOP_SIGNALS)

    async def _live(self, on_ready: Callable[[list[str]], None]) -> None:
        patience = self.main_ctx.new_timer(self._cancel_in_flight)
        async with AsyncExitStack() as undo:
            undo.callback(patience.cancel)
            await self._start(undo)
            on_ready(self.describe_exports())
            self._notify("READY=1")
            self._hold_signals(hold=False)
            await self._stopping.wait()
            self._hold_signals(hold=True)
            self._notify("STOPPING=1")
            patience.arm(self.main_ctx.now_ns() + self.config.limits.remote_linger_ns)

    def _cancel_in_flight(self) -> None:
        """What still waits for servers that images are on has waited long enough."""
        seconds = self.config.limits.remote_linger_ns / SECOND_NS
        reason = f"no answer within {seconds:g} s, and the daemon is stopping"
        for node in self.opener.nodes.values():
            node.ctx.schedule_oneshot(functools.partial(node.driver.cancel_in_flight, reason))

    # --- start; each step says how it is undone ---

    async def _start(self, undo: AsyncExitStack) -> None:
        for image in self.config.images:
            await self._open_export(image, undo)
        sockets = self._bind(undo)
        undo.push_async_callback(run_in_context, self.iohandler_ctx, self.nbd.close)
        for sock in sockets:
            self.nbd.listen(sock)
        if self.config.control_path is not None:
            listener = listen_unix(self.config.control_path)
            undo.callback(remove_unix_path, listener)
            self.control = QmpServer(self.main_ctx, self)
            undo.callback(self.control.close)
            self.control.listen(listener.sock)
            log.info("control socket: %s", listener.path)

    async def _open_export(self, image: ImageConfig, undo: AsyncExitStack) -> None:
        thread = self._iothread(image.iothread, undo)
        node = await self.opener.open_image(
            image.path,
            fmt=image.fmt,
            read_only=image.read_only,
            snapshot=image.snapshot,
            direct=image.direct,
            aio=image.aio,
            discard=image.discard,
            detect_zeroes=image.detect_zeroes,
            overlap_check=image.overlap_check,
        )
        try:
            backend = BlockBackend(image.export_name, node, writable=not image.read_only)
        except BaseException:
            await node.close()
            raise
        undo.push_async_callback(self._close_backend, image.path, backend)
        await backend.move_to(thread.ctx)
        export = Export(image.export_name, backend, read_only=image.read_only)
        self.exports.add(export)
        undo.callback(self.exports.remove, export.name)

    def _iothread(self, name: str, undo: AsyncExitStack) -> IOThread:
        """The IOThread of this name, started if it is the first to be asked for it."""
        if name not in self.iothreads:
            thread = IOThread(name, poll_params=self.config.poll_params)
            thread.start()
            self.iothreads[name] = thread
            undo.callback(self._stop_iothread, thread)
        return self.iothreads[name]

    def _stop_iothread(self, thread: IOThread) -> None:
        del self.iothreads[thread.name]
        thread.stop()

    async def _close_backend(self, path: str, backend: BlockBackend) -> None:
        """Take the backend home, flush it and close its graph. A flush that fails is reported."""
        try:
            await backend.move_to(self.main_ctx)
            await backend.close()
        except OSError as error:
            raise ImageError(path, f"the last flush failed: {error.strerror}") from error

    def _bind(self, undo: AsyncExitStack) -> list[socket.socket]:
        """The listening sockets."""
        address = self.config.address
        if isinstance(address, UnixAddress):
            listener = listen_unix(address.path)
            undo.callback(remove_unix_path, listener)
            return [listener.sock]
        sockets = listen_tcp(address.host, address.port)
        for sock in sockets:
            undo.callback(sock.close)
        self.port = sockets[0].getsockname()[1]
        return sockets

    # --- what it serves ---

    def uri(self, export_name: str) -> str:
        """Where clients find the export of this name."""
        address = self.config.address
        if isinstance(address, UnixAddress):
            return unix_uri(address.path, export_name)
        return tcp_uri(address.host, self.port, export_name)

    def describe_exports(self) -> list[str]:
        """A line for each export: its URI, then what it is."""
        lines = []
        for export, image in zip(self.exports, self.config.images, strict=True):
            backend = export.backend
            access = "read-only" if export.read_only else "read-write"
            size = format_size(backend.length_bytes)
            lines.append(
                f"{self.uri(export.name)} ({backend.node.driver.name}, {size}, {access}): "
                f"{image.path}"
            )
        return lines
