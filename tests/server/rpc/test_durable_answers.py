"""Answers of a server with a journal: when they are sent."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest

from lattice_server.core.errors import UnavailableError
from lattice_server.core.tenancy import Reach
from lattice_server.engine.recording.durability import Durability
from lattice_server.engine.recording.journal_port import JournalBrokenError
from lattice_server.engine.recording.journal_records import Record
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.rpc.durable_answers import DurableAnswers


class Appended:
    """A journal whose records become durable when a test says so."""

    epoch, last_run, last_workflow, is_busy = 1, 0, 0, False

    def __init__(self) -> None:
        self.number = 0
        self.is_broken = False

    def append(self, records: Sequence[Record]) -> int:
        if self.is_broken:
            raise JournalBrokenError("the disk is gone")
        self.number += 1
        return self.number


class Recalled:
    """Notes the runs that were to be read."""

    def __init__(self) -> None:
        self.named: list[str] = []

    async def recall(self, run_id: str, reach: Reach) -> None:
        self.named.append(run_id)


class Scene:
    """A journal, and the answers that wait for it."""

    def __init__(self) -> None:
        self.durability = Durability(asyncio.get_running_loop(), lambda error: None, lambda runs, artifacts: None)
        self.appended, self.recalled = Appended(), Recalled()
        self.journal = RunJournal(self.appended, self.durability, None)  # type: ignore[arg-type]  # not used
        self.answers = DurableAnswers(self.journal, self.recalled)  # type: ignore[arg-type]  # a part of it

    async def change(self, request: Any, context: Any) -> str:
        """Carry out a request that changes something."""
        self.journal.unstore(1)
        return "changed"

    async def follow(self, request: Any, context: Any) -> AsyncIterator[int]:
        """Answer twice, after a change each."""
        for number in range(2):
            self.journal.unstore(number)
            yield number


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on an event loop of its own."""

    @functools.wraps(test)
    def call(*values: Any, **named: Any) -> None:
        asyncio.run(test(*values, **named))

    return call


async def rounds() -> None:
    """Let the event loop run its ready callbacks."""
    for _ in range(10):
        await asyncio.sleep(0)


@on_a_loop
async def test_an_answer_waits_until_its_change_is_durable() -> None:
    scene = Scene()
    answer = asyncio.ensure_future(scene.answers.wrap(scene.change)(None, None))
    await rounds()
    assert not answer.done()
    scene.durability.durable(1)
    assert await answer == "changed"


@on_a_loop
async def test_each_message_of_a_stream_waits_until_its_change_is_durable() -> None:
    scene = Scene()
    stream = scene.answers.wrap(scene.follow)(None, None)
    for number in range(2):
        message = asyncio.ensure_future(anext(stream))
        await rounds()
        assert not message.done()
        scene.durability.durable(number + 1)
        assert await message == number
    assert await anext(stream, None) is None


@pytest.mark.parametrize("is_told_first", [False, True])
@on_a_loop
async def test_an_answer_is_refused_when_its_change_will_never_be_durable(is_told_first: bool) -> None:
    scene = Scene()
    scene.appended.is_broken = is_told_first
    answer = asyncio.ensure_future(scene.answers.wrap(scene.change)(None, None))
    await rounds()
    assert not answer.done()
    scene.durability.failed(JournalBrokenError("the disk is gone"))
    with pytest.raises(UnavailableError, match="the disk is gone") as caught:
        await answer
    assert caught.value.reason == "SHUTTING_DOWN"


@on_a_loop
async def test_no_change_is_recorded_or_answered_when_the_journal_is_frozen() -> None:
    scene = Scene()
    scene.journal.freeze()
    answer = asyncio.ensure_future(scene.answers.wrap(scene.change)(None, None))
    scene.durability.durable(1)
    await rounds()
    assert (scene.appended.number, answer.done()) == (0, False)
    answer.cancel()
