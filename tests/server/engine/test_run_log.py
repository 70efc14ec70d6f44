"""A run's log: many readers, each at its own place."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lattice_server.core.errors import RangeError
from lattice_server.core.messages import RunFinished, RunStarted, TaskCancelled, TaskLogged
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.states import RunState
from lattice_server.engine.runs.log import RunLog

CANCELLED = Failure(FailureKind.CANCELLED, "")
FINISHED = RunFinished(RunState.SUCCEEDED, None)
TIMEOUT_S = 60.0


def play(scenario: Callable[[RunLog], Coroutine[Any, Any, None]]) -> None:
    """Play a scenario with a fresh log."""

    async def run() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario(RunLog())

    asyncio.run(run())


def write(log: RunLog, count: int) -> None:
    for number in range(count):
        log.append(RunStarted("w", number), float(number))


async def read(log: RunLog, after: int = 0) -> list[int]:
    return [event.sequence async for batch in log.follow(after) for event in batch]


def test_events_are_numbered_densely_from_one() -> None:
    async def scenario(log: RunLog) -> None:
        write(log, 3)
        log.append(FINISHED, 3.0)
        assert await read(log) == [1, 2, 3, 4]
        assert [event.time_s for event in log.events] == [0.0, 1.0, 2.0, 3.0]

    play(scenario)


@pytest.mark.parametrize("after", [0, 1, 511, 512, 513, 1999, 2000])
def test_a_reader_may_begin_anywhere(after: int) -> None:
    async def scenario(log: RunLog) -> None:
        write(log, 1999)
        log.append(FINISHED, 0.0)
        assert await read(log, after) == list(range(after + 1, 2001))

    play(scenario)


def test_a_reader_ahead_of_the_log_is_refused_with_the_newest_number() -> None:
    async def scenario(log: RunLog) -> None:
        write(log, 2)
        with pytest.raises(RangeError) as caught:
            await read(log, 3)
        assert caught.value.reason == "CURSOR_AHEAD"
        assert caught.value.metadata == {"oldest_sequence": "1", "last_sequence": "2"}

    play(scenario)


def test_every_reader_sees_everything_whenever_it_comes() -> None:
    async def scenario(log: RunLog) -> None:
        readers = []
        for _ in range(50):
            readers += [asyncio.create_task(read(log)), asyncio.create_task(read(log, len(log.events)))]
            write(log, 3)
            await asyncio.sleep(0)
        log.append(FINISHED, 0.0)
        seen = await asyncio.gather(*readers)
        assert all(numbers == list(range(numbers[0], 152)) for numbers in seen)
        assert [numbers[0] for numbers in seen[::2]] == [1] * 50
        assert [numbers[0] for numbers in seen[1::2]] == [3 * number + 1 for number in range(50)]

    play(scenario)


def test_a_reader_that_leaves_is_nobodys_business() -> None:
    async def scenario(log: RunLog) -> None:
        leaving, staying = asyncio.create_task(read(log)), asyncio.create_task(read(log))
        write(log, 1)
        await asyncio.sleep(0)
        leaving.cancel()
        write(log, 1)
        log.append(FINISHED, 0.0)
        assert await staying == [1, 2, 3]
        with pytest.raises(asyncio.CancelledError):
            await leaving

    play(scenario)


def test_nothing_is_kept_of_readers_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(log: RunLog) -> None:
        loop = asyncio.get_running_loop()
        made: weakref.WeakSet[asyncio.Future[None]] = weakref.WeakSet()
        create = loop.create_future

        def watched() -> asyncio.Future[None]:
            future = create()
            made.add(future)
            return future

        monkeypatch.setattr(loop, "create_future", watched)
        for _ in range(10):
            leaving = asyncio.create_task(read(log))
            await asyncio.sleep(0)
            assert made
            leaving.cancel()
            while not leaving.done():
                await asyncio.sleep(0)
        del leaving
        gc.collect()
        assert not made

    play(scenario)


def test_a_slow_reader_delays_no_other_reader() -> None:
    async def scenario(log: RunLog) -> None:
        write(log, 1)
        slow = log.follow(0)
        first = [event.sequence for event in await anext(slow)]
        write(log, 5000)
        log.append(FINISHED, 0.0)
        assert await read(log) == list(range(1, 5003))
        rest = [event.sequence async for batch in slow for event in batch]
        assert first + rest == list(range(1, 5003))

    play(scenario)


def test_the_end_can_be_waited_for() -> None:
    async def scenario(log: RunLog) -> None:
        waiting = asyncio.create_task(log.completed())
        write(log, 2)
        await asyncio.sleep(0)
        assert not waiting.done()
        log.append(FINISHED, 0.0)
        await waiting
        await log.completed()

    play(scenario)


def test_waiting_for_a_task_wakes_at_the_end_of_that_task_only() -> None:
    async def scenario(log: RunLog) -> None:
        waiting = log.task_ended("a")
        future = waiting.send(None)
        write(log, 3)
        log.append(TaskCancelled("r", "b", 1, CANCELLED), 3.0)
        assert not future.done()
        log.append(TaskCancelled("r", "a", 1, CANCELLED), 4.0)
        assert future.done()
        with pytest.raises(StopIteration):
            waiting.send(None)

    play(scenario)


def test_the_oldest_output_is_cut_and_no_event_is_lost() -> None:
    async def scenario(log: RunLog) -> None:
        log = RunLog(max_output_bytes=3000)
        for number in range(10):
            log.append(TaskLogged("r", "t", 1, False, str(number) * 1000, False), 0.0)
            log.append(RunStarted("w", number), 0.0)
        assert log.kept_bytes < 20 * 400 + 3000
        log.append(FINISHED, 0.0)
        assert await read(log) == list(range(1, 22))
        told = [event.fact for event in log.events if isinstance(event.fact, TaskLogged)]
        assert [(len(fact.text), fact.is_truncated) for fact in told] == [(0, True)] * 8 + [(1000, False)] * 2
        assert log.events[1].fact == RunStarted("w", 0)

    play(scenario)


def test_one_output_over_the_limit_is_kept() -> None:
    async def scenario(log: RunLog) -> None:
        log = RunLog(max_output_bytes=10)
        log.append(TaskLogged("r", "t", 1, False, "x" * 1000, False), 0.0)
        assert isinstance(log.events[0].fact, TaskLogged)
        assert log.events[0].fact.text == "x" * 1000

    play(scenario)
