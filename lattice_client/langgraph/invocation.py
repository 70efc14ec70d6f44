"""Owns the open run of one invocation of a graph. Rule: each call of a node is a task of it.

A call has its answers decoded by the thread or the event loop that made it.
"""

import asyncio
import contextvars
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from langchain_core.runnables.config import var_child_runnable_config

from lattice_client import background
from lattice_client.client import AsyncLatticeClient
from lattice_client.errors import LatticeError, RunError
from lattice_client.graph.definition import TaskDefinition
from lattice_client.langgraph.adding import Addition, Additions
from lattice_client.langgraph.loop import CANCEL_S, Loop
from lattice_client.runs.open_run import AsyncOpenRun
from lattice_client.runs.questions import Question

# Ids have up to 128 characters; a number follows.
MAX_LABEL_CHARACTERS = 100
# The invocation that the calls of nodes belong to.
current: "contextvars.ContextVar[Invocation | None]" = contextvars.ContextVar("lattice_invocation", default=None)


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
    """A call that was started."""

    def __init__(self, loop: Loop, deliver: Deliver, drive: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        self._loop = loop
        self._deliver = deliver
        self._drive = drive
        self._name = name
        self._task: asyncio.Task[None] | None = None
        self._is_cancelled = False

    def begin(self) -> None:
        """Begin, in the thread of the loop."""
        if self._is_cancelled:
            self._deliver(Ended(error=asyncio.CancelledError(f"the call of {self._name!r} was cancelled")))
        else:
            self._task = background.start(self._drive(), lambda error: self._deliver(Ended(error=error)))

    def cancel(self) -> None:
        """End its attempt; the call then ends within CANCEL_S."""
        self._loop.call(self._cancel)

    def _cancel(self) -> None:
        self._is_cancelled = True
        if self._task is not None:
            # After its first step, without which it would end and deliver nothing.
            asyncio.get_running_loop().call_soon(self._task.cancel)


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
        self._taken: set[str] = set()
        self._is_cancelled = False
        self._starting: deque[Started] = deque()
        self._additions = Additions(self._opened)

    def start(
        self,
        definition: TaskDefinition[..., Any],
        name: str,
        label: str,
        message: bytes,
        deliver: Deliver,
        *,
        is_async: bool = False,
    ) -> Started:
        """Start a call, from any thread. `label` is the id that its task gets, with a number if it is taken.

        With `is_async` the caller is a coroutine, and the call starts when all ready coroutines have run.
        """
        drive = partial(self._drive, definition, name, label, message, deliver)
        started = Started(self._loop, deliver, drive, name)
        self._loop.started()
        self._starting.append(started)
        if is_async:
            # LangGraph makes the coroutines of a superstep ready together, so that one message adds them.
            asyncio.get_running_loop().call_soon(self._loop.call, self._begin)
        else:
            self._loop.call(self._begin)
        return started

    def _begin(self) -> None:
        while self._starting:
            self._starting.popleft().begin()

    async def _drive(
        self, definition: TaskDefinition[..., Any], name: str, label: str, message: bytes, deliver: Deliver
    ) -> None:
        task_id = self._new_id(label)
        self._routes[task_id] = deliver
        addition = Addition(definition, name, task_id, message)
        self._additions.add(addition)
        try:
            task = await asyncio.shield(addition.added)
            run = await self._opened()
            deliver(Ended(await run.output(task)))
        except asyncio.CancelledError:
            self._is_cancelled = True
            if not self._additions.withdraw(addition):
                await self._end_cancelled(addition)
            channel = self._client.api.channel
            cancelled = RunError(self.run_id, f"the call of {name!r} was cancelled")
            deliver(Ended(error=channel.closed_error() if channel.is_closed else cancelled))
        except BaseException as error:
            deliver(Ended(error=error))
        finally:
            self._routes.pop(task_id, None)

    def _new_id(self, label: str) -> str:
        """Return the id of a task, of a length and with characters that ids may have: the label, numbered if taken."""
        label = " ".join(label.splitlines())[:MAX_LABEL_CHARACTERS]
        numbers = self._numbers.setdefault(label, itertools.count(1))
        # The name of another node may end like a number.
        while (found := label if (number := next(numbers)) == 1 else f"{label}-{number}") in self._taken:
            pass
        self._taken.add(found)
        return found

    async def _end_cancelled(self, addition: Addition) -> None:
        try:
            async with asyncio.timeout(CANCEL_S):
                await asyncio.shield(addition.added)  # a task that the server does not have yet cannot be cancelled
                run = await self._opened()
                await run.cancel_task(addition.task_id)
                await run.output(addition.task_id)
        except (LatticeError, TimeoutError):
            pass  # it has ended, or ends with the run

    async def _opened(self) -> AsyncOpenRun:
        if self._opening is None:
            # A connection lasts longer than an invocation, and keeps the context in which it was made.
            context = contextvars.copy_context()
            for variable in (current, var_child_runnable_config):
                context.run(variable.set, None)
            self._opening = background.share(self._open(), context)
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

    @property
    def must_not_wait(self) -> bool:
        """Whether this thread must not wait for the run: the collector may end a forgotten generator in any thread."""
        return self._loop.is_here

    def end(self) -> "Future[Any]":
        """End the run, from any thread; the future is done when it has ended, or when the client is closed."""
        if self._client.api.channel.is_closed:
            # The loop of the run has ended or is about to; the server ends the run of a caller that left.
            done: Future[Any] = Future()
            done.set_result(None)
            return done
        return self._loop.submit(self.close())


def _set(answer: "asyncio.Future[bytes]", data: bytes | BaseException) -> None:
    if answer.done():
        return
    if isinstance(data, BaseException):
        answer.set_exception(data)
    else:
        answer.set_result(data)
