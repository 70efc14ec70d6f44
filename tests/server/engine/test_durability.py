"""Waiting until records are durable."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from lattice_server.engine.recording.durability import Durability
from lattice_server.engine.recording.journal_port import JournalBrokenError, JournalError
from lattice_server.engine.recording.journal_records import DroppedRun


class Told:
    def __init__(self) -> None:
        self.errors: list[JournalError] = []
        self.dropped: list[tuple[Sequence[DroppedRun], Sequence[str]]] = []
        self.durability = Durability(
            asyncio.get_running_loop(), self.errors.append, lambda *dropped: self.dropped.append(dropped)
        )

    async def from_a_thread(self, *numbers: int) -> None:
        await asyncio.to_thread(lambda: [self.durability.durable(number) for number in numbers])
        await asyncio.sleep(0)


def test_calls_are_made_in_order_once_their_commit_is_durable() -> None:
    async def scene() -> None:
        told, called = Told(), list[int]()
        for number in (1, 2, 2, 5):
            told.durability.when(number, lambda number=number: called.append(number))  # type: ignore[misc]
        assert called == []
        await told.from_a_thread(1, 2, 3)
        assert called == [1, 2, 2]
        told.durability.when(3, lambda: called.append(3))
        assert called == [1, 2, 2, 3]
        await told.from_a_thread(4, 6)
        assert called == [1, 2, 2, 3, 5]
        assert told.durability.number == 6

    asyncio.run(scene())


def test_wait_ends_with_its_commit() -> None:
    async def scene() -> None:
        told = Told()
        waiting = asyncio.create_task(told.durability.wait(2))
        left = asyncio.create_task(told.durability.wait(2))
        await told.from_a_thread(1)
        assert not waiting.done()
        left.cancel()
        await told.from_a_thread(2)
        await waiting
        await told.durability.wait(1)

    asyncio.run(scene())


def test_wait_raises_and_nothing_is_called_when_the_journal_breaks() -> None:
    async def scene() -> None:
        told, called = Told(), list[int]()
        told.durability.when(1, lambda: called.append(1))
        waiting = asyncio.create_task(told.durability.wait(2))
        await asyncio.sleep(0)
        error = JournalBrokenError("the disk is gone")
        thread = threading.Thread(target=told.durability.failed, args=(error,))
        thread.start()
        thread.join()
        with pytest.raises(JournalBrokenError, match="gone"):
            await waiting
        with pytest.raises(JournalBrokenError, match="gone"):
            await told.durability.wait(3)
        assert (called, told.errors) == ([], [error])

    asyncio.run(scene())


def test_dropped_runs_are_reported_on_the_loop() -> None:
    async def scene() -> None:
        told, run = Told(), DroppedRun(1, "t", "r", "p")
        await asyncio.to_thread(told.durability.dropped, [run], ["a"])
        await asyncio.sleep(0)
        assert told.dropped == [([run], ["a"])]

    asyncio.run(scene())
