"""The agent's end of the control socket of one runner. Rule: it never blocks, and data that is no frame is an error."""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lattice_worker.runner.frames import (
    MAX_FRAME_BYTES,
    PACKET_BYTES,
    Assembler,
    ProtocolError,
    joined,
    packets_of,
    parse,
)

MAX_READS = 64  # Of one socket in a row, so that other sockets are read too.


class Control:
    """Sends frames, and receives frames of at most `limit_bytes`. `on_frame` takes a header and blobs, `on_error` the
    error of data that is no frame; `on_lost` is called once, when the other end is closed."""

    def __init__(
        self,
        sock: socket.socket,
        on_frame: Callable[[dict[str, Any], list[bytes]], None],
        on_error: Callable[[ProtocolError], None],
        on_lost: Callable[[], None],
        limit_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self._sock = sock
        self._on_frame, self._on_error, self._on_lost = on_frame, on_error, on_lost
        self._assembler = Assembler(limit_bytes)
        self._unsent: list[bytes] = []
        self._outbox: deque[bytes] = deque()
        self._is_writing = self._has_writer = False
        self._buffer = bytearray(PACKET_BYTES)
        self.is_open = True
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self.read)

    def send(self, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Send a frame as soon as the process takes it, together with all frames of the same step."""
        if self.is_open:
            self._unsent += packets_of(header, blobs)
            if not self._is_writing:
                self._is_writing = True
                self._loop.call_soon(self._write)

    def _write(self) -> None:
        self._outbox.extend(joined(self._unsent))
        self._unsent.clear()
        try:
            while self._outbox:
                self._sock.send(self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            if not self._has_writer:
                self._has_writer = True
                self._loop.add_writer(self._sock, self._write)
            return
        except OSError:
            self._outbox.clear()  # The process has ended, which the next read finds out.
        self._is_writing = False
        self._stop_writer()

    def _stop_writer(self) -> None:
        if self._has_writer:
            self._has_writer = False
            self._loop.remove_writer(self._sock)

    def read(self) -> None:
        """Take frames that have arrived, up to a bound."""
        for _ in range(MAX_READS):
            if not self._read_packet():
                return

    def drain(self) -> None:
        """Take all frames that arrived before the process ended."""
        while self._read_packet():
            pass

    def _read_packet(self) -> bool:
        """Take one packet; return whether there may be another one."""
        if not self.is_open:
            return False
        try:
            size = self._sock.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # Raised once when the process left data unread; its own frames are read after it.
        except OSError:
            size = 0
        if not size:
            self.close()
            return False
        try:
            found = [parse(frame) for frame in self._assembler.feed(bytes(memoryview(self._buffer)[:size]))]
        except ProtocolError as error:
            self._on_error(error)
            return True
        for frame in found:
            self._on_frame(*frame)
        return True

    def close(self) -> None:
        """Close the socket."""
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self._sock)
            self._stop_writer()
            self._sock.close()
            self._on_lost()
