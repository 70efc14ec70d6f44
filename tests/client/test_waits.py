"""Waits for a server that never answers: Ctrl-C ends each, and so does the end of the program."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from lattice.v1 import cluster_pb2

pytestmark = pytest.mark.slow

WAIT_S = 100
INFO = "/lattice.v1.ClusterService/GetServerInfo"


class Silent(grpc.GenericRpcHandler):
    """Tells its limits, takes every other call, and answers none until it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return how a call is handled."""
        if details.method == INFO:  # type: ignore[attr-defined]  # its stub has no fields
            limits = cluster_pb2.Limits(inline_payload_bytes=4096, upload_chunk_bytes=2**20)
            answer = cluster_pb2.GetServerInfoResponse(limits=limits).SerializeToString()
            return grpc.unary_unary_rpc_method_handler(lambda request, context: answer)
        return grpc.stream_stream_rpc_method_handler(self._wait)

    def _wait(self, requests: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        self.released.wait(WAIT_S)
        yield from ()


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """The address of a server that never answers."""
    handler = Silent()
    server = grpc.server(ThreadPoolExecutor(100), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    handler.released.set()
    server.stop(None).wait()


SCRIPT = """
import os, signal, sys, threading, time
from lattice_client import AsyncRun, LatticeClient, Run, task

signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell starts background jobs with it ignored.

@task
def size(data):
    return len(data)

client = LatticeClient(sys.argv[1])
run = Run.of(AsyncRun.of("r", client.twin.api))
workflow = client.create_workflow()
added = workflow.add_task(size, {"data": 1})
large = client.create_workflow()
large.add_task(size, {"data": bytes(30_000_000)})

WAITS = {
    "result": run.result,
    "result with a limit": lambda: run.result(timeout=1000),
    "output": lambda: run.output(added),
    "events": lambda: list(run.events()),
    "events with a limit": lambda: list(run.events(timeout=1000)),
    "messages": lambda: workflow.get_results("r", verbose=False),
    "list of runs": client.list_runs,
    "list of tasks": lambda: client.list_tasks("r"),
    "start": workflow.run,
    "upload": large.run,
    "one task": lambda: client.run_task(size, {"data": 1}),
    "store": workflow.store,
    "cancel": run.cancel,
    "retry": run.retry,
}
"""
INTERRUPTED = """
def interrupt():
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)

for name, wait in WAITS.items():
    began = time.monotonic()
    try:
        threading.Thread(target=interrupt).start()
        wait()
    except KeyboardInterrupt:
        print(name, round(time.monotonic() - began - 0.2, 2), sep=": ")
"""
LEFT = """
for wait in WAITS.values():
    threading.Thread(target=wait, daemon=True).start()
time.sleep(0.5)

class Holder:
    def __del__(self):
        client.close()

holder = Holder()
print("end")
"""


def _ran(script: str, address: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    (folder / "script.py").write_text(SCRIPT + script)
    command = [sys.executable, "script.py", address]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=WAIT_S, check=False)


def test_ctrl_c_ends_every_wait(silent: str, tmp_path: Path) -> None:
    done = _ran(INTERRUPTED, silent, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    took = {name: float(seconds) for name, seconds in (line.split(": ") for line in done.stdout.splitlines())}
    assert len(took) == SCRIPT.count('": ') - 3
    assert max(took.values()) < 5, took


def test_a_program_ends_while_its_threads_wait(silent: str, tmp_path: Path) -> None:
    done = _ran(LEFT, silent, tmp_path)
    assert (done.stdout, done.returncode) == ("end\n", 0), done.stderr
