"""The chunks of tasks in the server: numbers, positions of readers, attempts, retention."""

import asyncio
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lattice_server.core.messages import RunFinished, TaskProgressed, TaskStarted, TaskStreamed
from lattice_server.core.model import Isolation, Payload
from lattice_server.core.states import RunState
from lattice_server.engine.runs.chunk_log import Batch, Chunk, Progress, RunChunks, TaskStream
from lattice_server.engine.runs.chunk_store import ChunkStore, log_of
from lattice_server.engine.stores.usage import Bound

JSON = "application/json"


def a_run(key: str = "r", tenant: str = "") -> Any:
    """Return the parts of a run that the store reads."""
    spec = SimpleNamespace(isolation=Isolation.NONE)
    tasks: Any = defaultdict(lambda: SimpleNamespace(spec=spec))
    log, run = SimpleNamespace(is_complete=False), SimpleNamespace(tenant=tenant, tasks=tasks)
    return SimpleNamespace(key=key, run=run, log=log, chunks=None)


def streamed(task_id: str, attempt: int, *values: object) -> TaskStreamed:
    return TaskStreamed("r", task_id, attempt, tuple(Payload(JSON, str(value)) for value in values))


def started(task_id: str, attempt: int) -> TaskStarted:
    return TaskStarted("r", task_id, attempt, "n", "127.0.0.1", ())


def texts(chunks: list[Chunk]) -> list[object]:
    return [chunk.payload.content if chunk.payload else "restart" for chunk in chunks]


def kept_by(store: ChunkStore, *runs: Any) -> dict[str, int]:
    """Return the bytes that the chunks of runs take, by tenant."""
    found: dict[str, int] = {}
    for run in runs:
        for stream in run.chunks.streams.values() if run.chunks else ():
            assert stream.kept_bytes == sum(chunk.kept_bytes for chunk in stream.after(0, 1_000_000))
            found[run.run.tenant] = found.get(run.run.tenant, 0) + stream.kept_bytes
    return {tenant: size for tenant, size in found.items() if size}


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("stream"), st.sampled_from("ab"), st.integers(1, 7)),
        st.tuples(st.just("retry"), st.sampled_from("ab"), st.just(0)),
        st.tuples(st.just("read"), st.just(""), st.integers(1, 5)),
        st.tuples(st.just("break"), st.just(""), st.just(0)),
    ),
    max_size=40,
)


@given(OPERATIONS, st.sampled_from([3, 1000]))
def test_reader_gets_each_kept_chunk_once_across_reconnects_and_retries(
    operations: list[tuple[str, str, int]], max_chunks: int
) -> None:
    async def scenario() -> None:
        store, run = ChunkStore(max_chunks=max_chunks), a_run()
        attempts, made, newest = {"a": 1, "b": 1}, {"a": 0, "b": 0}, {"a": 0, "b": 0}
        read: dict[str, list[Chunk]] = {"a": [], "b": []}
        over = False
        position: dict[str, int] = {}
        reader = log_of(run).follow("", {}, lambda: over)

        def take(batch: Batch) -> None:
            for task_id, chunk in batch.chunks:
                read[task_id].append(chunk)
                position[task_id] = chunk.sequence

        for what, task_id, number in operations:
            if what == "stream":
                first = made[task_id]
                store.take(run, streamed(task_id, attempts[task_id], *range(first, first + number)))
                made[task_id] += number
                newest[task_id] += number
            elif what == "retry":
                attempts[task_id] += 1
                newest[task_id] += made[task_id] > 0 or newest[task_id] > 0
                made[task_id] = 0
                store.note(run, started(task_id, attempts[task_id]))
            elif what == "break":
                await reader.aclose()  # type: ignore[attr-defined]
                reader = run.chunks.follow("", position, lambda: over)
            else:
                for _ in range(number):
                    if all(position.get(name, 0) == newest[name] for name in newest):
                        break
                    take(await anext(reader))
        over = True
        async for batch in reader:
            take(batch)
        for task_id, chunks in read.items():
            sequences = [chunk.sequence for chunk in chunks]
            assert sequences == sorted(set(sequences)), "no chunk twice, none before an earlier one"
            assert position.get(task_id, 0) == newest[task_id], "the newest one always"
            for earlier, later in pairwise(chunks):
                assert later.attempt >= earlier.attempt
                if later.attempt == earlier.attempt and max_chunks == 1000:
                    assert later.sequence == earlier.sequence + 1
            last = [chunk for chunk in chunks if chunk.attempt == attempts[task_id] and chunk.payload is not None]
            assert [chunk.index for chunk in last] == [
                int(str(chunk.payload.content)) for chunk in last if chunk.payload
            ]
            if max_chunks == 1000:
                assert [chunk.index for chunk in last] == list(range(made[task_id])), "dense in the attempt"
        assert dict(store.usage._by_tenant) == kept_by(store, run)

    asyncio.run(scenario())


LESS = [("a", "r1", 1), ("a", "r2", 1), *[("a", "r3", 1)] * 3, ("a", "r3", 146), ("a", "r3", 884)]
MORE = [(task_id, key, 900) for task_id, key in (("b", "r2"), ("c", "r2"), ("b", "r3"), ("b", "r1"))]


@example(LESS + MORE)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["r1", "r2", "r3"]), st.integers(1, 900)), max_size=60)
)
def test_the_store_keeps_its_bounds_and_the_newest_chunk_of_each_task(steps: list[tuple[str, str, int]]) -> None:
    store = ChunkStore(Bound(8000, share=0.5), max_chunks=5, max_bytes=3000)
    runs = {"r1": a_run("r1"), "r2": a_run("r2"), "r3": a_run("r3", "other")}
    newest: dict[tuple[str, str], str] = {}
    for task_id, key, size in steps:
        value = f"{len(newest)}{'x' * size}"
        newest[key, task_id] = value
        store.take(runs[key], streamed(task_id, 1, value))
        assert dict(store.usage._by_tenant) == kept_by(store, *runs.values())
    for (key, task_id), value in newest.items():
        stream = runs[key].chunks.streams[task_id]
        assert texts(stream.after(0, 100))[-1] == value
        assert len(stream) <= 5
    if store.usage.total > 8000:
        # Tenants that have less than the last one lost nothing to it.
        last = store.usage.of(runs[steps[-1][1]].run.tenant)
        full = [run for run in runs.values() if run.chunks and store.usage.of(run.run.tenant) >= last]
        assert not [stream for run in full for stream in run.chunks.streams.values() if len(stream) > 1]
    for run in runs.values():
        store.drop(run)
    assert store.usage.total == 0
    assert not store._streams


def test_idlest_task_loses_chunks_when_its_tenant_is_full() -> None:
    store = ChunkStore(Bound(20_000, share=0.5))
    old, new, other = a_run("old", "a"), a_run("new", "a"), a_run("other", "b")
    store.take(other, streamed("t", 1, *range(10)))
    store.take(old, streamed("t", 1, *range(20)))
    store.take(new, streamed("t", 1, *range(25)))
    assert [len(run.chunks.streams["t"]) for run in (old, new, other)] == [7, 25, 10]
    assert texts(old.chunks.streams["t"].after(0, 1)) == ["13"]


def test_a_stream_drops_earlier_chunks_when_a_later_attempt_starts() -> None:
    stream = TaskStream()
    assert stream.begin(2) == 0
    stream.append(Payload(JSON, "1"))
    assert stream.begin(3) < 0
    stream.append(Payload(JSON, "2"))
    assert [(c.sequence, c.attempt, c.index, c.payload is None) for c in stream.after(0, 9)] == [
        (2, 3, 0, True),
        (3, 3, 0, False),
    ]
    stream.begin(1)
    assert stream.attempt == 3


def test_a_task_is_read_with_its_items_and_without_others() -> None:
    async def scenario() -> None:
        store, run = ChunkStore(), a_run()
        for task_id in ("t", "t[0]", "t[1]", "t2", "t/spawned"):
            store.take(run, streamed(task_id, 1, 1))
        batches = [batch async for batch in log_of(run).follow("t", {"t[0]": 1}, lambda: True)]
        assert [task_id for batch in batches for task_id, _ in batch.chunks] == ["t", "t[1]"]

    asyncio.run(scenario())


def test_progress_is_the_newest_value_and_of_the_newest_attempt() -> None:
    async def scenario() -> None:
        store, run = ChunkStore(), a_run()
        over = False
        reader = log_of(run).follow("", {}, lambda: over)
        for done in (1.0, 2.0):
            store.take(run, TaskProgressed("r", "t", 1, done, 4.0))
        assert (await anext(reader)).progress == {"t": Progress(1, 2.0, 4.0)}
        store.note(run, started("t", 2))
        assert run.chunks.streams["t"].progress is None
        store.take(run, TaskProgressed("r", "t", 2, 1.0, None))
        assert (await anext(reader)).progress == {"t": Progress(2, 1.0, None)}
        over = True
        assert [batch async for batch in reader] == []

    asyncio.run(scenario())


def test_a_reader_that_waits_ends_with_the_run_and_a_chunk_after_the_end_is_dropped() -> None:
    async def scenario() -> None:
        store, run = ChunkStore(), a_run()
        reading = asyncio.create_task(anext(log_of(run).follow("", {}, lambda: run.log.is_complete), "over"))
        await asyncio.sleep(0)
        assert not reading.done()
        run.log.is_complete = True
        store.note(run, RunFinished(RunState.SUCCEEDED, None))
        assert await reading == "over"
        store.take(run, streamed("t", 1, 1))
        assert not run.chunks.streams
        assert store.usage.total == 0

    asyncio.run(scenario())


def test_readers_that_leave_are_forgotten() -> None:
    async def scenario() -> None:
        log = RunChunks()
        readers = [asyncio.create_task(anext(log.follow("", {}, lambda: False), None)) for _ in range(100)]
        await asyncio.sleep(0)
        assert len(log._waiting) == 100
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        assert not log._waiting
        assert log.readers == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("lag", [0, 1, 511, 512, 513, 2000])
def test_a_late_reader_gets_all_kept_chunks_in_batches(lag: int) -> None:
    async def scenario() -> None:
        store, run = ChunkStore(), a_run()
        store.take(run, streamed("t", 1, *range(2000)))
        found = [batch.chunks async for batch in log_of(run).follow("t", {"t": 2000 - lag}, lambda: True)]
        assert [chunk.sequence for batch in found for _, chunk in batch] == list(range(2001 - lag, 2001))
        assert all(len(batch) <= 512 for batch in found)

    asyncio.run(scenario())
