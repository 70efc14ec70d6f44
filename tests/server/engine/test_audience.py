"""The readers of a run that wait for news: few are woken at once, many in groups with pauses for the runs."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lattice_server.core.messages import RunFinished, RunStarted
from lattice_server.core.states import RunState
from lattice_server.engine.runs.audience import GROUP, PAUSE_S, Audience
from lattice_server.engine.runs.log import RunLog

READERS = 5 * GROUP
TIMEOUT_S = 60.0
Timers = list[Callable[[], None]]


class Scene:
    """An audience, the readers that wait, and the timers that are due."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.audience = Audience()
        self.timers: Timers = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._note)

    def _note(self, delay_s: float, call: Callable[[], None]) -> None:
        assert delay_s == PAUSE_S
        self.timers.append(call)

    async def wait(self, count: int, *, is_behind: bool = False) -> "list[asyncio.Task[None]]":
        found = [asyncio.create_task(self.audience.news(is_behind=is_behind)) for _ in range(count)]
        await steps()
        return found

    async def end_pause(self) -> None:
        (timer,) = self.timers
        self.timers.clear()
        timer()
        await steps()

    async def end_round(self) -> None:
        while self.timers:
            await self.end_pause()


async def steps() -> None:
    """Let every task take the steps it can."""
    for _ in range(3):
        await asyncio.sleep(0)


def play(monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await scenario(Scene(monkeypatch))

    asyncio.run(run())


def told(readers: "list[asyncio.Task[None]]") -> int:
    return sum(reader.done() for reader in readers)


@pytest.mark.parametrize("count", [0, 1, GROUP])
def test_few_readers_are_woken_at_once_and_without_a_pause(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    async def scenario(scene: Scene) -> None:
        for _ in range(2):
            readers = await scene.wait(count)
            scene.audience.tell()
            await steps()
            assert (told(readers), scene.timers) == (count, [])

    play(monkeypatch, scenario)


def test_many_readers_are_woken_in_groups_with_a_pause_after_each(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        readers = await scene.wait(READERS)
        scene.audience.tell()
        await steps()
        for group in range(1, READERS // GROUP + 1):
            assert told(readers) == group * GROUP
            await scene.end_pause()
        assert scene.timers == []

    play(monkeypatch, scenario)


def test_news_during_a_round_wait_for_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        readers = await scene.wait(READERS)
        scene.audience.tell()
        again = await scene.wait(GROUP)
        late = await scene.wait(1, is_behind=True)
        scene.audience.tell()
        for _ in range(READERS // GROUP - 1):
            await scene.end_pause()
        assert (told(readers), told(again), told(late)) == (READERS, 0, 0)
        await scene.end_round()
        assert (told(again), told(late)) == (GROUP, 1)

    play(monkeypatch, scenario)


def test_a_reader_that_is_behind_waits_for_no_news_when_no_round_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.wait(READERS)
        assert told(await scene.wait(1, is_behind=True)) == 1

    play(monkeypatch, scenario)


def test_readers_that_leave_during_a_round_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        readers = await scene.wait(READERS)
        scene.audience.tell()
        for reader in readers:
            reader.cancel()
        await steps()
        await scene.end_round()
        assert told(readers) == READERS
        (reader,) = await scene.wait(1)
        scene.audience.tell()
        await steps()
        assert reader.done()

    play(monkeypatch, scenario)


def test_many_readers_get_each_event_once_and_in_few_batches() -> None:
    async def scenario() -> None:
        log, events = RunLog(), 40
        batches = [0] * READERS
        reading = asyncio.Event()

        async def read(number: int) -> list[int]:
            found = []
            async for batch in log.follow(0):
                batches[number] += 1
                found += [event.sequence for event in batch]
                reading.set()
            return found

        readers = [asyncio.create_task(read(number)) for number in range(READERS)]
        for number in range(events):
            log.append(RunStarted("w", number), 0.0)
            reading.clear()
            async with asyncio.timeout(TIMEOUT_S):
                await reading.wait()
        log.append(RunFinished(RunState.SUCCEEDED, None), 0.0)
        async with asyncio.timeout(TIMEOUT_S):
            assert await asyncio.gather(*readers) == [[*range(1, events + 2)]] * READERS
        assert max(batches) <= events // 2

    asyncio.run(scenario())
