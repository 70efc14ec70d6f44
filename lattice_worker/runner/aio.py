"""Async invocations: coroutines of many attempts on one event loop, kept apart.

Rule: an attempt ends alone. A step of the loop is charged to the attempt whose context it runs in: shared memory names
that attempt while the step runs, so that the agent knows who took the process down or blocked it. An attempt that goes
on after it was cancelled is abandoned: no step of its context runs any more.
"""

import asyncio
import contextvars
import mmap
import os
import threading
import weakref
from collections.abc import Coroutine
from typing import Any

from lattice_worker.runner import children
from lattice_worker.runner.frames import Channel
from lattice_worker.runner.invocations import Answer, Program
from lattice_worker.runner.output import Output, current
from lattice_worker.runner.reset import Baseline

CANCEL_GRACE_S = 0.5  # The agent waits for twice as long.

Frame = tuple[dict[str, Any], list[bytes]]


def serve(channel: Channel, marks: int) -> None:
    """Run invocations side by side until the agent closes the socket."""
    _mark_steps(memoryview(mmap.mmap(marks, 0)).cast("Q"))
    asyncio.run(_serve(channel))
    os._exit(0)  # Threads of tasks do not keep a process that nothing will be sent to.


async def _serve(channel: Channel) -> None:
    await _Invocations(channel, asyncio.get_running_loop()).serve()


class _Invocations:
    """The invocations on the event loop of this process."""

    def __init__(self, channel: Channel, loop: asyncio.AbstractEventLoop) -> None:
        self._channel = channel
        self._loop = loop
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._running: dict[str, tuple[Output, asyncio.Task[Answer]]] = {}
        self._context = contextvars.copy_context()

    async def serve(self) -> None:
        """Serve the agent."""
        self._loop.set_task_factory(_create_task)  # type: ignore[arg-type]
        self._loop.set_exception_handler(_say)
        children.keep_apart(self._loop, self._context)
        baseline = Baseline()
        program = Program(self._channel, baseline)
        threading.Thread(target=self._read, daemon=True).start()
        self._channel.send({"kind": "ready"})
        while (frame := await self._frames.get()) is not None:
            header, blobs = frame
            match header["kind"]:
                case "adopt":
                    os.environ.update(header["environment"])
                    baseline.capture()
                case "function":
                    program.define(header, blobs)
                case "cancel":
                    self._cancel(header["id"])
                case "invoke":
                    self._start(program, header, blobs)
                case _:
                    pass

    def _read(self) -> None:
        for frame in self._channel.frames():
            self._loop.call_soon_threadsafe(self._frames.put_nowait, frame)
        self._loop.call_soon_threadsafe(self._frames.put_nowait, None)

    def _start(self, program: Program, header: dict[str, Any], blobs: list[bytes]) -> None:
        output = Output(self._channel, header, header["number"])
        context = contextvars.copy_context()
        context.run(current.set, output)
        task = self._loop.create_task(program.run_async(output, blobs), context=context)
        self._running[header["id"]] = output, task
        task.add_done_callback(lambda done: self._finish(output, done), context=self._context)

    def _cancel(self, name: str) -> None:
        found = self._running.get(name)
        if found is not None:
            output, task = found
            task.cancel()
            self._loop.call_later(CANCEL_GRACE_S, self._finish, output, task, context=self._context)

    def _finish(self, output: Output, task: "asyncio.Task[Answer]") -> None:
        """Answer for an invocation that is over, or was cancelled long enough ago, and end what it left behind."""
        name = output.header["id"]
        if self._running.get(name) != (output, task):
            return
        del self._running[name]
        failure = {"kind": "cancelled", "message": "the attempt was cancelled"}
        answer: dict[str, Any] = {"kind": "result", "id": name, "made": [], "duration": 0.0, "failure": failure}
        parts: list[bytes] = []
        if task.done() and not task.cancelled() and task.exception() is None:
            answer, parts = task.result()
        children.end(output)
        output.close()
        self._channel.send(answer | {"has_raw": False}, parts)
        for left in _tasks.pop(output, ()):
            left.cancel()
        if task.done():
            self._loop.call_later(CANCEL_GRACE_S, _abandon, output, context=self._context)
        else:
            _abandon(output)


_tasks: "weakref.WeakKeyDictionary[Output, weakref.WeakSet[asyncio.Task[Any]]]" = weakref.WeakKeyDictionary()


def _create_task(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **settings: Any
) -> "asyncio.Task[Any]":
    """Create a task, and know whose it is."""
    task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **settings)
    context: contextvars.Context | None = settings.get("context")
    output = current.get() if context is None else context.get(current)
    if output is not None:
        _tasks.setdefault(output, weakref.WeakSet()).add(task)
    return task


def _abandon(output: Output) -> None:
    output.is_abandoned = True


def _mark_steps(marks: memoryview) -> None:
    """Have each step of the event loop name the invocation it belongs to, and run none of one that was abandoned."""
    run = asyncio.Handle._run

    is_forked = False

    def note_fork() -> None:
        nonlocal is_forked
        is_forked = True

    os.register_at_fork(after_in_child=note_fork)

    def run_marked(self: asyncio.Handle) -> None:
        output: Output | None = self._context.get(current)  # type: ignore[attr-defined]
        if output is None or is_forked:
            run(self)
        elif not output.is_abandoned:
            marks[0] = output.number
            try:
                run(self)
            except (SystemExit, KeyboardInterrupt):
                pass  # The task that raised it has it as its exception; the loop is not to end of it.
            finally:
                if is_forked:
                    os._exit(0)  # The task came back in both processes. This one would take the other's events.
                marks[0] = 0

    asyncio.Handle._run = run_marked  # type: ignore[method-assign]


def _say(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report an error that no code of the task waits for to whoever it belongs to; abandoned tasks are silent."""
    output = current.get()
    if output is None or not output.is_abandoned:
        loop.default_exception_handler(context)
