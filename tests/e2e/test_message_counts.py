"""How many messages a run takes on the streams of gRPC, and how many packets between an agent and its runners.

A message costs its sender and its receiver some 0.1 ms, however small it is. On a busy machine tasks seem to take long,
and less is sent ahead. So one of several rounds has to be within the bounds.
"""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lattice_client import LatticeClient, LatticeWorkflow, task
from tests.e2e.conftest import served
from tests.e2e.rooms import WAIT_S
from tests.e2e.test_services import until

AGENT = Path(__file__).parent / "counting_agent.py"
MESSAGES = re.compile(r'^lattice_server_stream_messages_total\{(?!.*"grpc.health).*\} ([\d.e+]+)$', re.MULTILINE)
ROUNDS = 20


@task
def step(number: int) -> int:
    return number + 1


class Counted:
    """A server without runners of its own, and one agent that counts."""

    def __init__(self, client: LatticeClient, agent: "subprocess.Popen[str]") -> None:
        self.client = client
        self._agent = agent

    def messages(self) -> float:
        """Return how many messages were sent and received on all streams of the server."""
        with urllib.request.urlopen(self.client.server_info().metrics_url) as answer:
            return sum(float(number) for number in MESSAGES.findall(answer.read().decode()))

    def packets(self) -> int:
        """Return how many packets went between the agent and its runners since the last call."""
        self._agent.send_signal(signal.SIGUSR1)
        assert self._agent.stdout is not None
        return sum(json.loads(self._agent.stdout.readline()).values())


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counted]:
    config = tmp_path_factory.mktemp("counted") / "server.toml"
    config.write_text("session_ttl_s = 3600.0\n")  # No heartbeats while messages are counted.
    flags = ["--executor", "local", "--num-cpus", "0", "--metrics", "prometheus", "--config", str(config)]
    with served(*flags) as address:
        command = [sys.executable, str(AGENT), "--addr", address, "--node-id", "counted", "--num-cpus", "2"]
        agent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with LatticeClient(address) as client:
            until(client.nodes, "the agent has joined")
            yield Counted(client, agent)
        agent.terminate()
        assert agent.wait(WAIT_S) == 0


def one(workflow: LatticeWorkflow) -> None:
    workflow.add_task(step, {"number": 1})


def chain(workflow: LatticeWorkflow) -> None:
    made = workflow.add_task(step, {"number": 0})
    for _ in range(49):
        made = workflow.add_task(step, {"number": made.output})


def fan(workflow: LatticeWorkflow) -> None:
    for number in range(1000):
        workflow.add_task(step, {"number": number})


# Without sending ahead each task of the chain takes two messages: 100.
@pytest.mark.parametrize(("build", "most_messages", "most_packets"), [(one, 6, 2), (chain, 75, 100), (fan, 120, 1100)])
def test_a_run_takes_few_messages(
    counted: Counted, build: Callable[[LatticeWorkflow], None], most_messages: int, most_packets: int
) -> None:
    def run() -> None:
        workflow = counted.client.create_workflow()
        build(workflow)
        workflow.run().result(timeout=WAIT_S)

    found = []
    for _ in range(ROUNDS):
        before, _ = counted.messages(), counted.packets()
        run()
        found.append((counted.messages() - before, counted.packets()))
        if found[-1][0] <= most_messages and found[-1][1] <= most_packets:
            break
    else:
        pytest.fail(f"messages and packets of each round: {found}")
