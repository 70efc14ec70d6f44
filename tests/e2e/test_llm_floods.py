"""Floods of requests to the gateway of a node: requests that wait, and guessed keys."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from lattice_client import LatticeClient, context, task
from tests.e2e.rooms import WAIT_S, Room, note, noted
from tests.e2e.test_llms import COMMAND

pytestmark = pytest.mark.exhaustive

# More than the questions of one attempt that may wait for an answer.
FLOOD = 1200
# The first engine starts at once, the next ones when the room is open.
LATER = 'mkdir "$0/first" 2>/dev/null || until [ -e "$0/open" ]; do sleep 0.02; done; exec "$@"'


@task(cpu=0)
async def flood(room: str, count: int, guesses: int, kills: bool) -> list[dict[int, int]]:
    """Make requests at once, of which some have guessed keys; return how often each status came, of both kinds."""
    import resource

    import aiohttp

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = await context.llm_async("tiny")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    url = f"{found.base_url}/chat/completions"
    sent = 0

    async def count_sent(*_: Any) -> None:
        nonlocal sent
        sent += 1
        if sent == count + guesses:
            note(room, "sent")

    trace = aiohttp.TraceConfig()
    trace.on_request_chunk_sent.append(count_sent)
    headers = {"authorization": f"Bearer {found.api_key}"}
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as answer:
        pid = int((await answer.json())["system_fingerprint"])
    if kills:
        os.kill(pid, signal.SIGKILL)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trace_configs=[trace]) as session:

        async def ask(key: str) -> int:
            async with session.post(url, json=body, headers={"authorization": f"Bearer {key}"}) as answer:
                await answer.read()
                return answer.status

        keys = [found.api_key] * count + [f"lk-{number}" for number in range(guesses)]
        statuses = await asyncio.gather(*map(ask, keys))
    return [dict(Counter(statuses[:count])), dict(Counter(statuses[count:]))]


def run_flood(client: LatticeClient, room: Room, **inputs: Any) -> list[dict[int, int]]:
    workflow = client.create_workflow()
    workflow.add_task(flood, {"room": room, **inputs})
    run = workflow.run()
    noted(room, "sent")
    room.open()
    return list(run.result(timeout=WAIT_S)["result"])


@contextmanager
def started(client: LatticeClient, command: Sequence[str]) -> Iterator[None]:
    """Run a model while the block runs."""
    client.llm.start("tiny", command=command, cpu=0.1, timeout=WAIT_S)
    yield
    client.services.stop("tiny", timeout=WAIT_S)


def test_gateway_survives_more_waiting_requests_than_it_may_have_questions(client: LatticeClient, room: Room) -> None:
    with started(client, ["sh", "-c", LATER, room, *COMMAND]):
        assert run_flood(client, room, count=FLOOD, guesses=0, kills=True) == [{200: FLOOD}, {}]


def test_gateway_survives_more_guessed_keys_than_it_may_have_questions(client: LatticeClient, room: Room) -> None:
    with started(client, COMMAND):
        assert run_flood(client, room, count=20, guesses=FLOOD, kills=False) == [{200: 20}, {401: FLOOD}]
