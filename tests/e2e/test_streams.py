"""Broken streams: between a reader and the head, and between a worker and the head."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lattice_client import AsyncLatticeClient, RunEvent, task
from lattice_server.app import App
from lattice_server.core.messages import SchedulerEvent
from lattice_server.engine.ports import Contact
from lattice_server.executors.processes import worker_command
from lattice_server.executors.worker_command import Offer, worker_flags
from tests.e2e.proxy import Gate, Proxy
from tests.server.apps import NoWorkers, serving

TIMEOUT_S = 60.0


@task
def walk_through(gate: str, journal: str, name: str) -> str:
    with open(journal, "ab", buffering=0) as file:
        file.write(f"{name}\n".encode())
    with open(gate, "rb", buffering=0) as file:
        file.read(1)
    return name


@task
def note(journal: str, name: str) -> str:
    with open(journal, "ab", buffering=0) as file:
        file.write(f"{name}\n".encode())
    return name


class Apart(NoWorkers):
    """An executor that keeps one worker of four CPUs behind a proxy. It never tells that a worker is gone."""

    name = "apart"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._environment: dict[str, str] = {}
        self._target = ""
        self.proxy: Proxy | None = None
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Start the proxy and the first worker."""
        self.proxy = Proxy(contact.target)
        self._target = await self.proxy.start()
        self._environment = {"LATTICE_PARENT_PID": str(os.getpid())}
        await self.start_worker()

    async def start_worker(self) -> None:
        """Start a worker; each has an id and a node of its own."""
        self._count += 1
        name = f"apart-{self._count}"
        offer, store = Offer(num_cpus=4), self._folder
        flags = worker_flags(offer, worker_id=name, node_id=name, store_directory=store, server=self._target)
        command = worker_command(self._target, flags)
        environment = {**os.environ, **self._environment}
        self.process = await asyncio.create_subprocess_exec(*command, env=environment)

    async def kill_worker(self) -> None:
        """Kill the worker as the kernel would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def stop(self) -> None:
        """End both."""
        assert self.process is not None
        assert self.proxy is not None
        if self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()
        await self.proxy.stop()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate for tasks."""
    made = Gate(tmp_path, "only")
    yield made
    made.open(1000)
    made.close()


@asynccontextmanager
async def connected(app: App) -> AsyncIterator[AsyncLatticeClient]:
    """A client of a server, for a while."""
    async with asyncio.timeout(TIMEOUT_S), AsyncLatticeClient(app.address) as client:
        yield client


def started(event: RunEvent) -> bool:
    return event.type == "task_started"


def numbers(events: list[RunEvent]) -> list[int]:
    return [event.sequence for event in events]


def dense(events: list[RunEvent]) -> list[int]:
    return list(range(1, len(events) + 1))


def of_type(events: list[RunEvent], kind: str) -> list[Any]:
    return [event for event in events if event.type == kind]


def test_a_reader_sees_every_event_once_over_any_number_of_cuts(gate: Gate, tmp_path: Path) -> None:
    journal = str(tmp_path / "journal")

    async def stay_away(proxy: Proxy, gate: Gate) -> None:
        await proxy.cut_and_refuse(2)
        gate.open()
        proxy.is_refusing = False

    async def scenario() -> None:
        async with serving() as app, connected(app) as client:
            proxy = Proxy(app.address)
            reader = AsyncLatticeClient(await proxy.start())
            workflow = client.create_workflow()
            last = "start"
            for _ in range(6):
                inputs = {"gate": gate.path, "journal": journal, "name": last}
                last = workflow.add_task(walk_through, inputs).output
            run = await workflow.run()
            events: list[RunEvent] = []
            async for event in reader.events(run):
                events.append(event)
                if not started(event):
                    continue
                if event.task_id == "walk_through-3":
                    # The reader dials while it reads, so a separate task opens the proxy again.
                    away = asyncio.create_task(stay_away(proxy, gate))
                else:
                    proxy.cut()
                    gate.open()
            await away
            await reader.close()
            await proxy.stop()
            assert numbers(events) == dense(events)
            assert len(of_type(events, "task_succeeded")) == 6
            assert events == [event async for event in client.events(run)]
            assert proxy.accepted >= 6

    asyncio.run(scenario())


def test_a_worker_continues_its_attempts_when_it_reconnects(gate: Gate, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    names = [f"t{number}" for number in range(8)]

    async def scenario() -> None:
        apart = Apart(tmp_path)
        async with serving(apart, session_ttl_s=TIMEOUT_S) as app, connected(app) as client:
            assert apart.proxy is not None
            workflow = client.create_workflow()
            for name in names:
                workflow.add_task(walk_through, {"gate": gate.path, "journal": str(journal), "name": name})
            run = await workflow.run()
            events: list[RunEvent] = []
            async for event in run.events():
                events.append(event)
                match len(of_type(events, "task_started")) if started(event) else 0:
                    case 4:  # All CPUs are taken: one cut while they work on, then some end while the head is away.
                        apart.proxy.cut()
                        await apart.proxy.cut_and_refuse(2)
                        gate.open(3)
                        apart.proxy.is_refusing = False
                    case 7:
                        apart.proxy.cut()
                        gate.open(5)
            assert sorted(e.data["outputs"]["result"] for e in of_type(events, "task_succeeded")) == names
            assert {e.data["attempt"] for e in of_type(events, "task_succeeded")} == {1}
            assert not of_type(events, "task_retrying")
            assert numbers(events) == dense(events)

    asyncio.run(scenario())
    assert set(journal.read_text().split()) == set(names)


def test_short_work_survives_cuts_at_any_moment(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    names = [f"t{number:03}" for number in range(400)]

    async def scenario() -> None:
        apart = Apart(tmp_path)
        async with serving(apart, session_ttl_s=TIMEOUT_S) as app, connected(app) as client:
            assert apart.proxy is not None
            workflow = client.create_workflow()
            for name in names:
                workflow.add_task(note, {"journal": str(journal), "name": name})
            run = await workflow.run()
            events: list[RunEvent] = []
            async for event in run.events():
                events.append(event)
                if len(events) % 100 == 0:
                    apart.proxy.cut()
            assert sorted(e.data["outputs"]["result"] for e in of_type(events, "task_succeeded")) == names
            assert {e.data["attempt"] for e in of_type(events, "task_succeeded")} == {1}
            assert not of_type(events, "task_retrying")
            assert numbers(events) == dense(events)

    asyncio.run(scenario())
    assert set(journal.read_text().split()) == set(names)


def test_another_worker_runs_the_attempts_when_one_does_not_reconnect(gate: Gate, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    names = ["a", "b"]

    async def scenario() -> None:
        apart = Apart(tmp_path)
        async with serving(apart, session_ttl_s=2.0) as app, connected(app) as client:
            workflow = client.create_workflow()
            for name in names:
                workflow.add_task(walk_through, {"gate": gate.path, "journal": str(journal), "name": name})
            run = await workflow.run()
            events: list[RunEvent] = []
            async for event in run.events():
                events.append(event)
                match len(of_type(events, "task_started")) if started(event) else 0:
                    case 2:
                        await apart.kill_worker()
                        await apart.start_worker()
                    # The worker had two, so each runs alone on a worker now: the second after the first.
                    case 3:
                        gate.open(2)
            lost = of_type(events, "task_retrying")
            assert {e.task_id: e.data["failure"]["kind"] for e in lost} == {
                "walk_through": "WORKER_LOST",
                "walk_through-2": "WORKER_LOST",
            }
            assert [e.data["attempt"] for e in of_type(events, "task_succeeded")] == [2, 2]
            assert {e.data["node_id"] for e in of_type(events, "task_started")} == {"apart-1", "apart-2"}
            assert await run.status() == "succeeded"

    asyncio.run(scenario())
    assert set(journal.read_text().split()) == {"a", "b"}


def test_a_killed_worker_is_replaced_by_the_local_executor(gate: Gate, tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        async with serving() as app, connected(app) as client:
            workflow = client.create_workflow()
            workflow.add_task(walk_through, {"gate": gate.path, "journal": str(journal), "name": "a"})
            run = await workflow.run()
            attempts: list[tuple[str, int]] = []
            async for event in run.events():
                attempts.append((event.type, event.data.get("attempt", 0)))
                if attempts[-1] == ("task_started", 1):
                    (node,) = await client.nodes()
                    os.kill(node.worker_pid, signal.SIGKILL)
                elif started(event):
                    gate.open()
            assert attempts == [
                ("run_started", 0),
                ("task_started", 1),
                ("task_retrying", 1),
                ("task_started", 2),
                ("task_succeeded", 2),
                ("run_finished", 0),
            ]

    asyncio.run(scenario())


def test_events_arrive_while_the_run_is_running(gate: Gate, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving() as app, connected(app) as client:
            workflow = client.create_workflow()
            inputs = {"gate": gate.path, "journal": str(tmp_path / "journal"), "name": "a"}
            workflow.add_task(walk_through, inputs)
            run = await workflow.run()
            seen = []
            async for event in run.events():
                seen.append((event.type, await run.status()))
                if started(event):
                    gate.open()
            assert seen[:2] == [("run_started", "running"), ("task_started", "running")]

    asyncio.run(scenario())


def test_fifty_readers_of_one_run_all_see_all_of_it(gate: Gate, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving() as app, connected(app) as client:
            workflow = client.create_workflow()
            last = "start"
            for _ in range(20):
                inputs = {"gate": gate.path, "journal": str(tmp_path / "journal"), "name": last}
                last = workflow.add_task(walk_through, inputs).output
            run = await workflow.run()

            async def read() -> list[int]:
                return [event.sequence async for event in run.events()]

            readers = []
            async for event in run.events():
                # They come all along the run, one leaves, and the last come after its end.
                readers.append(asyncio.create_task(read()))
                if event.sequence == 5:
                    readers.pop(0).cancel()
                if started(event):
                    gate.open()
            last_sequence = event.sequence
            readers += [asyncio.create_task(read()) for _ in range(50 - len(readers))]
            assert await asyncio.gather(*readers) == [list(range(1, last_sequence + 1))] * len(readers)
            assert len(readers) >= 50 - 1

    asyncio.run(scenario())
