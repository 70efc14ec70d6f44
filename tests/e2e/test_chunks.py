"""Chunks and progress out of tasks, from the Python client and the command line."""

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lattice_client import (
    AsyncLatticeClient,
    Chunk,
    LatticeClient,
    StreamInterruptedError,
    TaskFailedError,
    context,
    task,
)
from tests.commands import LATTICE
from tests.e2e.conftest import served
from tests.e2e.rooms import Room, enter

LEVELS = ["none", "subprocess", "seccomp"]


@task
def count(n: int) -> Iterator[int]:
    yield from range(n)


@task(combine="".join)
async def words(n: int) -> AsyncIterator[str]:
    for number in range(n):
        yield f"w{number} "


@task
def last(n: int) -> Any:
    yield from range(n)
    return "last"


@task
def emits(n: int) -> str:
    for number in range(n):
        context.emit({"n": number})
        context.progress(number + 1, n)
    return "done"


@task(retries=1)
def flaky(room: str) -> Iterator[str]:
    yield f"attempt {context.current().number}"
    if context.current().number == 1:
        enter(room, "first")
        raise ValueError("broken")


def test_generators_stream_and_their_output_is_made_of_their_chunks(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    counted, spoken = workflow.add_task(count, {"n": 5}), workflow.add_task(words, {"n": 3})
    ended, emitted = workflow.add_task(last, {"n": 2}), workflow.add_task(emits, {"n": 300})
    run = workflow.run()
    assert list(run.stream(counted, timeout=60)) == [0, 1, 2, 3, 4]
    assert list(run.stream(spoken)) == ["w0 ", "w1 ", "w2 "]
    assert list(run.stream(ended)) == [0, 1]
    assert [chunk.value["n"] for chunk in run.chunks(emitted)] == list(range(300))
    outputs = {name: found["result"] for name, found in run.result(timeout=60).items()}
    assert outputs == {"count": [0, 1, 2, 3, 4], "words": "w0 w1 w2 ", "last": "last", "emits": "done"}
    # After the end all is read again, from any chunk on.
    assert list(run.chunks(counted, after={"count": 3})) == [Chunk("count", 4, 1, 3, 3), Chunk("count", 5, 1, 4, 4)]
    assert len(list(run.chunks())) == 5 + 3 + 2 + 300
    assert [(found.done, found.total) for found in run.progress("emits")] == [(300, 300)]


def test_a_reader_gets_each_chunk_while_the_task_runs(client: LatticeClient, room: Room) -> None:
    @task
    def talk(room: str) -> Iterator[int]:
        for number in range(3):
            yield number
            enter(room, str(number))

    workflow = client.create_workflow()
    talking = workflow.add_task(talk, {"room": room})
    run = workflow.run()
    stream = run.stream(talking, timeout=60)
    assert next(stream) == 0
    assert run.status() == "running"
    room.open()
    assert list(stream) == [1, 2]


def test_the_asynchronous_client_streams_from_many_tasks_at_once(address: str) -> None:
    async def scenario() -> None:
        async with AsyncLatticeClient(address) as client:
            workflow = client.create_workflow()
            tasks = [workflow.add_task(words, {"n": 50}, task_id=f"w{number}") for number in range(20)]
            run = await workflow.run()

            async def read(one: Any) -> list[str]:
                return [word async for word in run.stream(one)]

            async with asyncio.timeout(60):
                found = await asyncio.gather(*map(read, tasks))
            assert found == [[f"w{number} " for number in range(50)]] * 20

    asyncio.run(scenario())


def test_a_stream_raises_the_error_of_its_task_after_its_chunks(client: LatticeClient) -> None:
    @task
    def fails() -> Iterator[int]:
        yield 1
        raise LookupError("broken")

    workflow = client.create_workflow()
    failing = workflow.add_task(fails)
    run = workflow.run()
    found = []
    with pytest.raises(TaskFailedError) as caught:
        found += list(run.stream(failing, timeout=60))
    for chunk in run.chunks(failing):
        found.append(chunk.value)
    assert found == [1]
    assert isinstance(caught.value.__cause__, LookupError)


def test_a_repeated_attempt_replaces_the_chunks_and_readers_are_told(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    tried = workflow.add_task(flaky, {"room": room})
    run = workflow.run()
    strict, restarts = run.stream(tried, timeout=60), list[int]()
    lenient = run.stream(tried, on_restart=restarts.append, timeout=60)
    assert next(strict) == next(lenient) == "attempt 1"
    room.open()
    with pytest.raises(StreamInterruptedError, match="attempt 2 of task 'flaky' began anew"):
        next(strict)
    assert list(lenient) == ["attempt 2"]
    assert restarts == [2]
    assert list(run.stream(tried)) == ["attempt 2"]
    assert run.result(timeout=60) == {"result": ["attempt 2"]}


def test_a_cancelled_task_ends_its_stream(client: LatticeClient) -> None:
    @task
    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    @task
    async def endless_coroutine() -> AsyncIterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    workflow = client.create_workflow()
    tasks = workflow.add_task(endless), workflow.add_task(endless_coroutine)
    run = workflow.run()
    streams = [run.chunks(one, timeout=60) for one in tasks]
    for stream in streams:
        assert [next(stream).index for _ in range(1000)] == list(range(1000))
    run.cancel()
    for stream in streams:
        indices = [chunk.index for chunk in stream]
        assert indices == sorted(indices)
    assert run.status() == "cancelled"


@pytest.mark.parametrize("level", LEVELS)
def test_every_isolation_level_streams(local: str, level: str) -> None:
    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        counted = workflow.add_task(count.with_(isolation=level), {"n": 600})
        spoken = workflow.add_task(words.with_(isolation=level), {"n": 3})
        run = workflow.run()
        assert list(run.stream(counted, timeout=60)) == list(range(600))
        assert list(run.stream(spoken, timeout=60)) == ["w0 ", "w1 ", "w2 "]


def test_items_of_batches_and_of_mapped_tasks_stream_for_themselves(local: str) -> None:
    @task
    def numbers() -> list[int]:
        return [1, 2, 3]

    @task(batch_size=3, batch_timeout=5)
    def batched(x: list[int]) -> list[int]:
        for item, number in enumerate(x):
            context.emit(number, item=item)
        return x

    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        made = workflow.add_task(numbers)
        mapped = workflow.map(batched, {"x": made.output})
        run = workflow.run()
        found = {chunk.task_id: chunk.value for chunk in run.chunks(mapped, timeout=60)}
        assert found == {"batched[0]": 1, "batched[1]": 2, "batched[2]": 3}


def test_spawned_generators_stream(local: str) -> None:
    def plain(n: int) -> Iterator[int]:
        yield from range(n)

    @task
    def parent() -> None:
        context.spawn(words, {"n": 2})
        context.spawn(plain, {"n": 2})

    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        workflow.add_task(parent)
        run = workflow.run()
        assert run.result(timeout=60)
        assert list(run.stream("parent/words")) == ["w0 ", "w1 "]
        assert run.output("parent/words") == "w0 w1 "
        assert run.output("parent/plain") == [0, 1]


def test_a_flood_delays_no_other_task_and_only_its_newest_chunks_are_kept() -> None:
    @task
    def flood() -> None:
        for number in range(15_000):
            context.emit(number)

    @task
    def quick() -> int:
        return 1

    with served("--executor", "local", "--num-cpus", "4") as address, LatticeClient(address) as client:
        workflow = client.create_workflow()
        flooding = workflow.add_task(flood)
        run = workflow.run()
        for _ in range(10):
            assert client.run_task(quick) == {"result": 1}
        run.result(timeout=100)
        indices = [chunk.index for chunk in run.chunks(flooding)]
        assert indices == list(range(5_000, 15_000))
        with pytest.raises(StreamInterruptedError, match="chunks 0 to 4999 of task 'flood' are not kept any more"):
            next(run.stream(flooding))


def test_the_command_line_shows_streams(local: str) -> None:
    def shown(*arguments: str) -> tuple[int, str]:
        found = subprocess.run(
            [LATTICE, "runs", *arguments, "--addr", local], capture_output=True, text=True, check=False, timeout=60
        )
        return found.returncode, found.stdout

    @task
    def fails() -> Iterator[Any]:
        yield "a \x1b[31mred"
        yield {"b": 1}
        yield object
        raise ValueError("broken")

    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        workflow.add_task(words, {"n": 3})
        workflow.add_task(emits, {"n": 1})
        run = str(workflow.run())
        assert shown("stream", run, "words") == (0, "w0 w1 w2 \n")
        assert shown("stream", run, "emits") == (0, '{"n": 0}\n')
        status, text = shown("stream", run)
        assert sorted(text.splitlines()) == ['emits\t{"n": 0}', "words\tw0", "words\tw1", "words\tw2"]
        status, text = shown("stream", run, "emits", "--json")
        documents = [json.loads(line) for line in text.splitlines()]
        chunk = {"task_id": "emits", "attempt": 1, "sequence": 1, "index": 0, "value": {"n": 0}}
        assert chunk in documents
        assert {"task_id": "emits", "attempt": 1, "done": 1.0, "total": 1.0} in documents
        assert "1/1" in shown("show", run)[1]
        failing = client.create_workflow()
        failing.add_task(fails)
        status, text = shown("stream", str(failing.run()), "fails")
        assert status == 1
        assert text.startswith('a \N{REPLACEMENT CHARACTER}[31mred\n{"b": 1}\n<application/vnd.lattice.cloudpickle, ')


def test_streams_go_on_when_a_worker_is_lost(client: LatticeClient, tmp_path: Path) -> None:
    """A lost worker's attempt is repeated, and the new one replaces its chunks."""

    @task(retries=1)
    def dies(path: Path) -> Iterator[int]:
        yield context.current().number
        if not path.exists():
            path.touch()
            time.sleep(0.1)
            import os

            os._exit(1)

    workflow = client.create_workflow()
    dying = workflow.add_task(dies, {"path": tmp_path / "died"})
    run = workflow.run()
    run.result(timeout=60)
    assert list(run.stream(dying)) == [2]
