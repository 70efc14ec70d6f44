"""The frames between the agent and a runner, over a Unix socket that keeps packets apart (SOCK_SEQPACKET).

A frame is a JSON header, with integers of at most 64 bits, and blobs whose lengths the header lists under `blobs`;
payloads name a blob by its index, or a file by its path. A frame travels in packets of at most `PACKET_BYTES`. The
first byte of a packet says whether it is a whole frame, several whole ones, each after its length, or the first, a
middle or the last part of one. The kernel delivers packets whole. Bytes that user code writes to the socket are
therefore a packet of their own: the agent finds them to be wrong, and they cannot hide where the next frame begins.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import orjson

PACKET_BYTES = 128 * 1024
MAX_FRAME_BYTES = 512 * 1024 * 1024
WHOLE, FIRST, MIDDLE, LAST, SEVERAL = b"\1", b"\2", b"\3", b"\4", b"\5"
LENGTH = struct.Struct("<I")
EVERY_SIGNAL = frozenset(range(1, signal.NSIG)) - {signal.SIGKILL, signal.SIGSTOP, 32, 33}  # glibc keeps 32 and 33.


class ProtocolError(Exception):
    """Data that is not a frame."""


def packets_of(header: dict[str, Any], blobs: Sequence[bytes]) -> list[bytes]:
    """Return a frame as packets."""
    header["blobs"] = [len(blob) for blob in blobs]
    encoded = orjson.dumps(header)
    frame = b"".join([LENGTH.pack(len(encoded)), encoded, *blobs])
    step = PACKET_BYTES - 1
    if len(frame) <= step:
        return [WHOLE + frame]
    parts = [frame[start : start + step] for start in range(0, len(frame), step)]
    return [FIRST + parts[0], *(MIDDLE + part for part in parts[1:-1]), LAST + parts[-1]]


def joined(packets: Iterable[bytes]) -> Iterator[bytes]:
    """Yield packets that have the same frames in the same order, with whole frames that follow each other in one."""
    together: list[bytes] = []
    size = 1
    for packet in packets:
        is_whole, added = packet[:1] == WHOLE, LENGTH.size + len(packet) - 1
        if together and not (is_whole and size + added <= PACKET_BYTES):
            yield _several(together)
            together, size = [], 1
        if is_whole:
            together.append(packet)
            size += added
        else:
            yield packet
    if together:
        yield _several(together)


def _several(packets: list[bytes]) -> bytes:
    if len(packets) == 1:
        return packets[0]
    return SEVERAL + b"".join(LENGTH.pack(len(packet) - 1) + packet[1:] for packet in packets)


def parse(frame: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return the header and the blobs of a frame. Raises ProtocolError."""
    try:
        (length,) = LENGTH.unpack_from(frame)
        offset = LENGTH.size + length
        header = orjson.loads(frame[LENGTH.size : offset])
        blobs = []
        for size in header["blobs"]:
            if size < 0:
                raise ProtocolError("a blob has a negative length")
            blobs.append(frame[offset : offset + size])
            offset += size
    except (struct.error, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ProtocolError(f"a frame cannot be read: {type(error).__name__}") from None
    if offset != len(frame):
        raise ProtocolError("a frame is not as long as it says")
    return header, blobs


class FrameTooLargeError(ProtocolError):
    """A frame has more bytes than the receiver takes."""


class Assembler:
    """Puts the packets of one socket together again, for frames of at most `limit_bytes`."""

    def __init__(self, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, packet: bytes) -> Sequence[bytes]:
        """Take a packet; return the frames it completes. Raises ProtocolError."""
        kind = packet[:1]
        if kind in {WHOLE, SEVERAL, FIRST} if self._parts else kind in {MIDDLE, LAST}:
            raise ProtocolError("a packet is not the next part of a frame")
        if kind == WHOLE:
            return (packet[1:],)
        if kind == SEVERAL:
            return _divided(packet)
        if kind not in {FIRST, MIDDLE, LAST}:
            raise ProtocolError("a packet is of no known kind")
        self._parts.append(packet[1:])
        self._size += len(packet) - 1
        if self._size > self._limit_bytes:
            raise FrameTooLargeError(f"a frame has more than {self._limit_bytes} bytes")
        if kind != LAST:
            return ()
        frame, self._parts, self._size = b"".join(self._parts), [], 0
        return (frame,)


def _divided(packet: bytes) -> list[bytes]:
    frames, offset = [], 1
    while offset < len(packet):
        start = offset + LENGTH.size
        offset = start + int.from_bytes(packet[offset:start], "little")
        frames.append(packet[start:offset])
    if offset != len(packet):
        raise ProtocolError("a packet of several frames is not as long as it says")
    return frames


class Channel:
    """The runner's end of the control socket; frames may be sent by any thread, and by signal handlers.

    A process that the task forks has no part in it: its frames would be taken for the runner's own. `listen` has frames
    read while an invocation waits for one.
    """

    listen: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.RLock()
        self._queue: deque[list[bytes]] = deque()
        self._is_sending = False
        self._arrivals: select.epoll | None = None
        self.owner = os.getpid()

    def send(self, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Send one frame."""
        if os.getpid() != self.owner:
            return
        frame = packets_of(header, blobs)
        with self._lock:
            self._queue.append(frame)
            # A signal handler that interrupted a frame of this very thread leaves its own to be sent after it.
            if not self._is_sending:
                self._is_sending = True
                try:
                    while self._queue:
                        self._send_packets(self._queue.popleft())
                finally:
                    self._is_sending = False

    def _send_packets(self, packets: list[bytes]) -> None:
        if len(packets) == 1:
            self._sock.send(packets[0])
            return
        # A handler that raises between two packets would leave half a frame.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, EVERY_SIGNAL)
        try:
            for packet in packets:
                self._sock.send(packet)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def wait_aside(self) -> None:
        """From now on, wait for frames in a thread that runs no invocation.

        A thread that waits in `recv` keeps a socket open whose descriptor a task closes, and the agent would not learn
        of it. One that waits in `epoll_wait` does not.
        """
        self._arrivals = select.epoll()
        self._arrivals.register(self._sock, select.EPOLLIN)

    def _receive(self) -> bytes:
        if self._arrivals is not None:
            self._arrivals.poll()
        return self._sock.recv(PACKET_BYTES)

    def frames(self) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
        """Yield frames until the agent closes the socket."""
        assembler = Assembler()
        with contextlib.suppress(ConnectionResetError):
            while packet := self._receive():
                for frame in assembler.feed(packet):
                    yield parse(frame)
