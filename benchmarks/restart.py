"""`python -m benchmarks.restart`: measures a server that is killed and started again on its journal.

Three parts, each on a journal in SQLite:

- `start`: a server records a live run and one that has ended. Their records are copied under other ids, and the server
  is started on the journal: the time and its processor time until it answers, and until all runs are restored and
  their tasks in the scheduler. The same start on an empty journal is subtracted.
- `adoption`: agents run tasks while the server is killed; the share of the attempts that continue after its next start.
- `latency`: runs of one task that does nothing, on servers with and without a journal, which take turns.
"""

import argparse
import asyncio
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks import lattice_side
from benchmarks.journal import Waiting
from lattice_client import LatticeClient, UnavailableError, task
from lattice_server.engine.recording.journal_port import JournalReader, JournalRetention
from lattice_server.engine.recording.journal_records import EventRecorded, Record, RunAccepted, RunEnded, StoredRun
from lattice_server.journal.sqlite import SqliteSettings, open_sqlite

LATTICE = str(Path(sys.executable).parent / "lattice")
WAIT_S = 600.0
BATCH = 200
WARM_UP = 20


@task(exclude=lattice_side.APART)
async def asleep(seconds: float) -> float:
    """Wait."""
    await asyncio.sleep(seconds)
    return seconds


@task(exclude=lattice_side.APART, cpu=0)
async def idle(seconds: float) -> float:
    """Wait, without a processor."""
    await asyncio.sleep(seconds)
    return seconds


@dataclass(frozen=True)
class Started:
    """A start of a server: seconds until it answered, and until all tasks were queued; its processor time by then."""

    answer_s: float
    answer_cpu_s: float
    queued_s: float
    queued_cpu_s: float
    memory_bytes: int


class Head:
    """A server on one port, over several lives."""

    def __init__(self, journal: Path | None, cpus: int = 0) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        flags = ["--port", str(port), "--executor", "local", "--num-cpus", str(cpus)]
        recorded = ["--journal", "memory" if journal is None else str(journal)]
        self._command = [sys.executable, "-m", "lattice_server", "start", "--head", *flags, *recorded]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server; it may not answer yet."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        return self.process

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Stop the server."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def until_it_listens(self) -> None:
        """Wait until the port is open. The client waits longer from try to try, which would be measured too."""
        host, port = self.address.split(":")
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with suppress(OSError):
                socket.create_connection((host, int(port))).close()
                return
            time.sleep(0.002)
        raise TimeoutError("the server does not listen")

    def until_it_answers(self) -> None:
        """Wait for the first answer."""
        deadline = time.monotonic() + WAIT_S
        with LatticeClient(self.address) as client:
            while time.monotonic() < deadline:
                with suppress(UnavailableError):
                    client.server_info()
                    return
                time.sleep(0.01)
        raise TimeoutError("the server does not answer")


@contextmanager
def head(journal: Path | None, cpus: int = 0) -> Iterator[Head]:
    """Serve while the block runs."""
    found = Head(journal, cpus)
    found.start()
    try:
        found.until_it_answers()
        yield found
    finally:
        found.stop()


def timed_start(journal: Path, queued: int) -> Started:
    """Start a server, and kill it once so many tasks are queued."""
    found = Head(journal)
    begun = time.perf_counter()
    process = psutil.Process(found.start().pid)
    try:
        found.until_it_listens()
        with LatticeClient(found.address) as client:
            client.server_info()
            answer_s, answer_cpu_s = time.perf_counter() - begun, _cpu_s(process)
            client.list_runs(limit=1)  # Is answered when all live runs are restored.
            while client.server_info().queued_tasks < queued:
                time.sleep(0.01)
        queued_s, queued_cpu_s = time.perf_counter() - begun, _cpu_s(process)
        return Started(answer_s, answer_cpu_s, queued_s, queued_cpu_s, process.memory_info().rss)
    finally:
        found.kill()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def starts(folder: Path, runs: int, tasks: int, ended: int) -> None:
    """Measure the start of a server with so many live and ended runs."""
    empty, full = folder / "empty", folder / "full"
    _record(full, tasks)
    _copy(full, runs, ended)
    timed_start(empty, 0)
    base, found = timed_start(empty, 0), timed_start(full, runs * tasks // 10)
    print(f"{runs} live runs of {tasks} tasks, {ended} ended runs; {found.memory_bytes / 2**20:.0f} MiB of memory")
    print("| | time | of it, without the start of Python | processor time, without that |")
    print("|---|---|---|---|")
    for name, time_s, cpu_s in (
        ("first answer", found.answer_s, found.answer_cpu_s),
        ("all tasks queued", found.queued_s, found.queued_cpu_s),
    ):
        own_s, own_cpu_s = time_s - base.answer_s, cpu_s - base.answer_cpu_s
        print(f"| {name} | {time_s:.2f} s | {own_s:.2f} s | {own_cpu_s:.2f} s |")


def _record(folder: Path, tasks: int) -> None:
    """Record a live run of so many tasks, in chains of ten, and one that ended."""
    with head(folder, cpus=1) as served, LatticeClient(served.address) as client:
        lattice_side.one(client)
        # It has the only CPU, so that no task of the run starts.
        blocker = client.create_workflow()
        blocker.add_task(asleep, {"seconds": WAIT_S})
        first = blocker.run()
        next(event for event in first.events() if event.type == "task_started")
        workflow = client.create_workflow()
        last = None
        for index in range(tasks):
            value = last.output if last is not None and index % 10 else index
            last = workflow.add_task(lattice_side.noop, {"x": value})
        workflow.run()


def _copy(folder: Path, runs: int, ended: int) -> None:
    """Copy the recorded runs until there are so many."""
    waiting = Waiting()
    settings = SqliteSettings(retention=JournalRetention(runs=max(10_000, 2 * ended), kept_bytes=2**50))
    journal = open_sqlite(folder, waiting, settings)
    with journal.reader() as reader:
        (_, live), (old,) = reader.live_runs(), reader.ended_runs()
        samples = [(_records(reader, live), runs - 1), (_records(reader, old), ended - 1)]
    number = journal.last_run
    for records, count in samples:
        for index in range(count):
            number += 1
            commit = journal.append([_renumbered(record, number) for record in records])
            if index % BATCH == 0:
                waiting.wait(commit)
    journal.close()


def _records(reader: JournalReader, run: StoredRun) -> list[Record]:
    """Return the records of a run; its code is in the journal."""
    (definition,) = reader.definitions(run.run)
    texts = (run.tenant, run.run_id, run.accepted_s, run.fingerprint, run.request_id)
    found: list[Record] = [RunAccepted(run.run, *texts, reader.settings(run.run), definition)]
    found += [EventRecorded(run.run, e.sequence, e.body, e.replay) for e in reader.events(run.run)]
    return found if run.ended_s is None else [*found, RunEnded(run.run, run.ended_s, run.summary)]


def _renumbered(record: Record, number: int) -> Record:
    if isinstance(record, RunAccepted):
        return replace(record, run=number, run_id=f"copy-{number}")
    assert isinstance(record, EventRecorded | RunEnded)
    return replace(record, run=number)


def adoption(folder: Path, agents: int, tasks: int) -> None:
    """Measure which share of attempts continues when the server is killed and started again."""
    with head(folder / "adoption") as served, LatticeClient(served.address) as client:
        joined = [_agent(served.address, f"agent-{index}") for index in range(agents)]
        try:
            workflow = client.create_workflow()
            for _ in range(tasks):
                workflow.add_task(idle, {"seconds": 15.0})
            run = workflow.run()
            while client.server_info().running_attempts < tasks:
                time.sleep(0.05)
            served.kill()
            begun = time.perf_counter()
            served.start()
            served.until_it_answers()
            answer_s = time.perf_counter() - begun
            run.result(timeout=WAIT_S)
            lost = sum(event.type == "task_retrying" for event in run.events())
        finally:
            for agent in joined:
                agent.terminate()
            for agent in joined:
                agent.wait()
    share = 100 * (tasks - lost) / tasks
    print(f"adopted: {tasks - lost} of {tasks} attempts on {agents} agents ({share:.1f} %), down for {answer_s:.1f} s")


def _agent(address: str, node_id: str) -> subprocess.Popen[str]:
    flags = ["--addr", address, "--node-id", node_id, "--num-cpus", "2"]
    agent = subprocess.Popen([LATTICE, "start", "--worker", *flags], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    assert re.search(f"as node {node_id}", agent.stdout.readline())
    return agent


def latency(folder: Path, rounds: int) -> None:
    """Measure the time that a journal adds to a run of one task."""
    samples: dict[str, list[float]] = {"memory": [], "sqlite, full": []}
    with ExitStack() as stack:
        clients = {}
        for name, journal in zip(samples, (None, folder / "latency"), strict=True):
            served = stack.enter_context(head(journal, 2))
            clients[name] = stack.enter_context(LatticeClient(served.address))
        for index in range(rounds + WARM_UP):
            for name, client in clients.items():
                seconds = lattice_side.one(client)
                if index >= WARM_UP:
                    samples[name].append(seconds)
    for name, found in samples.items():
        centiles = statistics.quantiles(found, n=100)
        print(f"{name:12} p50 {centiles[49] * 1e3:.2f} ms, p90 {centiles[89] * 1e3:.2f} ms")


def main() -> None:
    """Measure all parts, or one."""
    parser = argparse.ArgumentParser(prog="benchmarks.restart")
    parser.add_argument("--only", choices=["start", "adoption", "latency"])
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--ended", type=int, default=10_000)
    parser.add_argument("--agents", type=int, default=2)
    parser.add_argument("--attempts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where the journals are written; by default a temporary folder")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lattice-restart-", dir=flags.folder) as name:
        folder = Path(name)
        if flags.only in (None, "start"):
            starts(folder, flags.runs, flags.tasks, flags.ended)
        if flags.only in (None, "adoption"):
            adoption(folder, flags.agents, flags.attempts)
        if flags.only in (None, "latency"):
            latency(folder, flags.rounds)


if __name__ == "__main__":
    main()
