"""Scripted work that makes each metric differ from zero: runs, calls, streams, sandboxes, services and a model."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from lattice_client import AsyncLatticeClient, TaskFailedError, context, task
from lattice_client.errors import LatticeError
from lattice_server.telemetry import catalogue
from tests.server.telemetry.workload import double, fail, fail_once

WAIT_S = 60.0
TESTS = Path(__file__).parents[2]
WEB = [sys.executable, str(TESTS / "e2e" / "serving.py"), "{host}", "{port}"]
MODEL = [sys.executable, str(TESTS / "tools" / "openai_server.py"), "{host}", "{port}"]
# The settings of a server for this work: two GPUs that only the ledger knows, and room for few chunks.
SETTINGS = {"num_cpus": 4, "num_gpus": 2, "chunk_bytes": 4096}
# The metrics that differ from zero only while tasks are held.
HELD = (
    catalogue.RUNS_ACTIVE,
    catalogue.TASKS_ACTIVE,
    catalogue.CALLS_WAITING,
    catalogue.CHUNK_READERS,
    catalogue.QUEUE_SIZE,
    catalogue.QUEUE_AGE,
    catalogue.LEASES,
    catalogue.NODE_CPU_USED,
    catalogue.NODE_MEMORY_USED,
    catalogue.NODE_GPUS_USED,
)


@task(isolation="subprocess", cpu=1)
def sealed(x: int) -> int:
    """Run in a sandbox."""
    return x


@task(isolation="subprocess")
def sealed_fail(x: int) -> int:
    """Fail in a sandbox."""
    raise ValueError(x)


@task(cpu=1, gpu=1, cpu_mem=64)
def held(folder: str) -> Iterator[int]:
    """Stream, and stay until the folder has a file `open`."""
    yield from range(30)
    deadline = time.monotonic() + WAIT_S
    while not (Path(folder) / "open").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@task(cpu=1)
def caller(folder: str) -> int:
    """Call a task that waits, and wait for it."""
    return len(context.call(held, {"folder": folder}).result())


@task(cpu=0.1)
def chat(name: str) -> int:
    """Ask a model."""
    found = context.llm(name)
    body = f'{{"model": "{found.model}", "messages": [{{"role": "user", "content": "x"}}]}}'
    headers = {"authorization": f"Bearer {found.api_key}", "content-type": "application/json"}
    with urlopen(Request(f"{found.base_url}/chat/completions", body.encode(), headers), timeout=WAIT_S) as response:
        return int(response.status)


async def until(is_so: Callable[[], Awaitable[Any]]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(WAIT_S):
        while not await is_so():
            await asyncio.sleep(0.05)


async def load(client: AsyncLatticeClient, folder: Path, see: Callable[[], Awaitable[object]]) -> None:
    """Do the work; `see` is called while tasks are held, and wait."""
    await asyncio.gather(_ended(client, folder), _services(client))
    await _held(client, folder, see)
    for name in ("web", "tiny"):
        await client.services.stop(name)


async def _ended(client: AsyncLatticeClient, folder: Path) -> None:
    chain = client.create_workflow("chain")
    first = chain.add_task(double, {"x": 1})
    chain.add_task(double, {"x": first.output})
    for number in range(4):
        chain.add_task(sealed, {"x": number})
    await (await client.run(chain)).result()
    await client.run_task(fail_once, {"folder": str(folder)})
    for failing in (fail, sealed_fail):
        with suppress(TaskFailedError):
            await client.run_task(failing, {"x": 1})
    with suppress(LatticeError):
        await client.describe_run("there is none")


async def _services(client: AsyncLatticeClient) -> None:
    web = await client.services.start("web", WEB, cpu=0.1, timeout=WAIT_S)
    await client.llm.start("tiny", command=MODEL, cpu=0.1, timeout=WAIT_S)
    with suppress(OSError):
        await asyncio.to_thread(urlopen, f"http://{web.instances[0].endpoint}/exit/1", timeout=WAIT_S)

    async def has_restarted() -> bool:
        return (await client.services.get("web")).restarts > 0

    await until(has_restarted)
    await client.services.ready("web", timeout=WAIT_S)
    await client.run_task(chat, {"name": "tiny"})


async def _held(client: AsyncLatticeClient, folder: Path, see: Callable[[], Awaitable[object]]) -> None:
    workflow = client.create_workflow("held")
    own = [workflow.add_task(held, {"folder": str(folder)}, f"held-{number}") for number in range(3)]
    workflow.add_task(caller, {"folder": str(folder)}, "caller")
    after = workflow.add_task(double, {"x": 1}, "after")
    workflow.add_edge(own[0], after)
    run = await client.run(workflow)

    async def read() -> None:
        async for _ in run.chunks():
            pass

    reading = asyncio.create_task(read())
    await see()
    (folder / "open").touch()
    await run.result()
    await reading
