# SPDX-License-Identifier: Apache-2.0
"""A stand-in for fio's first connection.

fio's nbd engine connects twice: once to ask for the size, and then to work. qemu-storage-daemon
7.2 as Debian 12 ships it aborts as soon as the first client of an export on an iothread
disconnects ("Assertion `qemu_in_main_thread()' failed"), so that fio's second connection finds
nobody. Here the first connection is answered by a few lines of Python that know the size, and
while it is being answered the real socket is renamed over the decoy's: the second one reaches the
real server, and the measurement isn't touched.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

MAGIC = b"NBDMAGICIHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
OPT_ABORT, OPT_GO = 2, 7
REP_ACK, REP_INFO, REP_ERR_UNSUP = 1, 3, (1 << 31) + 1
FLAGS = 0b1101101  # has flags, flush, FUA, trim, write zeroes


def _receive(connection: socket.socket, length: int) -> bytes:
    data = connection.recv(length, socket.MSG_WAITALL) if length else b""
    if len(data) != length:
        raise ConnectionError("the client left during negotiation")
    return data


class Decoy:
    """Answers one client on `public`, then `real` takes that path over."""

    def __init__(self, *, real: Path, public: Path, size_bytes: int) -> None:
        self._real = real
        self._public = public
        self._size_bytes = size_bytes
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        public.unlink(missing_ok=True)
        self._listener.bind(str(public))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, name="decoy", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # closed before anybody came
        os.rename(self._real, self._public)
        with connection:
            try:
                self._negotiate(connection)
                while connection.recv(4096):
                    pass
            except ConnectionError:
                return

    def _negotiate(self, connection: socket.socket) -> None:
        connection.sendall(MAGIC + struct.pack(">H", 3))
        _receive(connection, 4)
        while True:
            _magic, option, length = struct.unpack(">QII", _receive(connection, 16))
            _receive(connection, length)
            if option == OPT_GO:
                info = struct.pack(">HQH", 0, self._size_bytes, FLAGS)
                self._reply(connection, option, REP_INFO, info)
                self._reply(connection, option, REP_ACK)
                return
            if option == OPT_ABORT:
                self._reply(connection, option, REP_ACK)
                return
            self._reply(connection, option, REP_ERR_UNSUP)

    @staticmethod
    def _reply(connection: socket.socket, option: int, kind: int, payload: bytes = b"") -> None:
        connection.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(payload)) + payload)

    def close(self) -> None:
        """Stop listening, and wait for the helper thread."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()
        self._thread.join()
