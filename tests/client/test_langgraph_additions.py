"""The messages by which the calls of nodes are added to a run, and the thread that sends them."""

import asyncio
import contextvars
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from lattice_client import TaskDefinitionError, task
from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.workflow import Graph
from lattice_client.langgraph.adding import Addition, Additions
from lattice_client.langgraph.invocation import Asked, Ended, Started
from lattice_client.langgraph.loop import Loop
from lattice_client.runs.open_run import AsyncOpenRun
from lattice_client.transport.async_bidi import AsyncSteps


@task
def node(message: Any) -> Any:
    return message


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(test())


class Run:
    """Notes the messages that would be sent."""

    def __init__(self) -> None:
        self.tasks: Graph[None] = Graph(None)
        self.messages: list[list[str]] = []

    async def add_tasks(self, tasks: list[LatticeTask]) -> None:
        if any(found.task_id == "bad" for found in tasks):
            raise TaskDefinitionError("the code of 'bad' cannot be pickled")
        self.messages.append([found.task_id for found in tasks])


class Opening:
    """A run that is opened when `may_open` is set."""

    def __init__(self) -> None:
        self.run = Run()
        self.may_open = asyncio.Event()
        self.count = 0

    async def __call__(self) -> AsyncOpenRun:
        self.count += 1
        await self.may_open.wait()
        return cast(AsyncOpenRun, self.run)


def addition(task_id: str) -> Addition:
    return Addition(node, "node", task_id, b"")


@in_loop
async def test_calls_that_come_together_are_one_message() -> None:
    opening = Opening()
    additions, calls = Additions(opening), [addition(name) for name in "abcd"]
    for call in calls[:3]:
        additions.add(call)
    await asyncio.sleep(0)
    additions.add(calls[3])  # while the run is opened
    opening.may_open.set()
    added = await asyncio.gather(*(call.added for call in calls))
    assert opening.run.messages == [["a", "b", "c", "d"]]
    assert [found.task_id for found in added] == ["a", "b", "c", "d"]


@in_loop
async def test_a_call_that_cannot_be_added_concerns_no_other() -> None:
    opening = Opening()
    opening.may_open.set()
    additions, calls = Additions(opening), [addition(name) for name in ("a", "bad", "c")]
    for call in calls:
        additions.add(call)
    first, bad, last = await asyncio.gather(*(call.added for call in calls), return_exceptions=True)
    assert isinstance(bad, TaskDefinitionError)
    assert opening.run.messages == [["a"], ["c"]]
    assert isinstance(first, LatticeTask)
    assert isinstance(last, LatticeTask)


@in_loop
async def test_a_withdrawn_call_is_not_added_and_opens_no_run() -> None:
    opening = Opening()
    additions, call = Additions(opening), addition("a")
    additions.add(call)
    assert additions.withdraw(call)
    await asyncio.sleep(0)
    assert opening.count == 0
    assert not additions.withdraw(call)


@in_loop
async def test_all_calls_fail_when_the_run_cannot_be_opened() -> None:
    async def refuses() -> AsyncOpenRun:
        raise ConnectionError("no server")

    additions, calls = Additions(refuses), [addition("a"), addition("b")]
    for call in calls:
        additions.add(call)
    found = await asyncio.gather(*(call.added for call in calls), return_exceptions=True)
    assert [str(error) for error in found] == ["no server", "no server"]


def test_a_call_that_is_cancelled_at_once_ends() -> None:
    loop = Loop()
    ended: list[Asked | Ended] = []
    began: list[bool] = []

    async def drive() -> None:
        began.append(True)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(Ended())

    async def settled() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    try:
        before = Started(loop, ended.append, drive, "node")
        loop.started()
        before.cancel()  # before it began
        loop.call(before.begin)
        after = Started(loop, ended.append, drive, "node")
        loop.call(lambda: (loop.call(after.begin), after.cancel()))  # before its first step
        loop.submit(settled()).result(10)
        loop.submit(settled()).result(10)
        first, second = ended
        assert isinstance(first, Ended)
        assert isinstance(first.error, asyncio.CancelledError)
        assert isinstance(second, Ended)
        assert began == [True]
    finally:
        loop.stop()


@in_loop
async def test_ended_steps_keep_no_context() -> None:
    class Held:
        pass

    variable: contextvars.ContextVar[Held] = contextvars.ContextVar("held")

    async def last() -> bool:
        return False

    async def start() -> tuple[AsyncSteps, weakref.ref[Held]]:
        held = Held()
        variable.set(held)
        return AsyncSteps(last), weakref.ref(held)

    steps, held = await asyncio.create_task(start())
    await steps.until(lambda: False)
    gc.collect()
    assert held() is None


@in_loop
async def test_every_waiting_caller_gets_the_error_of_a_step() -> None:
    async def fails() -> bool:
        raise ConnectionError("lost")

    steps = AsyncSteps(fails)
    for _ in range(2):
        with pytest.raises(ConnectionError, match="lost"):
            await steps.until(lambda: False)


@in_loop
async def test_calls_end_when_the_message_that_adds_them_is_cancelled() -> None:
    class Cancelled(Run):
        async def add_tasks(self, tasks: list[LatticeTask]) -> None:
            raise asyncio.CancelledError

    opening = Opening()
    opening.run = Cancelled()
    opening.may_open.set()
    additions, calls = Additions(opening), [addition(name) for name in "ab"]
    for call in calls:
        additions.add(call)
    for call in calls:
        async with asyncio.timeout(20):
            with pytest.raises(asyncio.CancelledError):
                await call.added


@in_loop
async def test_caller_gets_the_error_when_the_driving_of_its_call_fails() -> None:
    async def fail() -> None:
        raise ValueError("a bug")

    delivered: asyncio.Queue[Asked | Ended] = asyncio.Queue()
    Started(cast(Loop, None), delivered.put_nowait, fail, "node").begin()
    async with asyncio.timeout(20):
        ended = await delivered.get()
    assert isinstance(ended, Ended)
    assert str(ended.error) == "a bug"
