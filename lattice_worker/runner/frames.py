"""The frames between the agent and a runner.

A frame, both ways: little-endian u32 length of the header, the JSON header, then the blobs whose lengths the header
lists under `blobs`. Payloads name a blob by index or a file by path.
"""

import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any


class Channel:
    """The control socket; frames go out whole, from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Send one frame."""
        header["blobs"] = [len(blob) for blob in blobs]
        encoded = json.dumps(header).encode()
        with self._lock:
            self._sock.sendall(b"".join([struct.pack("<I", len(encoded)), encoded, *blobs]))

    def frames(self) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
        """Yield frames until the other side hangs up."""
        stream = self._sock.makefile("rb", buffering=1 << 16)
        while prefix := stream.read(4):
            header = json.loads(stream.read(struct.unpack("<I", prefix)[0]))
            yield header, [stream.read(size) for size in header["blobs"]]
