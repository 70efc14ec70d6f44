"""Engines, agents and heads are killed at random in the middle of answers; no process or file is left."""

import json
import os
import random
import signal
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from lattice_client import InvalidArgumentError, LatticeClient, UnavailableError, context, task
from tests.e2e.heads import Head
from tests.e2e.rooms import WAIT_S
from tests.e2e.test_llms import COMMAND, SERVER
from tests.e2e.test_services import until

KILLS = int(os.environ.get("LATTICE_KILLS", "20"))
GONE_S = 30.0
RESULT_S = 120.0
WORDS = 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 30 * KILLS)]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    found = Head(tmp_path / "journal", "--num-cpus", "0")
    found.start()
    for node_id in ("a", "b"):
        found.join(node_id)
    yield found
    found.close()


class CutError(Exception):
    """An answer was not whole, and said so."""


@task(cpu=0.1, retries=20, retry_backoff=0.1, needs_llm="tiny")
def listen(name: str) -> str:
    """Return a streamed answer. Raises the client's error for a partial answer."""
    found = context.llm("tiny")
    text = " ".join(f"{name}-{number}" for number in range(WORDS))
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "stream": True}
    headers = {"authorization": f"Bearer {found.api_key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{found.base_url}/chat/completions", json.dumps(body).encode(), headers)
    words = []
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        # As a whole: the lines of a response end without an error when the gateway is killed between two of them.
        for line in response.read().splitlines():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise CutError(event["error"]["message"])
            words.append(event["choices"][0]["delta"].get("content", ""))
    return "".join(words).strip()


def start_model(address: str) -> None:
    """Start two instances, of which each node has room for one."""
    settings: dict[str, Any] = {"command": COMMAND, "arguments": ["--delay", "0.05"], "cpu": 1.5, "replicas": 2}
    with LatticeClient(address) as client:
        while True:
            # A connection that failed while there was no server may be remembered for a moment.
            with suppress(UnavailableError):
                client.llm.start("tiny", timeout=WAIT_S, **settings)
                return
            time.sleep(0.05)


class Load:
    """Clients that have tasks ask the model, one after another."""

    def __init__(self, address: str, clients: int) -> None:
        self.answers: dict[str, object] = {}
        self._address = address
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=[number]) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def wait_for_more(self) -> None:
        """Wait until another request was answered."""
        before = len(self.answers)
        until(lambda: len(self.answers) > before, "another request is answered")

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(2 * RESULT_S)
            assert not thread.is_alive(), "a run is stuck"

    def _ask(self, number: int) -> None:
        count = 0
        with LatticeClient(self._address) as client:
            while not self._is_over.is_set():
                name, count = f"run-{number}-{count}", count + 1
                self.answers[name] = self._answer(client, name)

    def _answer(self, client: LatticeClient, name: str) -> object:
        workflow = client.create_workflow()
        workflow.add_task(listen, {"name": name})
        deadline = time.monotonic() + RESULT_S
        while time.monotonic() < deadline:
            # A start that is repeated with its id starts nothing twice. A server that was started again has no model.
            try:
                return workflow.run(name).result(timeout=RESULT_S)["result"]
            except (UnavailableError, InvalidArgumentError):
                time.sleep(0.05)
            except Exception as error:
                return repr(error)
        return "there is none"


def engines() -> list[psutil.Process]:
    """Return the processes of engines that agents of this test started."""
    own = psutil.Process().children(recursive=True)
    return [found for found in own if SERVER in _command(found)]


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def ports_of(processes: list[psutil.Process]) -> set[int]:
    """Return the ports on which processes listen."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            connections = process.net_connections(kind="tcp")
            found |= {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
    return found


def kill(head: Head, dice: random.Random, what: str) -> tuple[list[psutil.Process], set[int]]:
    """Kill something, and have it come back; return the processes that have to go with it, and the engines' ports."""
    agents = {node_id: psutil.Process(agent.pid) for node_id, agent in head.agents.items()}
    if what == "engine":
        doomed = dice.sample(engines(), 1) if engines() else []
        ports = ports_of(doomed)
        for process in doomed:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
    elif what == "agent":
        node_id = dice.choice(sorted(agents))
        doomed = agents[node_id].children(recursive=True)
        ports = ports_of([found for found in doomed if SERVER in _command(found)])
        head.kill_agent(node_id)
        head.join(node_id)
    else:
        doomed = engines()
        ports = ports_of(doomed)
        head.kill()
        time.sleep(dice.uniform(0, 0.5))
        head.start()
    return doomed, ports


def is_open(port: int) -> bool:
    """Whether anything listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("kills", [3, pytest.param(KILLS, marks=pytest.mark.exhaustive)])
def test_requests_are_answered_and_nothing_is_left_after_kills(head: Head, kills: int) -> None:
    dice = random.Random(int(os.environ.get("LATTICE_SEED", "7")))
    start_model(head.address)
    load = Load(head.address, clients=4)
    killed: Counter[str] = Counter()
    slowest_s = 0.0
    try:
        for number in range(kills):
            load.wait_for_more()
            time.sleep(dice.uniform(0, 0.5))
            # Each at least once.
            what = ("engine", "agent", "head")[number] if number < 3 else dice.choice(["engine", "agent", "head"])
            killed[what] += 1
            doomed, ports = kill(head, dice, what)
            began = time.monotonic()
            left = psutil.wait_procs(doomed, timeout=GONE_S)[1]
            slowest_s = max(slowest_s, time.monotonic() - began)
            assert not left, f"{left} are left {GONE_S} s after a kill of an {what}"
            assert not [port for port in ports if is_open(port)]
            if what == "head":
                start_model(head.address)
    finally:
        load.stop()
    wrong = {name: found for name, found in load.answers.items() if found != _whole(name)}
    assert not wrong
    every = engines()
    with LatticeClient(head.address) as client:
        client.services.stop("tiny", timeout=WAIT_S)
        until(lambda: all(node.free == node.capacity for node in client.nodes()), "the nodes are free again")
    assert not psutil.wait_procs(every, timeout=GONE_S)[1]
    assert not engines()
    print(f"kills {dict(killed)}, answers {len(load.answers)}, gone after at most {slowest_s:.1f} s")


def _whole(name: str) -> str:
    return " ".join(f"{name}-{number}" for number in range(WORDS))
