"""What an invocation writes while it runs, and the streams that stand in for `sys.stdout` and `sys.stderr`."""

import contextlib
import contextvars
import fcntl
import io
import os
import termios
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from lattice_worker.runner.frames import Channel

FLUSH_BYTES = 8192

current: contextvars.ContextVar["Output | None"] = contextvars.ContextVar("current", default=None)


class Output:
    """What one invocation tells while it runs: text on its standard streams, up to a limit in bytes, and new tasks.

    `header` is the invocation's; `lattice_worker.context` reads from it what the running task may know.
    """

    def __init__(self, channel: Channel, header: dict[str, Any]) -> None:
        self.header = header
        limit = header["log_limit"]
        self._channel = channel
        self._invocation = header["id"]
        self._left = limit
        self._limit = limit
        self._pending: list[tuple[str, str]] = []
        self._pending_bytes = 0

    def write(self, stream: str, text: str) -> None:
        """Take text; it is sent by the line."""
        if self._left < 0:
            return
        self._left -= len(text)
        if self._left < 0:
            self.flush()
            notice = f"[output cut after {self._limit} bytes]\n"
            self._channel.send(self._header([[stream, notice]], truncated=True))
            return
        self._pending.append((stream, text))
        self._pending_bytes += len(text)
        if "\n" in text or self._pending_bytes > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is pending."""
        if self._pending:
            pending, self._pending, self._pending_bytes = self._pending, [], 0
            # One `print` is several writes.
            parts = [[stream, "".join(text for _, text in group)] for stream, group in groupby(pending, itemgetter(0))]
            self._channel.send(self._header(parts, truncated=False))

    def spawn(self, task: dict[str, Any], blobs: Sequence[bytes], made: Sequence[str]) -> None:
        """Have a task added to the run; see `lattice_worker.context`. `made` are the artifacts among its inputs."""
        self._channel.send({"kind": "spawn", "id": self._invocation, "task": task, "made": made}, blobs)

    def _header(self, parts: list[list[str]], *, truncated: bool) -> dict[str, Any]:
        return {"kind": "log", "id": self._invocation, "parts": parts, "truncated": truncated}


class Stream(io.TextIOBase):
    """Stands in for `sys.stdout` and `sys.stderr`: text goes to the invocation that writes it."""

    encoding = "utf-8"

    def __init__(self, name: str, descriptor: int) -> None:
        self._name = name
        self._descriptor = descriptor
        self.buffer = _Bytes(self)

    def write(self, text: str) -> int:
        """Write text; outside an invocation it goes to the process's own stream."""
        output = current.get()
        if output is None:
            os.write(self._descriptor, text.encode(errors="replace"))
        else:
            output.write(self._name, text)
        return len(text)

    def flush(self) -> None:
        """Send what is pending."""
        if (output := current.get()) is not None:
            output.flush()

    def fileno(self) -> int:
        """Return the descriptor of the process's own stream."""
        return self._descriptor

    def writable(self) -> bool:
        """Return True."""
        return True


class _Bytes(io.RawIOBase):
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        self._stream.write(bytes(data).decode(errors="replace"))
        return len(data)

    def writable(self) -> bool:
        return True


def has_unread_output() -> bool:
    """Whether something this process wrote past `sys.stdout` and `sys.stderr` still lies in their pipes."""
    size = bytearray(4)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # the task may have closed it
            fcntl.ioctl(descriptor, termios.FIONREAD, size)
            if any(size):
                return True
    return False
