"""Runs that end with their caller: `cancel_on_disconnect`."""

import asyncio
import subprocess
import sys
from contextlib import suppress
from typing import Any

import psutil
import pytest

from lattice_client import AsyncLatticeClient, LatticeClient, Run, RunCancelledError, TaskDefinitionError, task
from tests.e2e import rooms
from tests.e2e.proxy import Proxy
from tests.e2e.rooms import WAIT_S, Room

# Starts one run in each way, and waits for all of them.
CALLER = """
import asyncio
import sys
import threading
from typing import TypedDict

from langgraph.graph import START, StateGraph

from lattice_client import LangGraphClient, LatticeClient
from tests.e2e.test_disconnects import hold

address, room = sys.argv[1:]
client = LatticeClient(address)

def started(name, **settings):
    workflow = client.create_workflow()
    workflow.add_task(hold, {"room": room, "name": name})
    return workflow.run(labels={"room": room, "name": name}, **settings)

class State(TypedDict):
    room: str

def node(state: State) -> State:
    hold(state["room"], "graph")

tied = started("run", cancel_on_disconnect=True)
plain = started("plain")
waited = started("result")
threading.Thread(target=lambda: waited.result(cancel_on_disconnect=True), daemon=True).start()
settings = {"labels": {"room": room, "name": "run_task"}, "cancel_on_disconnect": True}
alone = {"room": room, "name": "run_task"}
threading.Thread(target=lambda: client.run_task(hold, alone, **settings), daemon=True).start()
open_run = client.open_run(labels={"room": room, "name": "open"}, cancel_on_disconnect=True)
open_run.add(hold, {"room": room, "name": "open"})
graph = StateGraph(State).add_node("node", node).add_edge(START, "node")
lattice = LangGraphClient(address, cancel_on_disconnect=True)
asyncio.run(lattice.compile(graph).ainvoke({"room": room}))
"""
TIED = ["graph", "open", "result", "run", "run_task"]


@task(cpu=0.1)
def hold(room: str, name: str) -> None:
    import os

    rooms.note(room, f"pid {name} {os.getpid()}")
    rooms.enter(room, name)


def noted(room: Room) -> dict[str, int]:
    """Return the processes of the tasks that have entered the room, by name."""
    lines = [line.split() for line in room.notes() if line.startswith("pid ")]
    return {name: int(pid) for _, name, pid in lines}


def end_of(run: Run) -> str:
    """Wait for the end of a run; return its state."""
    with suppress(RunCancelledError):
        run.result(timeout=WAIT_S)
    return run.status()


def test_the_runs_of_a_killed_caller_are_cancelled_and_their_processes_end(local: str, room: Room) -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER, local, room], stderr=subprocess.PIPE, text=True)
    with LatticeClient(local) as client:
        while len(noted(room)) <= len(TIED):
            assert caller.poll() is None, caller.stderr and caller.stderr.read()
            with suppress(subprocess.TimeoutExpired):
                caller.wait(0.05)
        pids = noted(room)
        processes = [psutil.Process(pid) for name, pid in pids.items() if name in TIED]
        caller.kill()
        caller.communicate()
        assert not psutil.wait_procs(processes, WAIT_S)[1]
        runs = {run.labels["name"]: client.get_run(run.run_id) for run in client.list_runs(labels={"room": room})}
        assert sorted([*runs, "graph"]) == sorted([*TIED, "plain"])
        plain = runs.pop("plain")
        assert {end_of(run) for run in runs.values()} == {"cancelled"}
        assert psutil.pid_exists(pids["plain"])
        room.open()
        assert end_of(plain) == "succeeded"


def test_a_run_survives_a_break_that_is_shorter_than_its_grace_time(local: str, room: Room) -> None:
    async def scene() -> None:
        proxy = Proxy(local)
        address = await proxy.start()
        try:
            async with AsyncLatticeClient(address) as client:
                workflow = client.create_workflow()
                workflow.add_task(hold, {"room": room, "name": "task"})
                run = await workflow.run(cancel_on_disconnect=WAIT_S)
                again = await workflow.run()
                results = [
                    asyncio.create_task(run.result(WAIT_S)),
                    asyncio.create_task(again.result(WAIT_S, cancel_on_disconnect=WAIT_S)),
                ]
                for _ in range(2):
                    await asyncio.to_thread(rooms.entered, seen.get_run(run.run_id), "hold")
                    proxy.cut()
                room.open()
                assert await asyncio.gather(*results) == [{"result": None}] * 2
        finally:
            await proxy.stop()

    with LatticeClient(local) as seen:
        asyncio.run(scene())


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 50])
def test_a_run_is_cancelled_when_the_wait_for_its_result_is(local: str, room: Room, steps: int) -> None:
    async def scene() -> None:
        async with AsyncLatticeClient(local) as client:
            workflow = client.create_workflow()
            workflow.add_task(hold, {"room": room, "name": "task"})
            run = await workflow.run()
            waiting = asyncio.create_task(run.result(cancel_on_disconnect=0.01))
            # After few steps of the event loop the call has not reached the server.
            for _ in range(steps):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            *_, last = [event async for event in run.events()]
            assert last.data["state"] == "cancelled"
            assert last.data["failure"]["message"] == "its caller was disconnected for 0.01 s"

    asyncio.run(scene())


def test_a_run_is_cancelled_when_the_wait_for_its_result_runs_out_of_time(local: str, room: Room) -> None:
    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        workflow.add_task(hold, {"room": room, "name": "task"})
        run = workflow.run()
        with pytest.raises(TimeoutError):
            run.result(timeout=0, cancel_on_disconnect=0.01)
        assert end_of(run) == "cancelled"


@pytest.mark.parametrize("given", [0, -1, "yes", None, float("nan")])
def test_a_grace_time_that_is_none_is_refused(local: str, given: Any) -> None:
    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        workflow.add_task(hold, {"room": "", "name": ""})
        with pytest.raises(TaskDefinitionError, match="cancel_on_disconnect must be true, false or seconds above 0"):
            workflow.run(cancel_on_disconnect=given)
