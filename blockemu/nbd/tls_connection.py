# SPDX-License-Identifier: Apache-2.0
"""A connection in transmission whose bytes travel under TLS.

It is Python's (transmission.py) on a `TlsStream`, which looks like a socket. What differs:

- Input may wait inside the stream, where no poll sees it. After each read, and whenever reading
  begins again, a bottom half comes back for it.
- The stream may have something to send that isn't a reply (an alert): then, too, it is watched for
  room.
- At the end the client is told that the stream ends here (close_notify), before the socket is shut
  down. From then on the socket is a plain one to us: what still comes is thrown away undecrypted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockemu.nbd.connection import State
from blockemu.nbd.transmission import Connection

if TYPE_CHECKING:
    from blockemu.loop.bottom_half import BH
    from blockemu.loop.stream_socket import StreamSocket
    from blockemu.loop.tls_stream import TlsStream


class TlsConnection(Connection):
    """Context: as Connection's."""

    __slots__ = ("_buffered_bh", "_tls")

    # What `start` makes.
    _buffered_bh: BH
    _tls: TlsStream

    def _stream(self) -> StreamSocket:
        return self._tls

    def _begin_to_serve(self) -> None:
        assert self.session.tls is not None
        self._tls = self.session.tls
        self._buffered_bh = self.ctx.new_bh(self._on_buffered, name="nbd-tls-buffered")
        super()._begin_to_serve()
        # Requests may have come in one piece with the last option.
        self._read_buffered_later()

    def _let_go(self) -> None:
        super()._let_go()
        self._buffered_bh.delete()
        self._tls.say_farewell()

    # --- input that no poll sees ---

    def _may_read_buffered(self) -> bool:
        return (
            self._tls.buffered
            and self._state is State.OPEN
            and not self._paused
            and not self.export.quiet  # a socket would be silent during a drained section
        )

    def _read_buffered_later(self) -> None:
        if self._may_read_buffered():
            self._buffered_bh.schedule()

    def _on_buffered(self) -> None:
        if self._may_read_buffered():
            self._on_readable()

    def _on_readable(self) -> None:
        super()._on_readable()
        if self._state is State.OPEN:
            if self._tls.unsent and not self._blocked:
                self._blocked = True
                self._set_interest()
            self._read_buffered_later()

    def resume(self) -> None:
        super().resume()
        self._read_buffered_later()

    def _pause(self, paused: bool) -> None:
        super()._pause(paused)
        self._read_buffered_later()

    # --- output that is no reply ---

    def send(self) -> None:
        if self._state is not State.CLOSED and not self.replies.parts and self._tls.unsent:
            try:
                if not self._tls.flush():
                    return
            except OSError as error:
                self.drop(f"send failed: {error.strerror}")
                return
        super().send()
