"""`python -m benchmarks.chaos`: runs of random graphs while workers and links die, and the cost for their callers.

Needs root: it builds a network of hosts (see `tests/e2e/net.py`). Every few seconds one of the machines loses its
worker's process, its power, its cable for a while, or is frozen for a while. The report counts lost or wrong runs,
tasks that were reported as completed twice, gaps in the events of readers, and the time until the attempts of a dead
machine ran again. Functions note each time they run to their end. The report counts functions that did so more than
once, on machines that could not be told to stop.
"""

import argparse
import asyncio
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lattice_client import AsyncLatticeClient, RunError, task
from tests.e2e.clusters import Cluster, cluster
from tests.e2e.net import Host

CPUS = 4
FAULTS = ("kill", "crash", "cut", "freeze", "leave")
AT_ONCE = 24
RESULT_S = 180.0
SLOWEST = 10


@task
def combine(name: str, seconds: float, parts: list[int], journal: str, run: str) -> int:
    import time
    import zlib

    time.sleep(seconds)
    with open(journal, "a") as file:
        file.write(f"{run} {name}\n")
    return zlib.crc32(f"{name}{parts}".encode())


@dataclass
class Report:
    """What happened; times in seconds."""

    executor: str = ""
    seconds: float = 0.0
    runs: int = 0
    tasks: int = 0
    lost_runs: int = 0
    wrong_results: int = 0
    double_completions: int = 0
    ran_more_than_once: int = 0
    gaps: int = 0
    retries_after_loss: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    detect_p50_s: float = math.nan
    detect_p99_s: float = math.nan
    recover_p50_s: float = math.nan
    recover_p99_s: float = math.nan
    slowest: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Chaos:
    """One cluster, its callers, and its troubles."""

    def __init__(self, found: Cluster, seed: int, journal: Path) -> None:
        self.cluster = found
        self.journal = journal
        self.rng = random.Random(seed)
        self.report = Report()
        self.faults: dict[str, list[tuple[float, str]]] = {}
        self.detections: list[tuple[float, str]] = []
        self.recoveries: list[float] = []
        self.is_over = threading.Event()
        self._workers: dict[str, subprocess.Popen[bytes]] = {}

    # Trouble.

    def trouble(self, every_s: float) -> None:
        """Befall one machine after the other, until it is over."""
        while not self.is_over.wait(self.rng.uniform(0.5, 1.5) * every_s):
            index = self.rng.randrange(len(self.cluster.machines))
            how = self.rng.choice(FAULTS)
            self.report.faults[how] = self.report.faults.get(how, 0) + 1
            try:
                self._befall(self.cluster.machines[index], f"m{index}", how)
            except Exception as error:
                # Without trouble there is nothing to report on.
                self.report.errors.append(f"no more trouble after {how} of m{index}: {error!r}"[:300])
                return

    def _befall(self, host: Host, node_id: str, how: str) -> None:
        if how != "leave":
            self.faults.setdefault(node_id, []).append((time.time(), how))
        match how:
            case "kill":
                self._workers[node_id].kill()
            case "crash":
                host.crash()
            case "cut":
                host.cut()
                self.is_over.wait(self.rng.uniform(0.2, 6.0))
                host.mend()
            case "freeze":
                host.signal_all(signal.SIGSTOP)
                self.is_over.wait(self.rng.uniform(0.2, 6.0))
                host.signal_all(signal.SIGCONT)
            case "leave":
                self._workers[node_id].terminate()
                self._workers[node_id].wait(RESULT_S)
        if how in {"kill", "crash", "leave"}:
            self.start_worker(host, node_id)

    def start_worker(self, host: Host, node_id: str) -> None:
        """Start the worker of a machine."""
        flags = ("--num-cpus", str(CPUS), "--drain-deadline", "1")
        command = ["start", "--worker", "--addr", self.cluster.address, "--node-id", node_id, *flags]
        self._workers[node_id] = host.lattice(*command, env=self.cluster.env, until="as node")

    # Callers.

    async def call(self, target: str, runs: int, seconds: float) -> None:
        """Start runs at an even pace and see them through."""
        limit = asyncio.Semaphore(AT_ONCE)
        async with AsyncLatticeClient(target) as client:
            started = time.monotonic()
            calls = []
            for number in range(runs):
                await asyncio.sleep(max(0.0, started + seconds * number / runs - time.monotonic()))
                await limit.acquire()
                call = asyncio.create_task(self._see_through(client, number))
                call.add_done_callback(lambda _: limit.release())
                calls.append(call)
            await asyncio.gather(*calls)
        self.report.seconds = time.monotonic() - started
        self.report.runs = runs

    async def _see_through(self, client: AsyncLatticeClient, number: int) -> None:
        rng = random.Random(number)
        workflow = client.create_workflow(f"chaos-{number}")
        made: list[Any] = []
        values: list[int] = []
        import zlib

        for index in range(rng.randint(3, 12)):
            sources = rng.sample(range(index), min(index, rng.randint(0, 3)))
            seconds = rng.choice([0.0, 0.001, 0.02, 0.1, 0.5])
            inputs = {"name": f"t{index}", "seconds": seconds, "parts": [made[s].output for s in sources]}
            inputs |= {"journal": str(self.journal), "run": str(number)}
            made.append(workflow.add_task(combine, inputs, f"t{index}"))
            values.append(zlib.crc32(f"t{index}{[values[s] for s in sources]}".encode()))
        self.report.tasks += len(made)
        try:
            async with asyncio.timeout(RESULT_S):
                run = await workflow.run()
                await self._follow(run, [made_task.task_id for made_task in made], values)
        except (RunError, TimeoutError) as error:
            self.report.lost_runs += 1
            self.report.errors.append(f"{type(error).__name__}: {error}"[:300])

    async def _follow(self, run: Any, task_ids: list[str], values: list[int]) -> None:
        last = 0
        ends: Counter[str] = Counter()
        results: dict[str, int] = {}
        starts: dict[str, tuple[str, float]] = {}
        lost_at: dict[str, float] = {}
        async for event in run.events():
            self.report.gaps += event.sequence != last + 1
            last = event.sequence
            match event.type:
                case "task_started":
                    starts[event.task_id] = (event.data["node_id"], event.time_s)
                    if (fault := lost_at.pop(event.task_id, None)) is not None:
                        self.recoveries.append(event.time_s - fault)
                case "task_retrying" if event.data["failure"]["kind"] == "WORKER_LOST":
                    self.report.retries_after_loss += 1
                    node_id, started = starts.get(event.task_id, ("", 0.0))
                    before = [(at, how) for at, how in self.faults.get(node_id, []) if at <= event.time_s]
                    if before and event.time_s - before[-1][0] < RESULT_S:
                        at, how = before[-1]
                        lost_at[event.task_id] = at
                        told = f"{how} of {node_id}, started {started - at:+.2f} s: {event.data['failure']['message']}"
                        self.detections.append((event.time_s - at, told))
                case "task_succeeded":
                    ends[event.task_id] += 1
                    results[event.task_id] = event.data["outputs"]["result"]
        self.report.double_completions += sum(count - 1 for count in ends.values())
        self.report.wrong_results += sum(results.get(t) != v for t, v in zip(task_ids, values, strict=True))
        await run.result()


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of the values lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else math.nan


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.chaos")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--every", type=float, default=3.0, metavar="S", help="seconds between faults")
    parser.add_argument("--executor", choices=["local", "ray"], default="local")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/chaos.json"))
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lattice-chaos-"))
    with cluster(folder, flags.executor, flags.machines) as found:
        chaos = Chaos(found, flags.seed, folder / "journal")
        chaos.report.executor = flags.executor
        for index, host in enumerate(found.machines):
            chaos.start_worker(host, f"m{index}")
        trouble = threading.Thread(target=chaos.trouble, args=(flags.every,))
        trouble.start()
        try:
            asyncio.run(chaos.call(found.target, flags.runs, flags.seconds))
        finally:
            chaos.is_over.set()
            trouble.join()
    report = chaos.report
    ran = Counter((folder / "journal").read_text().splitlines())
    report.ran_more_than_once = sum(times > 1 for times in ran.values())
    detections = [seconds for seconds, _ in chaos.detections]
    report.detect_p50_s = statistics.median(detections) if detections else math.nan
    report.detect_p99_s = percentile(detections, 0.99)
    report.slowest = [f"{seconds:.2f} s after {told}" for seconds, told in sorted(chaos.detections)[-SLOWEST:][::-1]]
    report.recover_p50_s = statistics.median(chaos.recoveries) if chaos.recoveries else math.nan
    report.recover_p99_s = percentile(chaos.recoveries, 0.99)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(asdict(report), indent=1))
    print(json.dumps(asdict(report), indent=1))
    if report.errors:
        sys.exit("something went wrong; see `errors`")


if __name__ == "__main__":
    main()
