"""Async invocations: coroutines of many attempts on one event loop, kept apart.

Rule: an attempt ends alone. A step of the loop is charged to the attempt whose context it runs in: shared memory names
that attempt while the step runs, so that the agent knows which attempt killed or blocked the process. An attempt that
still runs after it was cancelled is abandoned: no step of its context runs any more.
"""

import asyncio
import contextvars
import ctypes
import fcntl
import mmap
import os
import termios
import threading
import traceback
from typing import Any

from lattice_worker.runner.coroutines import children, signals, starting
from lattice_worker.runner.coroutines.attempt import Attempt
from lattice_worker.runner.coroutines.eventloop import Loop, show_own_tasks
from lattice_worker.runner.coroutines.shared import Shared
from lattice_worker.runner.coroutines.steps import ALONE, mark_steps
from lattice_worker.runner.frames import Channel
from lattice_worker.runner.invocation.invocations import Program
from lattice_worker.runner.invocation.outcome import Answer
from lattice_worker.runner.invocation.output import TO_RUNNING, current, has_unread_output
from lattice_worker.runner.surroundings.adoption import adopt
from lattice_worker.runner.surroundings.process_tree import ANY_CHILD, end_children

CANCEL_GRACE_S = 0.5  # The agent waits for twice as long.

NONE = [bytes(4), bytes(4)]
_libc = ctypes.CDLL(None)

Frame = tuple[dict[str, Any], list[bytes]]


def serve(channel: Channel, marks: int) -> None:
    """Run invocations side by side until the agent closes the socket."""
    loop = Loop()
    asyncio.set_event_loop(loop)
    shared = memoryview(mmap.mmap(marks, 0)).cast("Q")
    mark_steps(shared, loop)
    show_own_tasks(loop)
    _Invocations(channel, loop, shared).start()
    loop.run()


class _Invocations:
    """The invocations on the event loop of this process. None of its own code is a task of the loop."""

    def __init__(self, channel: Channel, loop: Loop, marks: memoryview) -> None:
        self._channel = channel
        self._loop = loop
        self._running: dict[str, Attempt] = {}
        self._context = contextvars.copy_context()
        self._shared = Shared(self._running)
        self._program = Program(channel, self._shared)
        self._marks = marks
        self._unread = 0  # How often the agent still has to read output past `sys.stdout`.
        self._sizes = [bytearray(4), bytearray(4)]
        self._held: list[Frame] = []  # Frames that arrived meanwhile.

    def start(self) -> None:
        """Serve the agent from the next iteration of the loop on."""
        signals.keep_apart(self._loop)
        starting.track_children()
        threading.Thread(target=self._read, daemon=True).start()
        self._channel.send({"kind": "ready"})

    def _read(self) -> None:
        for frame in self._channel.frames():
            if frame[0]["kind"] not in TO_RUNNING:
                self._loop.call_soon_threadsafe(self._take, frame)
            elif (attempt := self._running.get(frame[0]["id"])) is not None:
                # Here: the event loop may be waiting for this in a step that blocks.
                attempt.take(*frame)
        # Threads of tasks must not keep the process alive when the agent has closed the socket.
        self._loop.call_soon_threadsafe(os._exit, 0)

    def _take(self, frame: Frame) -> None:
        kind = frame[0]["kind"]
        try:
            if kind == "drained":
                self._drained()
            elif self._unread:
                self._held.append(frame)
            elif kind == "invoke" and self._is_to_be_read():
                self._unread += 1
                self._held.append(frame)
                self._channel.send({"kind": "written"})
            else:
                self._handle(frame)
        except BaseException:
            # Without this the invocation would never be answered. It ends with its process.
            traceback.print_exc()
            os._exit(1)

    def _handle(self, frame: Frame) -> None:
        header, blobs = frame
        match header["kind"]:
            case "adopt":
                adopt(header)
                self._shared.capture()
            case "function":
                self._program.define(header, blobs)
            case "forget":
                self._program.forget(header["digests"])
            case "cancel":
                self._cancel(header["id"])
            case "invoke":
                self._start(header, blobs)
            case _:
                pass

    def _is_to_be_read(self) -> bool:
        """Whether there is output past `sys.stdout` that could be taken for output of the invocation that starts."""
        if len(self._running) != 1:
            return False
        _libc.fflush(None)
        return self._has_unread_output()

    def _has_unread_output(self) -> bool:
        try:
            fcntl.ioctl(1, termios.FIONREAD, self._sizes[0])
            fcntl.ioctl(2, termios.FIONREAD, self._sizes[1])
        except OSError:  # A coroutine closed it, or put something else in its place.
            self._shared.is_changed = True
            return has_unread_output()
        return self._sizes != NONE

    def _drained(self) -> None:
        """Continue: the agent has read the output past `sys.stdout`."""
        self._unread -= 1
        if not self._unread:
            self._note_alone()
            held, self._held = self._held, []
            for frame in held:
                self._handle(frame)

    def _note_alone(self) -> None:
        """Mark the only running invocation: it writes all output from now on. With several none is marked."""
        alone = next(iter(self._running.values())).number if len(self._running) == 1 else 0
        if self._marks[ALONE] != alone:
            self._marks[ALONE] = alone

    def _start(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        attempt = Attempt(self._channel, header)
        self._running[header["id"]] = attempt
        self._note_alone()
        self._loop.attempts.add(attempt)
        context = contextvars.copy_context()
        context.run(current.set, attempt)
        main = self._loop.create_task(self._program.run_async(attempt, blobs), context=context)
        main.add_done_callback(lambda _: self._finish(attempt), context=self._context)

    def _cancel(self, name: str) -> None:
        attempt = self._running.get(name)
        if attempt is not None and attempt.main is not None:
            attempt.is_cancelled = True
            attempt.main.cancel()
            self._loop.call_later(CANCEL_GRACE_S, self._finish, attempt, context=self._context)

    def _finish(self, attempt: Attempt) -> None:
        """Answer an invocation that has ended, or was cancelled long enough ago, and end its tasks and children."""
        name, main = attempt.header["id"], attempt.main
        if self._running.get(name) is not attempt or main is None:
            return
        del self._running[name]
        answer, parts = _answer(name, main)
        if main.done():
            attempt.main = None  # It holds the answer, which may be large.
        self._end(attempt)
        if not self._running and _libc.waitid(*ANY_CHILD) == 0:
            end_children()
        attempt.close()
        _libc.fflush(None)
        has_raw = self._has_unread_output()
        if has_raw:
            # New invocations start when the agent has read it; running ones continue.
            self._unread += 1
        elif not self._unread:
            self._note_alone()
        self._channel.send(answer | {"has_raw": has_raw}, parts)
        for left in attempt.tasks():
            left.cancel()
        if main.done():
            self._loop.call_later(CANCEL_GRACE_S, self._abandon, attempt, context=self._context)
        else:
            self._abandon(attempt)
        if not self._running and (reason := self._shared.put_back()):
            self._channel.send({"kind": "retired", "reason": reason})
            os._exit(0)

    def _end(self, attempt: Attempt) -> None:
        signals.end(attempt, self._loop)
        children.end(attempt)
        self._shared.end(attempt)

    def _abandon(self, attempt: Attempt) -> None:
        attempt.abandon()
        self._end(attempt)  # Code that ran after the answer may have started children too.
        self._loop.attempts.discard(attempt)


def _answer(name: str, main: "asyncio.Task[Answer]") -> Answer:
    if main.done() and not main.cancelled() and main.exception() is None:
        return main.result()
    failure = {"kind": "cancelled", "message": "the attempt was cancelled"}
    return {"kind": "result", "id": name, "made": [], "duration": 0.0, "failure": failure}, []
