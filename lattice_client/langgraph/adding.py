"""Owns adding the calls of nodes to the run of an invocation.

Rule: calls that come together are one message. LangGraph starts the nodes of a superstep together, so that the server
gets and commits a superstep at once.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from lattice_client import background
from lattice_client.graph.definition import TaskDefinition
from lattice_client.graph.nodes import LatticeTask
from lattice_client.runs.open_run import AsyncOpenRun


class Addition:
    """A call that becomes a task of the run. `added` is done when the server has it, or has refused it."""

    def __init__(self, definition: TaskDefinition[..., Any], name: str, task_id: str, message: bytes) -> None:
        self.definition = definition
        self.name = name
        self.task_id = task_id
        self.message = message
        self.added: asyncio.Future[LatticeTask] = asyncio.get_running_loop().create_future()


class Additions:
    """The calls that are to be added to a run, which `opened` returns."""

    def __init__(self, opened: Callable[[], Awaitable[AsyncOpenRun]]) -> None:
        self._opened = opened
        self._waiting: list[Addition] = []
        self._sending: set[asyncio.Task[None]] = set()

    def add(self, addition: Addition) -> None:
        """Add a call with the next message."""
        self._waiting.append(addition)
        if len(self._waiting) == 1:
            taken: list[Addition] = []
            task = background.start(self._send(taken), partial(_fail, taken))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    def withdraw(self, addition: Addition) -> bool:
        """Do not add a call; return False when it is too late."""
        if addition not in self._waiting:
            return False
        self._waiting.remove(addition)
        addition.added.cancel()
        return True

    async def _send(self, additions: list[Addition]) -> None:
        if not self._waiting:  # all were withdrawn, and no run is needed
            return
        try:
            run = await self._opened()
        except BaseException as error:
            additions[:], self._waiting = self._waiting, []
            _fail(additions, error)
            return
        additions[:], self._waiting = self._waiting, []
        try:
            await _added(run, additions)
        except Exception:
            # The fault of one call, such as code that cannot be pickled, concerns no other.
            for addition in additions:
                try:
                    await _added(run, [addition])
                except BaseException as error:
                    addition.added.set_exception(error)


def _fail(additions: list[Addition], error: BaseException) -> None:
    for addition in additions:
        if not addition.added.done():
            addition.added.set_exception(error)


async def _added(run: AsyncOpenRun, additions: list[Addition]) -> None:
    tasks: list[LatticeTask] = []
    try:
        for addition in additions:
            inputs = {"message": addition.message}
            tasks.append(run.tasks.add_task(addition.definition, inputs, addition.name, task_id=addition.task_id))
        if tasks:
            await run.add_tasks(tasks)
    except BaseException:
        for task in tasks:
            run.tasks.tasks.pop(task.task_id, None)
        raise
    for addition, task in zip(additions, tasks, strict=True):
        addition.added.set_result(task)
