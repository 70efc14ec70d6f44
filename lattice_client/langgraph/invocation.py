"""Owns the open run of one invocation of a graph, and the thread whose event loop holds the streams of such runs.

Rule: that thread runs no code of the user's; a call has its answers decoded by the thread or the loop that made it.
"""

import asyncio
import atexit
import contextvars
import itertools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from lattice_client.client import AsyncLatticeClient
from lattice_client.errors import LatticeError, RunError
from lattice_client.graph.definition import TaskDefinition
from lattice_client.runs.open_run import AsyncOpenRun
from lattice_client.runs.questions import Question

# How long a cancelled call waits for the end of its attempt; the server kills the process in that time.
CANCEL_S = 2.0
# The invocation that the calls of nodes belong to.
current: "contextvars.ContextVar[Invocation | None]" = contextvars.ContextVar("lattice_invocation", default=None)


class Loop:
    """An event loop in a thread of its own, which starts with the first coroutine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """Start a coroutine; return the future of its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.started())

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the thread; nothing once it has ended."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def started(self) -> asyncio.AbstractEventLoop:
        """Return the loop, which runs."""
        with self._lock:
            if self._loop is None or self._loop.is_closed():
                self._loop = asyncio.new_event_loop()
                # A daemon, so that a program with an unfinished graph can end; `stop` is called at the exit.
                self._thread = threading.Thread(target=_run, args=(self._loop,), name="lattice-langgraph", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
            return self._loop

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None and not loop.is_closed():
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(CANCEL_S)
        atexit.unregister(self.stop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))  # The cancelled tasks run once more.
    finally:
        loop.close()


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of a call's attempt, and the function that answers it with bytes or an exception."""

    attempt: int
    data: bytes
    reply: Callable[[bytes | BaseException], None]


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a call: its result, or its error."""

    result: bytes = b""
    error: BaseException | None = None


Deliver = Callable[[Asked | Ended], None]


class Started:
    """A call that was started. `cancel` ends its attempt; the call then ends within CANCEL_S."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel


class Invocation:
    """One open run, opened by the first call. Each call of a node is a task of it."""

    def __init__(
        self, client: AsyncLatticeClient, loop: Loop, name: str, *, cancel_on_disconnect: bool | float = False
    ) -> None:
        self.run_id = ""
        self._client = client
        self._loop = loop
        self._name = name
        self._cancel_on_disconnect = cancel_on_disconnect
        self._opening: asyncio.Task[AsyncOpenRun] | None = None
        self._routes: dict[str, Deliver] = {}
        self._numbers: dict[str, itertools.count[int]] = {}
        self._is_cancelled = False

    def start(
        self, definition: TaskDefinition[..., Any], name: str, label: str, message: bytes, deliver: Deliver
    ) -> Started:
        """Start a call, from any thread. `label` is the id that its task gets, with a number if it is taken."""
        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            tasks.append(asyncio.create_task(self._drive(definition, name, label, message, deliver)))

        def cancel_first() -> None:
            tasks[0].cancel()  # in the thread in which `begin` ran before

        def cancel() -> None:
            self._is_cancelled = True
            self._loop.call(cancel_first)

        self._loop.started().call_soon_threadsafe(begin)
        return Started(cancel)

    async def _drive(
        self, definition: TaskDefinition[..., Any], name: str, label: str, message: bytes, deliver: Deliver
    ) -> None:
        number = next(self._numbers.setdefault(label, itertools.count(1)))
        task_id = label if number == 1 else f"{label}-{number}"
        self._routes[task_id] = deliver
        run: AsyncOpenRun | None = None
        try:
            run = await self._opened()
            task = await run.add(definition, {"message": message}, name, task_id=task_id)
            deliver(Ended(await run.output(task)))
        except asyncio.CancelledError:
            await self._end_cancelled(run, task_id)
            deliver(Ended(error=RunError(self.run_id, f"the call of {name!r} was cancelled")))
        except BaseException as error:
            deliver(Ended(error=error))
        finally:
            self._routes.pop(task_id, None)

    async def _end_cancelled(self, run: AsyncOpenRun | None, task_id: str) -> None:
        if run is None:
            return
        try:
            async with asyncio.timeout(CANCEL_S):
                await run.cancel_task(task_id)
                await run.output(task_id)
        except (LatticeError, TimeoutError):
            pass  # it has ended, or ends with the run

    async def _opened(self) -> AsyncOpenRun:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> AsyncOpenRun:
        tie = self._cancel_on_disconnect
        run = await self._client.open_run(self._name, on_question=self._ask, cancel_on_disconnect=tie)
        self.run_id = str(run)
        return run

    async def _ask(self, question: Question) -> bytes:
        deliver = self._routes.get(question.task_id)
        if deliver is None:
            raise RuntimeError("the call of this node is over")
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        deliver(Asked(question.attempt, question.payload, lambda data: self._loop.call(_set, answer, data)))
        return await answer

    async def close(self) -> None:
        """End the run: close it, or cancel it when a call of it was cancelled."""
        if self._opening is None:
            return
        try:
            run = await self._opening
            if self._is_cancelled or self._routes:
                await run.cancel("the invocation of the graph was cancelled")
            await run.close()
        except LatticeError:
            pass  # the calls of the run have raised it, or it concerns nothing that anyone waits for

    def end(self) -> "Future[Any]":
        """End the run, from any thread; the future is done when it has ended."""
        return self._loop.submit(self.close())


def _set(answer: "asyncio.Future[bytes]", data: bytes | BaseException) -> None:
    if answer.done():
        return
    if isinstance(data, BaseException):
        answer.set_exception(data)
    else:
        answer.set_result(data)
