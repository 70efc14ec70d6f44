"""Measures the processor time that metrics and traces cost: `python -m benchmarks.telemetry_cost [no-ops]`.

One server has telemetry switched on and off, in many short rounds. In a round it does the same number of tasks
that do nothing in each mode, in an order by chance. The cost of a mode is the processor time of all processes (the
server, its agent, its runners, and the client) less that without telemetry in the same round. Printed is the median
over the rounds, with its confidence interval of 95 %, and the same for two modes that both are without telemetry.

It has to be one server: two equal servers differ by more than the cost of telemetry, for as long as they run. Other
programs slow all modes of a round alike, and a round that they disturb does not move a median, so the machine need not
be idle. The stream of the agent has the layer that counts its messages in all modes; its cost is measured by itself.
"""

import asyncio
import contextlib
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.request import urlopen

import grpc
import psutil
import uvloop

from lattice_client import LatticeClient, task
from lattice_server.app import App
from lattice_server.config import ServerConfig
from lattice_server.telemetry.rpc_meter import RpcMeter

MODES = {"none": "", "none again": "", "metrics": "metrics", "traces": "traces"}
NO_OPS = 10_000
WARM_ROUNDS, LEAST_ROUNDS = 3, 10
SCRAPES = 20
MESSAGES = 20_000
# The processor time of other processes is read by clocks; this many bits of their ids say whose, and of what kind.
KIND_BITS, ALL_THREADS = 3, 2


@task
def nothing(x: int) -> int:
    """Return the input."""
    return x


def cpu_ns(pid: int) -> int:
    """Return the processor time of a process, also of its ended threads; see `clock_getcpuclockid`. Raises OSError."""
    return time.clock_gettime_ns(~pid << KIND_BITS | ALL_THREADS)


# The server.


def serve() -> None:
    """Serve with the telemetry that the last line of stdin names, to the end of stdin."""
    uvloop.run(_serve())


async def _serve() -> None:
    app = App(ServerConfig(port=0, executor="local", num_cpus=2, metrics="prometheus", traces="otlp"))
    await app.start()
    try:
        await app.ready()
        switch = _Switch(app)
        print(app.address, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            await switch.select(line.strip())
            print("turned", flush=True)
    finally:
        await app.stop()


class _Switch:
    """Connects and disconnects the observers of a server that has all of them."""

    def __init__(self, app: App) -> None:
        engine, metrics, tracing = app._engine, app._metrics, app._tracing
        assert metrics is not None
        assert tracing is not None
        assert tracing._spans is not None
        self._observers, self._scheduler = engine.orchestrator.observers, engine.scheduler
        self._of_metrics, self._of_traces = metrics.runs, tracing.runs
        self._note_pass = self._scheduler.on_pass
        self._provider = tracing._spans.provider
        self._interceptors: dict[str, list[Any]] = {"metrics": [metrics.calls], "traces": tracing.interceptors}
        self._intercept = {one: one.intercept_service for found in self._interceptors.values() for one in found}

    async def select(self, named: str) -> None:
        """Switch one kind of telemetry on, and the others off. Spans of the mode before are exported first."""
        await asyncio.to_thread(self._provider.force_flush)
        observers = {"metrics": self._of_metrics, "traces": self._of_traces}
        self._observers[:] = [observer for name, observer in observers.items() if name == named]
        self._scheduler.on_pass = self._note_pass if named == "metrics" else None
        for name, interceptors in self._interceptors.items():
            for one in interceptors:
                one.intercept_service = self._intercept[one] if name == named else _pass


async def _pass(continuation: Any, handler_call_details: Any) -> Any:
    return await continuation(handler_call_details)


def receive() -> None:
    """Receive the exports of OTLP and drop them, until this process ends. Its processor time is not counted."""
    method = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    server = grpc.server(ThreadPoolExecutor(2))
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Export": method})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


# The measurement.


class Measured:
    """A server in a process of its own, and a client for each mode: a client keeps the stream that it opened in it."""

    def __init__(self, process: "subprocess.Popen[str]", address: str, open_: ExitStack) -> None:
        self._process = process
        self._clients = {mode: open_.enter_context(LatticeClient(address)) for mode in MODES}

    def cost_us(self, mode: str, work: Callable[[LatticeClient, int], None], tasks: int) -> tuple[float, float] | None:
        """Return the processor time of a task, of the server and of all processes, in microseconds.

        None when processes began or ended meanwhile.
        """
        self._turn(mode)
        server, pids = self._process.pid, self._pids()
        with contextlib.suppress(OSError):
            before = {pid: cpu_ns(pid) for pid in pids}
            work(self._clients[mode], tasks)
            self._turn(mode)
            spent = {pid: cpu_ns(pid) - before[pid] for pid in pids}
            if self._pids() == pids:
                return spent[server] / tasks / 1000, sum(spent.values()) / tasks / 1000
        return None

    def scrape_ms(self) -> float:
        """Return the processor time of the server for one read of its metrics, in milliseconds."""
        url, before = self._clients["none"].server_info().metrics_url, cpu_ns(self._process.pid)
        for _ in range(SCRAPES):
            with urlopen(url) as response:
                response.read()
        return (cpu_ns(self._process.pid) - before) / SCRAPES / 1e6

    def _pids(self) -> set[int]:
        children = psutil.Process(self._process.pid).children(recursive=True)
        return {os.getpid(), self._process.pid, *(child.pid for child in children)}

    def _turn(self, mode: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{MODES[mode]}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "turned\n"


@contextmanager
def started(function: str, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Run a function of this module in a process while the block runs; yield the process, and its address."""
    command = [sys.executable, "-c", f"from benchmarks.telemetry_cost import {function}; {function}()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env={**os.environ, **environment}, **pipes) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
            assert found is not None
            yield process, found.group()
        finally:
            process.terminate()


def runs(client: LatticeClient, tasks: int) -> None:
    """Run tasks one by one."""
    for index in range(tasks):
        client.run_task(nothing, {"x": index})


def graph(client: LatticeClient, tasks: int) -> None:
    """Run tasks as one graph."""
    workflow = client.create_workflow("cost")
    for index in range(tasks):
        workflow.add_task(nothing, {"x": index}, f"t{index}")
    workflow.run().result(timeout=300)


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of at least 10 values, and the confidence interval of 95 % around it, by order statistics."""
    ordered = sorted(values)
    # How many values are below the true median is binomial: half of them, with a deviation of half the square root.
    rank = max(1, int((len(ordered) - 1.96 * len(ordered) ** 0.5) / 2))
    return statistics.median(ordered), ordered[rank - 1], ordered[-rank]


def layer_us() -> float:
    """Return the processor time of the layer that counts the messages of a stream, for a message, in microseconds."""

    async def echo(requests: AsyncIterator[int], context: object) -> AsyncIterator[int]:
        async for request in requests:
            yield request

    async def messages() -> AsyncIterator[int]:
        for number in range(MESSAGES):
            yield number

    class Context:
        def code(self) -> None:
            """Return no code: the handler has set none."""

        async def write(self, response: int) -> None:
            """Take a response."""

    async def plain(requests: AsyncIterator[int], context: Context) -> None:
        async for response in echo(requests, context):
            await context.write(response)

    async def time_of(handler: Any) -> float:
        begun = time.thread_time()
        await handler(messages(), Context())
        return time.thread_time() - begun

    async def both() -> float:
        meter = RpcMeter()
        layer = meter._writing(echo, meter._stream("echo"), reads=True)
        return statistics.median([await time_of(layer) - await time_of(plain) for _ in range(LEAST_ROUNDS)])

    return asyncio.run(both()) / MESSAGES / 2 * 1e6


def main() -> None:
    """Measure and print."""
    no_ops = int(sys.argv[1]) if len(sys.argv) > 1 else NO_OPS
    with ExitStack() as stack:
        _, receiver = stack.enter_context(started("receive"))
        served = stack.enter_context(started("serve", OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{receiver}"))
        measured = Measured(*served, stack)
        # Traces are exported at each switch, so that short rounds would measure the exporter's calls.
        measure(measured, runs, 20, no_ops, ["none", "none again", "metrics"])
        measure(measured, runs, 250, no_ops, ["none", "none again", "traces"])
        measure(measured, graph, 500, no_ops, list(MODES))
        print(f"layer of a stream: {layer_us():.2f} µs a message")
        print(f"one read of the metrics: {measured.scrape_ms():.1f} ms of the server")


def measure(
    measured: Measured, work: Callable[[LatticeClient, int], None], tasks: int, no_ops: int, modes: list[str]
) -> None:
    """Measure the cost of modes in rounds of a number of tasks, and print it."""
    rounds = []
    for number in range(max(LEAST_ROUNDS, no_ops // tasks) + WARM_ROUNDS):
        order = random.sample(modes, len(modes))
        found = {mode: measured.cost_us(mode, work, tasks) for mode in order}
        complete = {mode: cost for mode, cost in found.items() if cost is not None}
        if number >= WARM_ROUNDS and len(complete) == len(modes):
            rounds.append(complete)
    name = work.__name__
    server, everyone = (statistics.median(found["none"][which] for found in rounds) for which in (0, 1))
    print(f"{name}: {everyone:.0f} µs a task without telemetry, {server:.0f} of them the server's")
    for mode in modes[1:]:
        for which, where in enumerate(("server", "all processes")):
            middle, low, high = median_with_interval([found[mode][which] - found["none"][which] for found in rounds])
            print(f"{name}: {mode:10} {where:13} {middle:+6.1f} µs a task ({low:+.1f} to {high:+.1f})")
    print(f"{name}: {len(rounds)} rounds of {tasks} tasks a mode", flush=True)


if __name__ == "__main__":
    main()
