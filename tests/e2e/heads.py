"""Heads that are killed with SIGKILL and started again on the same port and journal, and machines that join them."""

import signal
import subprocess
from pathlib import Path

import psutil

from tests.commands import START
from tests.ports import free_port


class Head:
    """A server on one port and one journal, a folder or a URL, over several lives; None is the journal of its port."""

    def __init__(self, journal: Path | str | None, *flags: str) -> None:
        self.journal = journal
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._flags = flags or ("--num-cpus", "2")
        self._process: subprocess.Popen[str] | None = None
        self.agents: dict[str, subprocess.Popen[str]] = {}

    def command(self) -> list[str]:
        journal = [] if self.journal is None else ["--journal", str(self.journal)]
        return [*START, "--head", "--port", str(self.port), "--executor", "local", *journal, *self._flags]

    def start(self) -> None:
        self._process = subprocess.Popen(self.command(), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self.address in self._process.stdout.readline()

    def join(self, node_id: str, cpus: int = 2) -> subprocess.Popen[str]:
        """Start an agent on this machine, which outlives the server, and wait until it has joined."""
        flags = ["--addr", self.address, "--node-id", node_id, "--num-cpus", str(cpus)]
        agent = subprocess.Popen([*START, "--worker", *flags], stdout=subprocess.PIPE, text=True)
        assert agent.stdout is not None
        assert f"as node {node_id}" in agent.stdout.readline()
        self.agents[node_id] = agent
        return agent

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the server, and wait until its own worker has ended by itself."""
        assert self._process is not None
        workers = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        assert not psutil.wait_procs(workers, 30)[1]

    def kill_agent(self, node_id: str) -> None:
        """Kill an agent."""
        agent = self.agents.pop(node_id)
        agent.kill()
        agent.wait(30)

    def restart(self) -> None:
        """Kill the server and start it again; then wait until its old workers have ended by themselves."""
        assert self._process is not None
        workers = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        self.start()
        assert not psutil.wait_procs(workers, 30)[1]

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            assert self._process.wait(30) == 0
            self._process = None

    def close(self) -> None:
        """Stop the server and all agents."""
        for agent in self.agents.values():
            agent.terminate()
        self.stop()
        for agent in self.agents.values():
            agent.kill()
            agent.wait(30)
