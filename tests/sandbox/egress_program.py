"""A program: sandboxes with an allow list of servers, on an internet of the tests' own. Prints all outcomes as JSON.

With the address of a container engine it tries the level `docker`, and the others without.
"""

import asyncio
import json
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from lattice_worker.containers.config import EngineConfig
from lattice_worker.containers.containers import Containers
from lattice_worker.containers.supervisor import ContainerSupervisor
from lattice_worker.egress.agent import Egress
from lattice_worker.sandbox.policy import LEVELS, container_policy, policy_of
from tests.sandbox import connections
from tests.sandbox.boxes import Box, boxes
from tests.sandbox.internet import internet


async def rows(start: Callable[..., Any], level: str, ca: str) -> dict[str, Any]:
    """Return how each attempt ended, and the accesses that the agent was told of meanwhile."""
    return await rows_in(await start(policy_of(level, network=connections.SERVERS)), ca)


async def rows_in(box: Box, ca: str) -> dict[str, Any]:
    """Return the same for a box."""
    found = await box.run(_outcomes, ca)
    connection = box.supervisor.network.connection
    assert connection is not None
    return {"outcomes": found, "first": box.accesses, "final": await connection.close()}


def _outcomes(ca: str) -> dict[str, str]:
    return {name: connections.outcome(name, ca) for name in connections.ROWS}


async def flooded(start: Callable[..., Any], ca: str) -> dict[str, Any]:
    """Return the result of a flood, and that of another sandbox meanwhile."""
    policy = policy_of(LEVELS[1], network=("api.test:443",))
    box, other = await start(policy), await start(policy)
    flooding = asyncio.create_task(box.run(connections.flood, ca))
    began = time.monotonic()
    honest = await other.run(connections.https_by_name, ca)
    took_s = time.monotonic() - began
    was_flooding = not flooding.done()
    return {
        "flood": await flooding,
        "honest": honest,
        "took_s": took_s,
        "was_flooding": was_flooding,
        "final": await box.supervisor.network.connection.close(),
        "first": box.accesses,
    }


async def ended(start: Callable[..., Any], ca: str) -> dict[str, Any]:
    """Return the accesses of an attempt that ends while a connection is open."""
    box = await start(policy_of(LEVELS[1], network=("api.test:443",)))
    box.send(connections.hold_a_stream, ca)
    async with asyncio.timeout(20):
        while not box.accesses:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
    box.process.kill()
    return {"final": await box.supervisor.network.connection.close(), "status": await box.end()}


async def lost(start: Callable[..., Any], egress: Egress, ca: str) -> dict[str, Any]:
    """Return what becomes of an attempt whose proxies are killed, and of the next one."""
    policy = policy_of(LEVELS[1], network=("api.test:443",))
    box = await start(policy)
    await box.run(connections.https_by_name, ca)
    assert egress._process is not None
    egress._process.send_signal(signal.SIGKILL)
    await egress._process.wait()
    await asyncio.sleep(0.1)
    after = await start(policy)
    return {"lost": box.has_lost_network, "after": await after.run(connections.https_by_name, ca)}


async def main(folder: Path, ca: str) -> dict[str, Any]:
    """Return all outcomes."""
    egress = Egress()
    own = socket.create_server(("0.0.0.0", 8000))
    try:
        async with boxes(folder, egress) as start:
            found: dict[str, Any] = {level: await rows(start, level, ca) for level in LEVELS}
            box = await start(policy_of(LEVELS[1], network=("api.test:443", "*.wild.test:443")))
            found["variables"] = await box.run(connections.variables, ca)
            found["flooded"] = await flooded(start, ca)
            found["ended"] = await ended(start, ca)
            found["lost"] = await lost(start, egress, ca)
    finally:
        own.close()
        egress.close()
        await egress.wait_closed()
    return found


async def in_container(address: str, ca: str) -> dict[str, Any]:
    """Return how each attempt ended in a container, and the accesses that the agent was told of meanwhile."""
    cloudpickle.register_pickle_by_value(connections)
    containers, egress = Containers(EngineConfig(address)), Egress()
    policy = container_policy(network=connections.SERVERS)
    box = Box(policy, Path(), supervisor := ContainerSupervisor(policy, containers, egress))
    own = socket.create_server(("0.0.0.0", 8000))
    try:
        return {"docker": await rows_in(await box.start(supervisor), ca)}
    finally:
        own.close()
        await box.close()
        await containers.close()
        egress.close()
        await egress.wait_closed()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="lattice-tests-") as temporary, internet(Path(temporary)) as authority:
        text = authority.read_text()
        scenario = in_container(sys.argv[1], text) if sys.argv[1:] else main(Path(temporary), text)
        json.dump(asyncio.run(scenario), sys.stdout)
