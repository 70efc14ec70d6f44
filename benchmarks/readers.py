"""Measures 1,000 readers of the events of one run: `python -m benchmarks.readers`, on an idle machine.

The run is an agent of some rounds, whose tasks sleep. Runs with readers and runs without alternate. The readers are
streams of `WatchRun` in one process, over a few connections, which parses their messages after the run has ended.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import grpc
from lattice.v1 import results_pb2

from benchmarks.lattice_side import APART, work
from benchmarks.serving import served
from lattice_client import LatticeClient, Run, context, task

READERS = 1_000
CHANNELS = 4
ROUNDS = 5
THINK_S, TOOL_S, TOOLS = 0.05, 0.1, 3
GO = "go"
WAIT_S = 120.0
METHOD = "/lattice.v1.ResultsService/WatchRun"


@dataclass(slots=True)
class Seen:
    """The events that the readers of one run got.

    Attributes:
        opened_s: from the first call of all readers to the first event of the last one.
        told_s: from an event, while all readers wait, to its arrival at the last one.
        events: how many events the run has.
        messages: how many messages all readers got.
        is_whole: whether each reader got each event once, in order.
    """

    opened_s: float
    told_s: float
    events: int
    messages: int
    is_whole: bool


@dataclass(slots=True)
class Readings:
    """The measurements: of each run with readers, and the seconds of the runs with and without."""

    readers: int
    seen: list[Seen]
    with_s: list[float]
    without_s: list[float]

    def slowdown(self) -> float:
        """Return how much longer a run takes with readers, as a part of its time without."""
        return statistics.median(self.with_s) / statistics.median(self.without_s) - 1

    def samples(self) -> dict[str, list[float]]:
        """Return the samples by their names on the page. Raises RuntimeError when a reader missed an event."""
        if not all(seen.is_whole for seen in self.seen):
            raise RuntimeError("a reader did not get each event once and in order")
        return {
            "readers": [self.readers],
            "tasks": [1 + ROUNDS * (1 + TOOLS)],
            "opened_s": [seen.opened_s for seen in self.seen],
            "told_s": [seen.told_s for seen in self.seen],
            "with_s": self.with_s,
            "without_s": self.without_s,
        }


@task(exclude=APART)
def gate() -> None:
    """Wait until the readers are there."""
    context.wait_for(GO)


def measure(client: LatticeClient, address: str, rounds: int, readers: int = READERS) -> Readings:
    """Return the measurements of `rounds` runs with readers and as many without."""
    found = Readings(readers, [], [], [])
    for number in range(-1, rounds):  # round -1 warms up
        without_s = _timed(_waiting(client))
        run = _waiting(client)
        with _reading(address, run, readers) as process:
            with_s = _timed(run)
            seen = Seen(**json.loads(_line(process)))
        if number >= 0:
            found.without_s.append(without_s)
            found.with_s.append(with_s)
            found.seen.append(seen)
    return found


def measure_alone(cpus: int, rounds: int, readers: int = READERS) -> Readings:
    """As `measure`, on a server of its own."""
    with served("--executor", "local", "--num-cpus", str(cpus)) as (address, _), LatticeClient(address) as client:
        return measure(client, address, rounds, readers)


def _waiting(client: LatticeClient) -> Run:
    """Start a run of an agent, which waits for a signal before its first round."""
    workflow = client.create_workflow()
    last: Any = workflow.add_task(gate).output
    for _ in range(ROUNDS):
        thought = workflow.add_task(work, {"seconds": THINK_S, "after": last}).output
        last = [workflow.add_task(work, {"seconds": TOOL_S, "after": thought}).output for _ in range(TOOLS)]
    run = workflow.run()
    for event in run.events(timeout=WAIT_S):
        if event.type == "signal_awaited":
            break
    return run


def _timed(run: Run) -> float:
    started = time.perf_counter()
    run.signal(GO)
    run.result(timeout=WAIT_S)
    return time.perf_counter() - started


@contextmanager
def _reading(address: str, run: Run, readers: int) -> Iterator["subprocess.Popen[str]"]:
    """Start readers; the block begins when all of them have got what there is."""
    command = [sys.executable, "-m", "benchmarks.readers", "--read", address, str(run), "--readers", str(readers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        _line(process)
        yield process


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the readers ended with status {process.wait()}")
    return line


class Reader:
    """One reader: the messages it got, with their times."""

    def __init__(self) -> None:
        self.got: list[tuple[float, bytes]] = []
        self.has_first = asyncio.Event()

    async def read(self, channel: grpc.aio.Channel, request: bytes) -> None:
        """Read to the end of the run; messages are not parsed now."""
        call: Any = channel.unary_stream(METHOD)
        async for message in call(request):
            self.got.append((time.time(), message))
            self.has_first.set()


async def read(address: str, run_id: str, count: int) -> Seen:
    """Read one run with many readers; print a line when all of them have a first event."""
    channels = [grpc.aio.insecure_channel(address, [("lattice.channel", number)]) for number in range(CHANNELS)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    readers = [Reader() for _ in range(count)]
    request = results_pb2.WatchRunRequest(run_id=run_id).SerializeToString()
    started_s = time.time()
    reading = [
        asyncio.create_task(reader.read(channels[number % CHANNELS], request)) for number, reader in enumerate(readers)
    ]
    await asyncio.gather(*(reader.has_first.wait() for reader in readers))
    before = [len(reader.got) for reader in readers]
    print("ready", flush=True)
    await asyncio.gather(*reading)
    await asyncio.gather(*(channel.close() for channel in channels))
    return _seen(readers, started_s, before)


def _seen(readers: list[Reader], started_s: float, before: list[int]) -> Seen:
    parsed: dict[bytes, results_pb2.WatchRunResponse] = {}
    for reader in readers:
        for _, message in reader.got:
            if message not in parsed:
                parsed[message] = results_pb2.WatchRunResponse.FromString(message)
    numbers = [[event.sequence for _, message in reader.got for event in parsed[message].events] for reader in readers]
    events = max(map(len, numbers))
    told_s = []
    for reader, known in zip(readers, before, strict=True):
        arrived_s, message = reader.got[known]
        told_s.append(arrived_s - parsed[message].events[0].time.ToNanoseconds() / 1e9)
    return Seen(
        opened_s=max(reader.got[0][0] for reader in readers) - started_s,
        told_s=max(told_s),
        events=events,
        messages=sum(len(reader.got) for reader in readers),
        is_whole=all(found == [*range(1, events + 1)] for found in numbers),
    )


def main() -> None:
    """Measure and print, or read."""
    parser = argparse.ArgumentParser(prog="benchmarks.readers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--readers", type=int, default=READERS)
    parser.add_argument("--read", nargs=2, metavar=("ADDRESS", "RUN"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.read is not None:
        address, run_id = flags.read
        print(json.dumps(asdict(asyncio.run(read(address, run_id, flags.readers)))), flush=True)
        return
    found = measure_alone(os.cpu_count() or 4, flags.rounds, flags.readers)
    for seen, with_s, without_s in zip(found.seen, found.with_s, found.without_s, strict=True):
        print(f"{seen}; {with_s:.3f} s, without readers {without_s:.3f} s")
    print(f"{100 * found.slowdown():.1f} % slower")


if __name__ == "__main__":
    main()
