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
import sys
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from blockemu.activation import adopt
from blockemu.config import DaemonConfig, ImageConfig
from blockemu.drivers.backend import BlockBackend
from blockemu.drivers.child import Permission
from blockemu.drivers.errors import ImageError
from blockemu.drivers.metadata_budget import MetadataBudget
from blockemu.drivers.node import BlockDriverState
from blockemu.drivers.registry import Opener
from blockemu.export_control import ExportControl
from blockemu.exports import Export, ExportSpec, ExportTable
from blockemu.img.size import format_size
from blockemu.limits import SECOND_NS
from blockemu.listen import listen_unix, remove_unix_path
from blockemu.loop.aio_context import AioContext
from blockemu.loop.coroutine import Cancelled
from blockemu.loop.host_file import FileEngine, PosixFiles
from blockemu.loop.iothread import IOThread
from blockemu.loop.main_context import MainContext, MainLoop
from blockemu.loop.signals import SignalWatcher
from blockemu.loop.sync import Event
from blockemu.nbd_service import NbdService
from blockemu.notify import Notify, no_notify
from blockemu.qmp.server import QmpServer

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


GIL_SWITCH_S = 0.0005
"""How long a thread that wants the GIL waits before it asks for it. By default that is 5 ms: for so
long an IOThread with a fault to serve would wait for a main thread that negotiates with a crowd."""

LOOK_NS = 100_000_000
"""How often a start that waits looks whether it is to end."""

T = TypeVar("T")


class _StoppedError(Exception):
    """We were told to stop while images were being opened."""


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
            objects=config.objects,
        )
        self.exports = ExportTable(default_name=config.default_export)
        self.iothreads: dict[str, IOThread] = {}
        self.nbd = NbdService(self.iohandler_ctx, self.exports)
        self.export_control = ExportControl(
            self.main_ctx,
            self.exports,
            disconnect=self.nbd.disconnect,
            left_by_all=self.nbd.left_by_all,
            on_deleted=self._export_deleted,
        )
        self.control: QmpServer | None = None
        self._notify = notify
        self.port = 0
        """The TCP port that was given to us, once we listen."""
        self._paths: dict[str, str] = {}
        """Where the image of a node of ours lies, by the node's name."""
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
        if then_exit:
            sys.setswitchinterval(GIL_SWITCH_S)  # the whole process's, so only where it is ours
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
            try:
                await self._start(undo)
            except _StoppedError:
                log.info("told to stop before the images were open")
                return
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

    async def _unless_stopped(self, opening: Coroutine[Any, Any, T]) -> T:
        """What `opening` returns. It may wait for a server, for as long as the user said, and
        signals wait meanwhile: so we look for them. Raises: _StoppedError."""
        task = self.main_ctx.spawn(opening, name="open")

        def look() -> None:
            pending = self._watcher is not None and signal.sigpending() & set(STOP_SIGNALS)
            if pending or self._stopping.is_set():
                task.cancel()
            else:
                timer.arm(self.main_ctx.now_ns() + LOOK_NS)

        timer = self.main_ctx.new_timer(look)
        timer.arm(self.main_ctx.now_ns() + LOOK_NS)
        try:
            return await task
        except Cancelled:
            raise _StoppedError from None
        finally:
            timer.cancel()

    # --- start; each step says how it is undone ---

    async def _start(self, undo: AsyncExitStack) -> None:
        config = self.config
        nodes = [await self._open_image(image, undo) for image in config.images]
        undo.push_async_callback(self.export_control.close_all)
        for image, node in zip(config.images, nodes, strict=True):
            await self.add_export(node, image.export)
            self._paths[node.node_name] = image.path
        for alias in config.aliases:
            other = self.exports.get(alias.of)
            assert other is not None, alias
            await self.add_export(other.backend.node, alias.spec)
        self.nbd.start(
            config.addresses,
            config.limits,
            listing=config.listing,
            tls=config.tls,
            on_last_gone=self.stop if config.until_last_client else None,
        )
        undo.push_async_callback(self.nbd.stop)
        self.port = next((found.port for found in self.nbd.listeners if found.port), 0)
        self._listen_for_control(undo)

    async def add_export(self, node: BlockDriverState, spec: ExportSpec) -> Export:
        """Offer a node. Suspends, raises: as ExportControl.add."""
        return await self.export_control.add(node, spec)

    def _listen_for_control(self, undo: AsyncExitStack) -> None:
        config = self.config
        if config.control_path is None and not config.control_sockets:
            return
        self.control = QmpServer(self.main_ctx, self)
        undo.callback(self._close_control)
        if config.control_path is not None:
            listener = listen_unix(config.control_path)
            undo.callback(remove_unix_path, listener)
            self.control.listen(listener.sock)
            log.info("control socket: %s", listener.path)
        for address in config.control_sockets:
            sock = adopt(address)
            undo.callback(sock.close)
            self.control.listen(sock)

    def _close_control(self) -> None:
        control, self.control = self.control, None
        assert control is not None
        control.close()

    def _export_deleted(self, id: str) -> None:
        if self.control is not None:
            self.control.broadcast_event("BLOCK_EXPORT_DELETED", {"id": id})

    async def _open_image(self, image: ImageConfig, undo: AsyncExitStack) -> BlockDriverState:
        """Its node, in its thread's context, where we hold it open until the end."""
        thread = self._iothread(image.iothread, undo)
        opening = self.opener.open_image(
            image.path,
            fmt=image.fmt,
            read_only=image.read_only,
            snapshot=image.snapshot,
            direct=image.direct,
            aio=image.aio,
            discard=image.discard,
            detect_zeroes=image.detect_zeroes,
            overlap_check=image.overlap_check,
            no_flush=image.no_flush,
            offset=image.offset,
        )
        node = await self._unless_stopped(opening)
        hold = BlockBackend(image.path, node, writable=False, reads=False, shared=Permission.ALL)
        undo.push_async_callback(self._let_go, image.path, hold)
        await hold.move_to(thread.ctx)
        return node

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

    async def _let_go(self, path: str, hold: BlockBackend) -> None:
        """Take a node home, flush it and close its graph. A flush that fails is reported."""
        try:
            await hold.move_to(self.main_ctx)
            try:
                await hold.node.flush()
            finally:
                await hold.close()
        except OSError as error:
            raise ImageError(path, f"the last flush failed: {error.strerror}") from error

    # --- what it serves ---

    def describe_exports(self) -> list[str]:
        """A line for each export on each listener: its URI, then what it is."""
        return [
            f"{listener.uri(export.name)} {self._describe(export)}"
            for listener in self.nbd.listeners
            for export in self.exports
        ]

    def _describe(self, export: Export) -> str:
        backend = export.backend
        access = "read-only" if export.read_only else "read-write"
        size = format_size(backend.length_bytes)
        path = self._paths[backend.node.node_name]
        return f"({backend.node.driver.name}, {size}, {access}): {path}"
