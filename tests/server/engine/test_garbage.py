"""Garbage: the server's own objects form no cycles, and a full collection waits until the server is idle."""

import asyncio
import contextlib
import gc
from collections.abc import Iterator

import pytest

from lattice_server import garbage
from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import TaskCancelled
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.garbage import GarbageCollection
from tests.server.core.graphs import task, workflow
from tests.server.engine.test_orchestrator import STOPPED, Holdings, finish, play, start


@contextlib.contextmanager
def saving_garbage() -> Iterator[list[str]]:
    """Yield the types of this project's objects that were in cycles; filled in when the block ends."""
    types: list[str] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield types
        gc.collect()
        classes = {type(found) for found in gc.garbage}
        types += sorted(found.__qualname__ for found in classes if "lattice_server" in found.__module__)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def play_life_of_runs(orchestrator: Orchestrator, name: str) -> None:
    """Start and end runs of every kind, and have some refused."""
    start(orchestrator, f"{name} ends")
    finish(orchestrator, f"{name} ends")
    entry = start(orchestrator, f"{name} stops", workflow({"t": (), "u": ("t",), "v": ("t", "u")}))
    orchestrator.cancel_run(entry.key, "")
    orchestrator.deliver([TaskCancelled(entry.key, "t", 0, STOPPED)])
    orchestrator.ended.note_read(entry)
    with contextlib.suppress(LatticeError):
        start(orchestrator, f"{name} is refused", workflow({"a": ("b",), "b": ("a",)}))
    with contextlib.suppress(LatticeError):
        orchestrator.run(f"{name} is unknown")


async def play_open_run(orchestrator: Orchestrator, name: str) -> None:
    """Open a run with a time limit, add to it, and cancel it."""
    entry, _ = orchestrator.start_run(
        name, workflow({"t": ()}), parameters={}, fingerprint="", labels={}, priority=0, is_open=True, timeout_s=9.0
    )
    stream = orchestrator.open_runs.hold(entry)
    await orchestrator.add_tasks(name, [task("u", ["t"])], None)
    orchestrator.cancel_run(name, "")
    orchestrator.deliver([TaskCancelled(name, "t", 0, STOPPED)])
    orchestrator.open_runs.leave(entry, stream)
    orchestrator.ended.note_read(entry)


def test_runs_leave_no_cycles_when_they_are_evicted() -> None:
    async def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        with saving_garbage() as types:
            for number in range(3):
                play_life_of_runs(orchestrator, f"r{number}")
                await play_open_run(orchestrator, f"o{number}")
            await asyncio.sleep(0)
        assert len(orchestrator.runs) == 1, "the others were evicted"
        assert types == []

    play(scenario, retained_runs=1)


def test_a_full_collection_waits_until_the_server_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[bool] = []
    monkeypatch.setattr(garbage, "IDLE_S", 0.0)
    monkeypatch.setattr(garbage.gc, "collect", lambda: collected.append(True))
    is_idle = False

    async def scenario() -> None:
        nonlocal is_idle
        collection = GarbageCollection(lambda: is_idle)
        collection.request()
        await asyncio.sleep(0.01)
        assert not collected, "a task is open"
        is_idle = True
        collection.request()
        is_idle = False
        await asyncio.sleep(0.01)
        assert not collected, "another task came"
        is_idle = True
        for _ in range(3):
            collection.request()
            await asyncio.sleep(0.01)
        assert collected == [True], "the next one waits for its time"

    asyncio.run(scenario())


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """Undo for a test what `tests/conftest.py` has done for all."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("unfrozen")
def test_the_thresholds_of_the_process_are_restored_when_the_server_stops() -> None:
    before = gc.get_threshold()
    collection = GarbageCollection(lambda: True)
    collection.start()
    try:
        assert gc.get_threshold() != before
        assert gc.get_freeze_count() > 0
    finally:
        collection.stop()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_objects_stay_frozen_when_the_process_froze_them_before_the_start() -> None:
    before = gc.get_freeze_count()
    assert before > 0
    collection = GarbageCollection(lambda: True)
    collection.start()
    collection.stop()
    assert gc.get_freeze_count() == before
