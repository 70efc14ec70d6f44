"""Artifacts that no report names: none is left when a task fails, or a process or a worker dies."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from lattice.v1 import artifact_pb2, artifact_pb2_grpc, errors_pb2, payload_pb2, worker_pb2

from lattice_worker import cli, context
from lattice_worker.store.artifact_staging import ArtifactStaging
from lattice_worker.store.local_store import LocalStore
from tests.e2e.proxy import Gate
from tests.worker.head import LIMIT_BYTES, TIMEOUT_S, Pair, Stream, pair
from tests.worker.shared import SharedWorker

pytestmark = pytest.mark.slow

LARGE = 2 * LIMIT_BYTES


def play(scenario: Callable[[Pair], Coroutine[Any, Any, None]], folder: Path | None, *flags: str) -> None:
    """Play a scenario with a worker."""

    async def scene() -> None:
        async with pair(folder, *flags) as both, asyncio.timeout(TIMEOUT_S):
            await scenario(both)

    asyncio.run(scene())


def files(folder: Path) -> list[str]:
    # Unlike `rglob`, this passes over folders that are deleted meanwhile.
    return sorted(name for _, _, names in os.walk(folder) for name in names)


async def made(stream: Stream, lease_id: str = "made") -> str:
    """Have a large value made; return its name."""
    stream.assign(lease_id, lambda size: "x" * size, inputs={"size": LARGE})
    report = await stream.end(lease_id)
    return report.succeeded.outputs["out"].artifact.artifact_id


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


async def settled(stream: Stream, last: str = "last") -> None:
    """Wait until the worker has handled all earlier messages."""
    stream.assign(last, lambda: None)
    await stream.end(last)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder for large values and nothing else."""
    made = tmp_path / "store"
    made.mkdir()
    return made


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate for attempts."""
    made = Gate(tmp_path, "only")
    yield made
    made.open(100)
    made.close()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("how", ["fails", "dies", "is stopped"])
def test_an_attempt_that_does_not_succeed_leaves_none_of_its_large_values(
    how: str, is_async: bool, gate: Gate, worker: SharedWorker
) -> None:
    class Odd:
        def __init__(self, how: str, path: str) -> None:
            self.how, self.path = how, path

        def __reduce__(self) -> Any:
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "is stopped":
                with open(self.path, "rb", buffering=0) as file:
                    file.read(1)
            raise ValueError("odd")

    class Many:
        def __init__(self, how: str, path: str, size: int) -> None:
            self.how, self.path, self.size = how, path, size

        def __iter__(self) -> Any:
            yield "x" * self.size
            yield Odd(self.how, self.path)

    async def scenario(both: Pair) -> None:
        function: Any = Many
        inputs = {"how": how, "path": gate.path, "size": LARGE}
        both.stream.assign("a", function, split_outputs=["out"], is_async=is_async, inputs=inputs)
        if how == "is stopped":
            await until(lambda: bool(files(worker.folder)))
            both.stream.say(stop_lease_ids=["a"])
        assert (await both.stream.end("a")).WhichOneof("fact") == "failed"
        await until(lambda: not files(worker.folder))

    worker.play(scenario)


def test_of_a_batch_the_large_values_of_members_that_succeed_are_kept(worker: SharedWorker) -> None:
    class Many:
        def __init__(self, size: int, last: Any) -> None:
            self.size, self.last = size, last

        def __reduce__(self) -> Any:
            return (str, ("small",))

        def __iter__(self) -> Any:
            yield "x" * self.size
            yield self.last

    def each(size: list[int]) -> Any:
        return [Many(size[0], "fine"), Many(size[1], (number for number in ()))]

    async def scenario(both: Pair) -> None:
        binding = payload_pb2.Binding(payload=payload_pb2.Payload(json=str(LARGE)))
        attempts = [worker_pb2.Attempt(run_id="r", task_id=name, number=1, inputs={"size": binding}) for name in "ab"]
        both.stream.assign("both", each, batched=True, attempts=attempts, split_outputs=["out"])
        first, second = [await both.stream.end("both") for _ in range(2)]
        assert second.failed.failure.kind == errors_pb2.FAILURE_KIND_PAYLOAD
        assert files(worker.folder) == [first.succeeded.split["out"].items[0].artifact.artifact_id] * 2

    worker.play(scenario)


def test_a_spawn_that_cannot_be_sent_leaves_none_of_its_large_values(worker: SharedWorker) -> None:
    def spawn(size: int) -> str:
        try:
            context.spawn(len, {"first": "x" * size, "second": (number for number in ())})
        except Exception as error:
            return type(error).__name__
        return "sent"

    async def scenario(both: Pair) -> None:
        both.stream.assign("a", spawn, inputs={"size": LARGE})
        assert await both.stream.value("a") == "PayloadError"
        assert not files(worker.folder)

    worker.play(scenario)


def test_a_large_value_is_there_until_it_is_dropped_and_nothing_is_left_then(worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("spawn", lambda size: context.spawn(len, {"it": "x" * size}).task_id, inputs={"size": LARGE})
        spawned = (await stream.until("spawn", "spawned")).spawned.tasks[0].inputs["it"].payload.artifact.artifact_id
        await stream.end("spawn")
        name = await made(stream)
        stream.say(acknowledged_sequence=stream.reports[-1].sequence)
        await settled(stream)
        assert files(worker.folder) == sorted([name, spawned])
        assert (worker.folder / name).stat().st_size == LARGE + 2
        stream.say(drop_artifact_ids=[name, spawned])
        await settled(stream, "after")
        assert not files(worker.folder)

    worker.play(scenario)


@pytest.mark.parametrize("resumed", [True, False])
def test_a_worker_says_which_large_values_the_head_may_not_know_of(resumed: bool, gate: Gate) -> None:
    def wait(gate: str, size: int) -> str:
        with open(gate, "rb", buffering=0) as file:
            file.read(1)
        return "x" * size

    def there(name: str) -> bool:
        return any(Path(cli.SHARED_MEMORY).glob(f"lattice-worker-*/{name}"))

    def beside(name: str) -> list[Path]:
        return list(next(Path(cli.SHARED_MEMORY).glob(f"lattice-worker-*/{name}")).parent.glob("?" * 32))

    async def scenario(both: Pair) -> None:
        first = both.stream
        known, dropped = await made(first, "known"), await made(first, "dropped")
        first.say(acknowledged_sequence=first.reports[-1].sequence)
        unsaid = await made(first, "unsaid")
        first.assign("late", type(wait)(wait.__code__, {"open": open}), inputs={"gate": gate.path, "size": LARGE})
        await first.until("late", "started")
        first.drop()
        second, hello = await both.head.dialled()
        assert set(hello.stored_artifact_ids) == {known, dropped}
        assert list(hello.reported_artifact_ids) == [unsaid]
        gate.open()
        await until(lambda: len(beside(known)) == 4)
        second.welcome("s1" if resumed else "s2", resumed, drop_artifacts=(dropped,))
        if resumed:
            late = (await second.end("late")).succeeded.outputs["out"].artifact.artifact_id
        await settled(second)
        assert (there(known), there(unsaid), there(dropped)) == (True, True, False)
        assert len(beside(known)) == (3 if resumed else 2), "what was made since the hello is unknown to the head"
        if resumed:
            assert there(late)

    play(scenario, None)


def test_the_next_worker_names_reported_artifacts_when_a_worker_was_killed(gate: Gate, store: Path) -> None:
    async def scenario(both: Pair) -> None:
        name = await made(both.stream)
        both.process.kill()
        await both.process.wait()
        async with pair(store) as after:
            assert list(after.hello.reported_artifact_ids) == [name]
            await settled(after.stream)
            after.stream.drop()
            stream, hello = await after.head.dialled()
            assert not hello.reported_artifact_ids, "the head has judged it"
            stream.welcome(resumed=True)
            assert files(store) == [name]

    play(scenario, store)


class Sender(artifact_pb2_grpc.ArtifactServiceServicer):
    """Sends large values in two parts, the second when it is told to."""

    def __init__(self) -> None:
        self.is_asked, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def ReadArtifact(
        self, request: artifact_pb2.ReadArtifactRequest, context: Any
    ) -> AsyncIterator[artifact_pb2.ReadArtifactResponse]:
        """Send one."""
        yield artifact_pb2.ReadArtifactResponse(data=b"x")
        self.is_asked.set()
        await self.may_go_on.wait()
        yield artifact_pb2.ReadArtifactResponse(data=b"y")


@pytest.mark.parametrize("is_dropped", [True, False])
def test_an_artifact_is_deleted_on_arrival_when_it_was_dropped_in_transfer(is_dropped: bool, store: Path) -> None:
    async def scenario() -> None:
        sender, server = Sender(), grpc.aio.server()
        artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(sender, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        staging = ArtifactStaging(str(store))
        artifact = payload_pb2.Artifact(artifact_id="0" * 32, size_bytes=2, node_id="other")
        payload = payload_pb2.Binding(payload=payload_pb2.Payload(artifact=artifact))
        assignment = worker_pb2.Assignment(attempts=[worker_pb2.Attempt(inputs={"x": payload})])
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = artifact_pb2_grpc.ArtifactServiceStub(channel)
            with staging.opened():
                local_store = LocalStore(str(store), "n", staging, lambda: stub)
                (fetch,) = local_store.missing("", assignment, {})
                await sender.is_asked.wait()
                assert local_store.stored() == [artifact.artifact_id]
                if is_dropped:
                    local_store.drop([artifact.artifact_id])
                sender.may_go_on.set()
                await fetch
                assert files(store) == [artifact.artifact_id] * (not is_dropped)
        await server.stop(None)

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
