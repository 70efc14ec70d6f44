"""The bus between two real threads, and the scheduler's thread on it."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from lattice_server.core.messages import (
    Assign,
    SchedulerEffect,
    SchedulerEvent,
    TaskReady,
    WorkerDetached,
    WorkerLost,
)
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.engine import scheduler_thread as scheduling
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.scheduler_thread import SchedulerThread
from tests.server.core.graphs import hello, task

TIMEOUT_S = 60.0
SOON_S = 10.0


def event(number: int) -> WorkerDetached:
    return WorkerDetached(str(number))


def next_events(bus: MessageBus, timeout_s: float | None = None) -> list[SchedulerEvent] | None:
    """Wait for events; take them."""
    bus.wait(timeout_s)
    return bus.take()


def play(scenario: Callable[[MessageBus], Any]) -> None:
    """Play a scenario with a fresh bus on a loop of its own."""

    async def run() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario(MessageBus(asyncio.get_running_loop()))

    asyncio.run(run())


@contextlib.asynccontextmanager
async def thread(target: Callable[[], None]) -> AsyncIterator[None]:
    """Run `target` beside the block; both end before the test does."""
    running = asyncio.create_task(asyncio.to_thread(target))
    yield
    await running


def test_events_cross_in_order_from_any_number_of_threads() -> None:
    async def scenario(bus: MessageBus) -> None:
        seen: list[int] = []

        def consume() -> None:
            while (events := next_events(bus)) is not None:
                seen.extend(int(e.session_id) for e in events if isinstance(e, WorkerDetached))

        def produce(start: int) -> None:
            for number in range(start, start + 1000, 2):
                bus.post([event(number), event(number + 1)])

        async with thread(consume):
            await asyncio.gather(*(asyncio.to_thread(produce, start) for start in (0, 1000, 2000)))
            bus.close()
        assert sorted(seen) == list(range(3000))
        for start in (0, 1000, 2000):
            assert [number for number in seen if start <= number < start + 1000] == list(range(start, start + 1000))

    play(scenario)


def test_effects_cross_in_order_and_share_wake_ups() -> None:
    async def scenario(bus: MessageBus) -> None:
        loop_thread, batches, is_done = threading.get_ident(), list[list[Any]](), asyncio.Event()

        def deliver(effects: list[Any]) -> None:
            assert threading.get_ident() == loop_thread
            batches.append(effects)
            if effects[-1] == 9999:
                is_done.set()

        bus.subscribe(deliver)
        publish: Callable[[Sequence[Any]], None] = bus.publish

        def produce() -> None:
            for number in range(0, 10_000, 2):
                publish([number, number + 1])
            publish([])

        async with thread(produce):
            await is_done.wait()
        assert [effect for batch in batches for effect in batch] == list(range(10_000))
        assert all(batches), "nobody is woken for nothing"

    play(scenario)


def test_every_publication_is_delivered_however_it_meets_the_last_one() -> None:
    async def scenario(bus: MessageBus) -> None:
        delivered = asyncio.Semaphore(0)
        asked = threading.Semaphore(0)
        bus.subscribe(lambda effects: [delivered.release() for _ in effects] and None)
        publish: Callable[[Sequence[Any]], None] = bus.publish

        def produce() -> None:
            for number in range(2000):
                asked.acquire()
                publish([number])

        async with thread(produce):
            for _ in range(2000):
                asked.release()
                await delivered.acquire()

    play(scenario)


def test_callback_is_called_once_the_scheduler_has_taken_the_events() -> None:
    async def scenario(bus: MessageBus) -> None:
        loop, loop_thread = asyncio.get_running_loop(), threading.get_ident()

        def consume() -> None:
            while next_events(bus) is not None:
                pass

        async with thread(consume):
            for number in range(2000):
                called: asyncio.Future[tuple[int, bool]] = loop.create_future()
                bus.post([event(number)])
                bus.call_when_taken(lambda: called.set_result((threading.get_ident(), bool(bus._batches))))  # noqa: B023
                assert await called == (loop_thread, False)
            bus.close()

    play(scenario)


def test_callback_wakes_a_sleeping_scheduler() -> None:
    class Wakes:
        """Notes that the scheduler's thread sleeps."""

        def __init__(self) -> None:
            self._wakes: SimpleQueue[None] = SimpleQueue()
            self.put, self.is_asleep = self._wakes.put, threading.Event()

        def get(self, timeout: float | None) -> None:
            if self._wakes.empty():
                self.is_asleep.set()
            return self._wakes.get(timeout=timeout)

    class Batches(deque[Any]):
        """Adds a callback late, when the thread has taken all that was before it."""

        def append(self, item: Any) -> None:
            if callable(item):
                may_take.set()
                wakes.is_asleep.wait(TIMEOUT_S)
            super().append(item)

    wakes, may_take = Wakes(), threading.Event()

    async def scenario(bus: MessageBus) -> None:
        bus._wakes, bus._batches = wakes, Batches()  # type: ignore[assignment]
        called = asyncio.Event()

        def consume() -> None:
            may_take.wait(TIMEOUT_S)
            while next_events(bus) is not None:
                pass

        bus.post([event(1)])
        async with thread(consume):
            await asyncio.sleep(0)  # It starts.
            bus.call_when_taken(called.set)
            try:
                await asyncio.wait_for(called.wait(), SOON_S)
            finally:
                bus.close()

    play(scenario)


def test_callback_is_called_at_once_without_posted_events() -> None:
    async def scenario(bus: MessageBus) -> None:
        called = asyncio.Event()
        bus.call_when_taken(called.set)
        await called.wait()

    play(scenario)


def test_events_posted_before_the_end_are_still_read() -> None:
    async def scenario(bus: MessageBus) -> None:
        bus.post([event(1)])
        bus.post([])
        bus.post([event(2)])
        bus.close()
        assert next_events(bus) == [event(1), event(2)]
        assert next_events(bus) is None

    play(scenario)


def test_a_wait_ends_empty_when_its_time_is_over() -> None:
    async def scenario(bus: MessageBus) -> None:
        assert next_events(bus, 0.0) == []
        assert next_events(bus, 0.001) == []

    play(scenario)


def test_a_wait_may_be_as_long_as_a_duration_can_be() -> None:
    async def scenario(bus: MessageBus) -> None:
        bus.post([event(1)])
        assert next_events(bus, 315_576_000_000.0) == [event(1)]

    play(scenario)


def unexpected() -> None:
    raise AssertionError("the scheduler gave up")


class Fragile(Scheduler):
    """A machine with a bug: it cannot take the loss of a certain worker."""

    def __init__(self) -> None:
        super().__init__("e")
        self.has_broken = threading.Event()

    def take(self, event: SchedulerEvent, now: float) -> None:
        """Raise on that event, as a broken invariant would."""
        if event == WorkerLost("bad", ""):
            self.has_broken.set()
            raise AssertionError("a broken invariant")
        super().take(event, now)


def schedule(*batches: list[SchedulerEvent]) -> list[str]:
    """Post batches to a fragile scheduler, the later ones when it has broken; return its effects' names by `Assign`."""
    seen: list[str] = []

    async def scenario(bus: MessageBus) -> None:
        is_done = asyncio.Event()

        def deliver(effects: list[Any]) -> None:
            seen.extend(type(effect).__name__ for effect in effects)
            if "Assign" in seen:
                is_done.set()

        bus.subscribe(deliver)
        machine = Fragile()
        scheduler = SchedulerThread(machine, bus, unexpected)
        scheduler.start()
        try:
            for batch in batches:
                bus.post(batch)
                await asyncio.to_thread(machine.has_broken.wait, TIMEOUT_S)
            await is_done.wait()
        finally:
            await asyncio.to_thread(scheduler.stop)

    before = threading.active_count()
    play(scenario)
    assert threading.active_count() <= before
    return seen


def test_the_scheduler_outlives_a_bug_of_its_machine(caplog: pytest.LogCaptureFixture) -> None:
    seen = schedule([WorkerLost("bad", "")], [hello("n")], [TaskReady("r", task("t"), {}, 0)])
    assert seen == ["WelcomeWorker", "NodesChanged", "Assign"]
    assert "a broken invariant" in caplog.text


def test_a_bug_costs_the_event_that_meets_it_and_no_other() -> None:
    seen = schedule([WorkerLost("bad", ""), hello("n"), TaskReady("r", task("t"), {}, 0)])
    assert seen == ["WelcomeWorker", "NodesChanged", "Assign"]


class Overdue(Scheduler):
    """A machine with a bug: something is due, and so many times in a row it raises instead of doing it."""

    def __init__(self, times: int) -> None:
        super().__init__("e")
        self.ticks = 0
        self._times = times

    def next_deadline(self) -> float | None:
        """Return a time that is over, until it is done."""
        return 0.0 if self.ticks <= self._times else None

    def tick(self, now: float) -> list[SchedulerEffect]:
        """Raise, or do it."""
        self.ticks += 1
        if self.ticks <= self._times:
            raise AssertionError("a broken invariant")
        return super().tick(now)


def test_a_scheduler_that_cannot_tick_any_more_gives_up_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "PAUSES_S", (0.0, 0.001))

    async def scenario(bus: MessageBus) -> None:
        has_failed = threading.Event()
        machine = Overdue(1_000_000)
        scheduler = SchedulerThread(machine, bus, has_failed.set)
        scheduler.start()
        await asyncio.to_thread(has_failed.wait, TIMEOUT_S)
        await asyncio.to_thread(scheduler.stop)
        assert machine.ticks == 3, "once, and once after each pause"

    play(scenario)
    assert len(caplog.records) == 4
    assert "the scheduler has failed 3 times in a row and gives up" in caplog.text


def test_a_scheduler_recovers_when_a_tick_no_longer_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "PAUSES_S", (0.0, 0.0))

    async def scenario(bus: MessageBus) -> None:
        is_assigned = asyncio.Event()
        bus.subscribe(lambda effects: is_assigned.set() if isinstance(effects[-1], Assign) else None)
        scheduler = SchedulerThread(Overdue(2), bus, unexpected)
        scheduler.start()
        bus.post([hello("n"), TaskReady("r", task("t"), {}, 0)])
        await is_assigned.wait()
        await asyncio.to_thread(scheduler.stop)

    play(scenario)


def test_a_scheduler_that_pauses_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "PAUSES_S", (TIMEOUT_S,))

    async def scenario(bus: MessageBus) -> None:
        scheduler = SchedulerThread(Overdue(1), bus, unexpected)
        scheduler.start()
        await asyncio.to_thread(scheduler.stop)

    play(scenario)


def test_the_scheduler_wakes_by_itself_when_its_machine_is_due() -> None:
    async def scenario(bus: MessageBus) -> None:
        welcomed: list[str] = []
        is_lost = asyncio.Event()

        def deliver(effects: list[Any]) -> None:
            for effect in effects:
                match type(effect).__name__:
                    case "WelcomeWorker":
                        welcomed.append(effect.session_id)
                        bus.post([WorkerDetached(welcomed[0])])
                    case "Assign" if effect.session_id != welcomed[0]:
                        is_lost.set()

        bus.subscribe(deliver)
        scheduler = SchedulerThread(Scheduler("e", session_ttl_s=0.05), bus, unexpected)
        scheduler.start()
        bus.post([hello("n"), TaskReady("r", task("t"), {}, 0)])
        while not welcomed:
            await asyncio.sleep(0)
        # No event is posted until the session expires; then another worker gets the task.
        bus.post([hello("m")])
        await is_lost.wait()
        await asyncio.to_thread(scheduler.stop)

    play(scenario)


class Recording(Scheduler):
    """A machine that notes the threads on which it takes events, and how many it took."""

    def __init__(self) -> None:
        super().__init__("e")
        self.taken: list[int] = []

    def take(self, event: SchedulerEvent, now: float) -> None:
        """Note the thread."""
        self.taken.append(threading.get_ident())


@pytest.mark.parametrize(("batches", "size", "is_here"), [(1, 1, True), (1, 64, True), (1, 65, False), (64, 1, True)])
def test_few_events_are_taken_on_the_main_thread_and_many_on_the_other(batches: int, size: int, is_here: bool) -> None:
    async def scenario(bus: MessageBus) -> None:
        machine = Recording()
        scheduler = SchedulerThread(machine, bus, unexpected)
        scheduler.start()
        try:
            for _ in range(batches):
                bus.post([event(number) for number in range(size)])
            while len(machine.taken) < batches * size:
                await asyncio.sleep(0)
            threads = set(machine.taken)
            assert (threads == {threading.get_ident()}) if is_here else (threads != {threading.get_ident()})
        finally:
            await asyncio.to_thread(scheduler.stop)

    play(scenario)


def test_events_beyond_those_of_a_pass_are_taken_after_it() -> None:
    async def scenario(bus: MessageBus) -> None:
        machine = Recording()
        scheduler = SchedulerThread(machine, bus, unexpected)
        scheduler.start()
        try:
            for _ in range(10):
                bus.post([event(number) for number in range(60)])
            while len(machine.taken) < 600:
                await asyncio.sleep(0.001)
        finally:
            await asyncio.to_thread(scheduler.stop)

    play(scenario)


def test_the_thread_repeats_a_pass_that_raised_on_the_main_thread(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "PAUSES_S", (0.0, TIMEOUT_S))

    class Broken(Recording):
        """A machine that cannot tick."""

        ticks: tuple[int, ...] = ()

        def tick(self, now: float) -> list[SchedulerEffect]:
            self.ticks = (*self.ticks, threading.get_ident())
            raise AssertionError("a broken invariant")

    async def scenario(bus: MessageBus) -> None:
        machine, here = Broken(), threading.get_ident()
        scheduler = SchedulerThread(machine, bus, lambda: None)  # It gives up when it is stopped.
        scheduler.start()
        bus.post([event(1)])
        while len(machine.ticks) < 2:
            await asyncio.sleep(0)
        # The thread pauses now; the main thread leaves it alone.
        bus.post([event(2)])
        for _ in range(10):
            await asyncio.sleep(0)
        assert [thread == here for thread in machine.ticks] == [True, False]
        await asyncio.to_thread(scheduler.stop)

    play(scenario)
    assert "could not place queued tasks, 1 times in a row" in caplog.text
    assert "could not place queued tasks, 2 times in a row" in caplog.text
