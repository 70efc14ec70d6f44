"""The lifetime of a client: event loops, threads, forks, after its close and when the program exits."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lattice_client import AsyncLatticeClient, AsyncRun, ClientClosedError, ForkError, LatticeClient, Run, task
from tests.client.shell import WAIT_S, gated

pytestmark = pytest.mark.slow

FORK_S = 60.0


@task
def one() -> int:
    return 1


def test_aio_works_on_any_event_loop(client: LatticeClient) -> None:
    async def ask() -> Any:
        return await client.aio.run_task(one, {}), (await client.aio.server_info()).executor

    assert client.run_task(one, {}) == {"result": 1}
    for _ in range(2):
        assert asyncio.run(ask()) == ({"result": 1}, "local")
    assert client.run_task(one, {}) == {"result": 1}


def test_client_works_on_several_event_loops(address: str) -> None:
    made_elsewhere = AsyncLatticeClient(address)

    async def ask() -> Any:
        return await made_elsewhere.run_task(one, {})

    assert [asyncio.run(ask()) for _ in range(3)] == [{"result": 1}] * 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: asyncio.run(ask()), range(8))) == [{"result": 1}] * 8
    asyncio.run(made_elsewhere.close())


def test_run_can_be_read_on_another_event_loop(address: str) -> None:
    client = AsyncLatticeClient(address)
    workflow = client.create_workflow()
    workflow.add_task(one)

    async def finish(run: AsyncRun) -> Any:
        found = await run.result(timeout=WAIT_S)
        await client.close()
        return found

    run = asyncio.run(_start(workflow))
    assert asyncio.run(finish(run)) == {"result": 1}


async def _start(workflow: Any) -> AsyncRun:
    run: AsyncRun = await workflow.run()
    return run


AT_MODULE_LEVEL = """
import asyncio, sys, threading
from lattice_client import AsyncLatticeClient, LatticeClient, task

made = AsyncLatticeClient(sys.argv[1])
clients = [made, LatticeClient(sys.argv[1]).aio]

@task
def one():
    return 1

async def use(client):
    workflow = client.create_workflow()
    workflow.add_task(one)
    run = await workflow.run()
    events = [event.type async for event in run.events()]
    found.append((events[-1], await run.result(), await client.run_task(one)))

found = []
for _ in range(10):
    for client in clients:
        asyncio.run(use(client))
threads = [threading.Thread(target=asyncio.run, args=(use(client),)) for client in clients * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(found), all(one == ("run_finished", {"result": 1}, {"result": 1}) for one in found))
try:
    made.server_info().send(None)
except RuntimeError as error:
    print(error)
"""


def test_an_asyncio_client_of_a_module_works_on_all_loops_and_is_never_closed(address: str, tmp_path: Path) -> None:
    done = run_script(AT_MODULE_LEVEL, address, tmp_path)
    assert (done.stdout, done.returncode) == ("24 True\nno running event loop\n", 0), done.stderr
    assert done.stderr == "", "gRPC tells errors of events for a loop that is closed"


CALLS: list[Callable[[LatticeClient], Any]] = [
    lambda c: c.server_info(),
    lambda c: c.nodes(),
    lambda c: c.get_run("r"),
    lambda c: c.list_runs(),
    lambda c: c.list_tasks("r"),
    lambda c: c.describe_run("r"),
    lambda c: c.cancel_run("r"),
    lambda c: c.explain("r", "t"),
    lambda c: c.drain_node("n"),
    lambda c: c.get_ray_head_port(),
    lambda c: c.run_task(one, {}),
    lambda c: c.get_workflow("w").run(),
    lambda c: c.get_workflow("w").get_results("r"),
    lambda c: Run.of(AsyncRun.of("r", c.twin.api)).result(),
    lambda c: list(Run.of(AsyncRun.of("r", c.twin.api)).events()),
]


@pytest.mark.parametrize("ask", CALLS)
def test_every_call_raises_when_the_client_is_closed(address: str, ask: Callable[[LatticeClient], Any]) -> None:
    client = LatticeClient(address)
    assert client.server_info().executor == "local"
    client.close()
    client.close()
    with pytest.raises(ClientClosedError, match=f"the client of {address} is closed"):
        ask(client)
    assert repr(client) == f"<LatticeClient of {address}, closed>"


@pytest.mark.parametrize("by", ["its own call", "another's call", "its events"])
def test_waiting_caller_raises_when_the_client_is_closed(address: str, waiting: Run, by: str) -> None:
    client = LatticeClient(address)
    if by == "its own call":
        workflow = client.create_workflow()
        workflow.add_task(gated, {"gate": "/nowhere/at/all"}, "never")
        workflow.add_task(gated, {"gate": str(waiting.twin.api.channel.target)}, "never")
    run = client.get_run(waiting)
    caught: list[BaseException] = []

    def follow() -> None:
        try:
            list(run.events()) if by == "its events" else run.result()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    time.sleep(0.3)
    client.close()
    thread.join(WAIT_S)
    (error,) = caught
    assert isinstance(error, ClientClosedError)


def in_child(connection: Any, ask: Callable[[], Any]) -> None:
    try:
        connection.send(ask())
    except BaseException as error:
        connection.send((type(error).__name__, str(error)))


def forked(ask: Callable[[], Any]) -> Any:
    """Return the result of a call in a forked child, or the error it raises."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=in_child, args=(theirs, ask))
    child.start()
    try:
        assert ours.poll(FORK_S), "the child hangs"
        return ours.recv()
    finally:
        child.join(FORK_S)
        assert child.exitcode == 0
        child.close()


@pytest.mark.parametrize("is_own", [True, False])
def test_call_raises_in_a_forked_child_when_the_parent_used_a_client(
    address: str, client: LatticeClient, is_own: bool
) -> None:
    assert client.server_info().executor == "local"
    kind, text = forked(lambda: (LatticeClient(address) if is_own else client).server_info().executor)
    assert kind == ForkError.__name__
    assert "'spawn' or 'forkserver'" in text
    assert client.server_info().executor == "local"


FORK_FIRST = """
import multiprocessing, sys
from lattice_client import LatticeClient, task
made = LatticeClient(sys.argv[1])

@task
def one():
    return 1

def child():
    with LatticeClient(sys.argv[1]) as own:
        print(own.run_task(one, {}), made.run_task(one, {}), flush=True)

for _ in range(2):
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 0, process.exitcode
print(made.run_task(one, {}))
"""


def test_a_child_works_when_its_parent_has_made_clients_and_not_connected(address: str, tmp_path: Path) -> None:
    done = run_script(FORK_FIRST, address, tmp_path)
    one_of_each = "{'result': 1} {'result': 1}\n"
    assert (done.stdout, done.returncode) == (f"{one_of_each * 2}{{'result': 1}}\n", 0), done.stderr


FORK_AND_GO_ON = """
import gc, os, signal, sys
from lattice_client import LatticeClient, task

@task
def one():
    return 1

def forked(free):
    if (pid := os.fork()) == 0:
        signal.alarm(20)
        if free:
            for name in ("run", "workflow", "client"):
                globals().pop(name, None)
            gc.collect()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

client = LatticeClient(sys.argv[1])
workflow = client.create_workflow()
workflow.add_task(one)
for _ in range(10):
    for free in (True, False):
        run = workflow.run()
        forked(free)
        assert run.result() == {"result": 1}
        forked(free)
    client.close()
    del run, workflow, client
    gc.collect()
    forked(True)
    client = LatticeClient(sys.argv[1])
    workflow = client.create_workflow()
    workflow.add_task(one)
print(client.run_task(one, {}), "GRPC_ENABLE_FORK_SUPPORT" in os.environ)
"""


def test_children_that_are_forked_and_end_do_nothing_to_their_parent(address: str, tmp_path: Path) -> None:
    done = run_script(FORK_AND_GO_ON, address, tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("{'result': 1} False\n", "", 0)


FORK_IN_FLIGHT = """
import os, signal, sys, threading
from lattice_client import ForkError, LatticeClient

client = LatticeClient(sys.argv[1])
run = client.get_run(sys.argv[2])
events = run.events()
next(events)
is_over = False

def call():
    while not is_over:
        client.server_info()

threads = [threading.Thread(target=call) for _ in range(2)]
for thread in threads:
    thread.start()

def child():
    for ask in (lambda: next(events), client.server_info, lambda: LatticeClient(sys.argv[1]).list_runs(), run.result):
        try:
            ask()
        except ForkError:
            continue
        os._exit(1)
    os._exit(0)

for number in range(50):
    if (pid := os.fork()) == 0:
        signal.alarm(20)
        child()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        print("a child ended with", status)
is_over = True
for thread in threads:
    thread.join()
client.cancel_run(run)
print(number + 1, [event.type for event in events][-1])
"""


def test_forked_children_raise_and_the_parent_continues_when_calls_are_in_progress(
    address: str, tmp_path: Path, waiting: Run
) -> None:
    done = run_script(FORK_IN_FLIGHT, address, tmp_path, waiting)
    assert (done.stdout, done.stderr, done.returncode) == ("50 run_finished\n", "", 0)


AT_THE_END = """
import atexit, sys
from lattice_client import LatticeClient, task

@task
def one():
    return 1

class Holder:
    def __init__(self):
        self.client = LatticeClient(sys.argv[1])

    def __del__(self):
        self.client.close()

holder = Holder()
print(holder.client.run_task(one, {}))
if sys.argv[2] == "atexit":
    atexit.register(holder.client.close)
if sys.argv[2] == "call":
    Holder.__del__ = lambda self: self.client.server_info()
"""


@pytest.mark.parametrize("way", ["__del__", "atexit", "call"])
def test_program_exits_when_finalizers_use_a_client(address: str, tmp_path: Path, way: str) -> None:
    done = run_script(AT_THE_END, address, tmp_path, way)
    assert (done.stdout, done.returncode) == ("{'result': 1}\n", 0)
    assert (done.stderr == "") is (way != "call"), done.stderr
    assert ("ClientClosedError" in done.stderr) is (way == "call")


def run_script(code: str, address: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    (folder / "script.py").write_text(code)
    command = [sys.executable, str(folder / "script.py"), address, *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)
