"""`python -m benchmarks.beside`: how long no-ops take while another caller submits very many tasks.

Sixteen callers run no-ops, first alone and then beside one that submits runs of 50,000 tasks each. The server tells
what held it up longest.
"""

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.figures import percentile

CALLERS, PROCESSES = 16, 4
PAUSE_S = 0.1
PROBE_S = 0.002


def main() -> None:
    """Run one of the processes, or all of them."""
    parser = argparse.ArgumentParser(prog="benchmarks.beside")
    parser.add_argument("role", nargs="?", default="all", choices=["all", "server", "callers", "submitter"])
    parser.add_argument("--address", default="")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=50_000)
    parser.add_argument("--shape", default="flat", choices=["flat", "chains", "fan"])
    parser.add_argument("--alone", type=float, default=10.0, help="seconds")
    parser.add_argument("--after", type=float, default=2.0, help="seconds from one run to the next")
    parser.add_argument("--cancel", action="store_true", help="cancel each run once it was accepted")
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    match flags.role:
        case "server":
            uvloop.run(_serve())
        case "callers":
            _call(flags.address)
        case "submitter":
            _submit(flags)
        case _:
            _measure(flags)


# The server, with probes.


class Probe:
    """The longest steps of the server's threads since the last reading, in seconds of processor time, so that other
    programs do not count.

    `rounds` are those of the event loop, `steps` the events and ticks of the scheduler's thread, `collections` those of
    cyclic garbage in either.
    """

    def __init__(self) -> None:
        self._rounds: list[float] = []
        self._steps: list[float] = []
        self._collections: list[float] = []
        self._began = 0.0
        gc.callbacks.append(self._collect)

    async def watch(self) -> None:
        """Note how long the event loop works before it comes to a timer that is due."""
        while True:
            before = time.thread_time()
            await asyncio.sleep(PROBE_S)
            self._rounds.append(time.thread_time() - before)

    def timed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that notes how long it takes."""

        def run(*args: Any) -> Any:
            before = time.thread_time()
            try:
                return step(*args)
            finally:
                self._steps.append(time.thread_time() - before)

        return run

    def take(self) -> dict[str, Any]:
        """Return the noted times in milliseconds, and reset them."""
        found = {}
        for name in ("_rounds", "_steps", "_collections"):
            values = sorted(getattr(self, name), reverse=True)
            setattr(self, name, [])
            found[name[1:]] = {
                "longest": [round(1e3 * value, 1) for value in values[:5]],
                "p99": round(1e3 * percentile(values, 0.99), 2) if values else 0.0,
                "count": len(values),
            }
        return found

    def _collect(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self._collections.append(time.thread_time() - self._began)


async def _serve() -> None:
    from lattice_server.app import App
    from lattice_server.config import ServerConfig
    from lattice_server.core.scheduling.scheduler import Scheduler

    probe = Probe()
    Scheduler.take = probe.timed(Scheduler.take)  # type: ignore[method-assign]
    Scheduler.tick = probe.timed(Scheduler.tick)  # type: ignore[method-assign]
    app = App(ServerConfig(port=0, executor="local", num_cpus=2))
    await app.start()
    await app.ready()
    watching = asyncio.create_task(probe.watch())
    print(f"ready {app.address}", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(f"probe {json.dumps(probe.take())}", flush=True)
    watching.cancel()
    await app.stop()


# The callers.


def _call(address: str) -> None:
    """Run no-ops with some threads until a line comes; say how long each took."""
    from benchmarks.lattice_side import noop
    from lattice_client import LatticeClient

    taken: list[list[float]] = [[] for _ in range(CALLERS // PROCESSES)]
    stopping = threading.Event()

    def run(found: list[float]) -> None:
        with LatticeClient(address, tenant=f"caller-{id(found)}") as client:
            client.run_task(noop, {"x": 1})
            while not stopping.wait(PAUSE_S):
                before = time.perf_counter()
                client.run_task(noop, {"x": 1})
                found.append(time.perf_counter() - before)

    threads = [threading.Thread(target=run, args=(found,)) for found in taken]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    while sys.stdin.readline():
        found = [seconds for one in taken for seconds in one[:]]
        for one in taken:
            one.clear()
        print(f"taken {json.dumps(found)}", flush=True)
    stopping.set()
    for thread in threads:
        thread.join()


def _submit(flags: argparse.Namespace) -> None:
    """Submit runs, one after the other; say how long each took to be accepted."""
    from benchmarks.lattice_side import noop
    from lattice_client import LatticeClient

    with LatticeClient(flags.address, tenant="crowd") as client:
        print("ready", flush=True)
        for number in range(flags.runs):
            workflow = client.create_workflow(f"crowd-{number}")
            last = workflow.add_task(noop, {"x": 1})
            first = last
            for place in range(flags.tasks - 1):
                if flags.shape == "fan":
                    workflow.add_task(noop, {"x": first.output})
                elif flags.shape == "chains" and place % 10:
                    last = workflow.add_task(noop, {"x": last.output})
                else:
                    last = workflow.add_task(noop, {"x": 1})
            sys.stdin.readline()
            before = time.perf_counter()
            run = workflow.run()
            print(f"accepted {time.perf_counter() - before:.3f}", flush=True)
            if flags.cancel:
                run.cancel()
        print("done", flush=True)


# All of it.


def _start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.beside", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _said(process: "subprocess.Popen[str]", word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise RuntimeError(f"a process ended with status {process.wait()} before it said {word!r}")


def _asked(process: "subprocess.Popen[str]", word: str) -> Any:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(_said(process, word))


def _measure(flags: argparse.Namespace) -> None:
    server = _start("server")
    started = [server]
    try:
        address = _said(server, "ready")
        callers = [_start("callers", "--address", address) for _ in range(PROCESSES)]
        started += callers
        for caller in callers:
            _said(caller, "ready")
        time.sleep(3.0)
        found: dict[str, Any] = {}
        _phase(server, callers)
        time.sleep(flags.alone)
        found["alone"] = _phase(server, callers)
        more = ["--runs", str(flags.runs), "--tasks", str(flags.tasks), "--shape", flags.shape]
        submitter = _start("submitter", "--address", address, *more, *["--cancel"] * flags.cancel)
        started.append(submitter)
        _said(submitter, "ready")
        for number in range(flags.runs):
            accepted = _asked(submitter, "accepted")
            print(f"run {number + 1} of {flags.runs} accepted in {accepted:.2f} s", flush=True)
            time.sleep(flags.after)
            found[f"beside run {number + 1}"] = {"accepted_s": accepted} | _phase(server, callers)
    finally:
        # The server last: the others may be in the middle of a call.
        for process in reversed(started):
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)
    if flags.output:
        flags.output.write_text(json.dumps(found, indent=1) + "\n")


def _phase(server: "subprocess.Popen[str]", callers: "list[subprocess.Popen[str]]") -> dict[str, Any]:
    taken = sorted(seconds for caller in callers for seconds in _asked(caller, "taken"))
    found = {
        "no-ops": len(taken),
        "p50_ms": round(1e3 * percentile(taken, 0.5), 1) if taken else 0.0,
        "p99_ms": round(1e3 * percentile(taken, 0.99), 1) if taken else 0.0,
        "longest_ms": round(1e3 * taken[-1], 1) if taken else 0.0,
        "server": _asked(server, "probe"),
    }
    print(json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    main()
