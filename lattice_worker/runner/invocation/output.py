"""The output of an invocation, and the streams that stand in for `sys.stdout` and `sys.stderr`."""

import contextlib
import contextvars
import fcntl
import io
import logging
import os
import sys
import termios
import threading
import time
from collections.abc import Sequence
from typing import Any

from lattice_worker.runner.encoding.text import utf8
from lattice_worker.runner.frames import Channel
from lattice_worker.runner.invocation.asking import Questions
from lattice_worker.runner.invocation.chunks import Chunks

FLUSH_BYTES = 8192

current: contextvars.ContextVar["Output | None"] = contextvars.ContextVar("current", default=None)


# The kinds of frames that a running invocation takes.
TO_RUNNING = frozenset({"answer", "credit"})


class Output:
    """The frames of one invocation while it runs: text of its standard streams, up to a limit, new tasks, chunks.

    `header` is the invocation's; `lattice_worker.context` reads it for the running task. `number` is the number of the
    invocation in its process.
    """

    def __init__(self, channel: Channel, header: dict[str, Any], number: int = 0) -> None:
        self.header = header
        self.number = number
        self.is_abandoned = self.is_cancelled = False
        self.logger: logging.Logger | None = None
        self.started_s = time.time()
        limit = header["log_limit"]
        self._channel = channel
        self._invocation = header["id"]
        self._left = limit
        self._limit = limit
        self._is_open = True
        self._lock = threading.RLock()  # A signal handler may print while its thread does.
        self._pending: list[list[str]] = []  # A stream and its text; neighbours are of different streams.
        self._pending_bytes = 0
        self.questions = Questions(channel, header["id"])
        # See `lattice_worker.runner.invocation.tracing`.
        self.spans: list[dict[str, Any]] = []
        self.spans_dropped = self.span_bytes = 0
        self.chunks = Chunks(channel, header)

    def write(self, stream: str, text: str) -> None:
        """Take text; it is sent by the line. Text after the limit, or after the end, is dropped."""
        text = utf8(text)
        with self._lock:
            if self._left < 0 or not self._is_open:
                return
            size = len(text)
            taken = text if size <= self._left else text[: self._left]
            # One `print` is several writes.
            if self._pending and self._pending[-1][0] == stream:
                self._pending[-1][1] += taken
            else:
                self._pending.append([stream, taken])
            self._pending_bytes += size
            self._left -= size
            if self._left < 0:
                self.flush()
                notice = f"[output cut after {self._limit} bytes]\n"
                self._channel.send(self._header([[stream, notice]], truncated=True))
            elif "\n" in text or self._pending_bytes > FLUSH_BYTES:
                self.flush()

    def flush(self) -> None:
        """Send pending text."""
        with self._lock:
            if self._pending:
                pending, self._pending, self._pending_bytes = self._pending, [], 0
                self._channel.send(self._header(pending, truncated=False))

    def close(self) -> None:
        """Send pending text; a thread that outlives the invocation can neither write nor ask."""
        self.flush()
        if self._is_open and (self.spans or self.spans_dropped):
            spans, self.spans = self.spans, []
            frame = {"kind": "spans", "id": self._invocation, "spans": spans, "dropped": self.spans_dropped}
            self._channel.send(frame)
        self._is_open, self.is_cancelled = False, True
        self.questions.close()
        self.chunks.close()

    def take(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Take a frame of the agent to the running invocation. Called by a thread that runs none of its code."""
        if header["kind"] == "answer":
            self.questions.take(header, blobs)
        else:
            self.chunks.take(header)

    def spawn(self, task: dict[str, Any], blobs: Sequence[bytes], made: Sequence[str]) -> None:
        """Have a task added to the run; see `lattice_worker.context`. `made` are the artifacts among its inputs."""
        self._channel.send({"kind": "spawn", "id": self._invocation, "task": task, "made": made}, blobs)

    def _header(self, parts: list[list[str]], *, truncated: bool) -> dict[str, Any]:
        return {"kind": "log", "id": self._invocation, "parts": parts, "truncated": truncated}


class Stream(io.TextIOBase):
    """Stands in for `sys.stdout` and `sys.stderr`: text goes to the invocation that writes it.

    Outside an invocation, and in a process that a task forked, it goes to the process's own stream.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, name: str, descriptor: int, owner: int) -> None:
        self.name = f"<{name}>"
        self._stream = name
        self._descriptor = descriptor
        self._owner = owner
        self.buffer = _Bytes(self)

    def _output(self) -> Output | None:
        return current.get() if os.getpid() == self._owner else None

    def write(self, text: str) -> int:
        """Write text."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        output = self._output()
        if output is not None:
            output.write(self._stream, text)
        else:
            data = utf8(text).encode()
            while data:
                data = data[os.write(self._descriptor, data) :]
        return len(text)

    def flush(self) -> None:
        """Send pending text."""
        if (output := self._output()) is not None:
            output.flush()

    def reconfigure(self, **_: Any) -> None:
        """Accept settings, as scripts give them to their streams, and ignore them."""

    def fileno(self) -> int:
        """Return the descriptor of the process's own stream."""
        return self._descriptor

    def writable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Send pending text; the stream stays open for the next task."""
        self.flush()


class _Bytes(io.RawIOBase):
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        view = bytes(data)
        self._stream.write(view.decode(errors="replace"))
        return len(view)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Send pending text. A wrapper that a task made closes this when it is freed; the next task needs it open."""
        self.flush()


def flush_streams() -> None:
    """Flush streams with which a task, or a module of it, replaced `sys.stdout` and `sys.stderr`."""
    for stream in (sys.stdout, sys.stderr):
        if type(stream) is not Stream:
            with contextlib.suppress(BaseException):
                stream.flush()


def has_unread_output() -> bool:
    """Whether something this process wrote past `sys.stdout` and `sys.stderr` still lies in their pipes."""
    size = bytearray(4)
    for descriptor in (1, 2):
        try:
            fcntl.ioctl(descriptor, termios.FIONREAD, size)
        except OSError:  # The task closed it.
            continue
        if any(size):
            return True
    return False
