"""A cluster on a network of hosts: a head that runs nothing itself, and workers that join it, all by TLS and token."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lattice.v1 import cluster_pb2

from lattice_client import LatticeClient
from tests.certificates import certificates
from tests.commands import LATTICE
from tests.e2e.net import GONE_S, Host, network, starting

TOKEN = "a-token-for-tests"
PORT = 50051


class Cluster:
    """One head and any number of machines that may join it."""

    def __init__(self, hosts: list[Host], folder: Path, executor: str) -> None:
        self.head, *self.machines = hosts
        self.executor = executor
        self.address = f"{self.head.address}:{PORT}"
        self._files = certificates(folder, self.head.address)
        self.env = {"LATTICE_TOKEN": TOKEN, "LATTICE_TLS_CA": str(self._files.ca)}
        self._server: subprocess.Popen[bytes] | None = None
        self._client: LatticeClient | None = None
        self.workers: dict[str, subprocess.Popen[bytes]] = {}

    def start_head(self, *flags: str) -> None:
        """Start the head and wait until it serves. It offers nothing to run on unless `flags` say so."""
        command = ["--head", "--host", self.head.address, "--executor", self.executor, "--journal", "memory"]
        command += ["--tls-cert", str(self._files.cert), "--tls-key", str(self._files.key)]
        command += flags or ("--num-cpus", "0")
        self.close()
        with starting(self.executor):
            self._server = self.head.lattice(*command, env={"LATTICE_TOKEN": TOKEN}, until="Lattice is listening")

    def join(self, machine: Host, node_id: str, *flags: str) -> subprocess.Popen[bytes]:
        """Have a machine join and wait until it is a node that takes work."""
        command = ["--worker", "--addr", self.address, "--node-id", node_id]
        command += [*(flags or ("--num-cpus", "2")), "--label", f"at={node_id}"]
        worker = machine.lattice(*command, env=self.env, until=f"as node {node_id}")
        self.until_node(node_id, cluster_pb2.NODE_STATE_READY)
        self.workers[node_id] = worker
        return worker

    def restore(self, names: str, *flags: str) -> None:
        """Have the first machines be nodes with these names of one letter each, whatever befell the cluster before."""
        for machine, name in zip(self.machines, names, strict=False):
            machine.mend()
            machine.signal_all(signal.SIGCONT)
            if not any({"--join", name} <= {*process.cmdline()} for process in machine.processes()):
                machine.kill_all()
                self.join(machine, name, *flags)
        ready = cluster_pb2.NODE_STATE_READY
        self.until(
            lambda: (
                {name: node.state for name, node in self.nodes().items() if name != "ray-head"}
                == dict.fromkeys(names, ready)
            )
        )

    @property
    def client(self) -> LatticeClient:
        """A client beside the head, by the socket that only the server's user may open."""
        if self._client is None:
            self._client = LatticeClient(self.target)
        return self._client

    @property
    def target(self) -> str:
        """Where callers beside the head reach it, whatever network they are in."""
        assert self._server is not None
        sockets = Path(f"/proc/{self._server.pid}/net/unix").read_text()
        return "unix:" + next(word for word in sockets.split() if word.endswith("/head.sock"))

    def close(self) -> None:
        """Close the client."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def nodes(self) -> dict[str, cluster_pb2.Node]:
        """Return the nodes by their ids."""
        return {node.node_id: node for node in self.client.nodes()}

    def until_node(self, node_id: str, *states: cluster_pb2.NodeState.ValueType) -> None:
        """Wait until a node is in one of these states; without any, until it is gone."""

        def is_so() -> bool:
            node = self.nodes().get(node_id)
            return node is None if not states else node is not None and node.state in states

        self.until(is_so)

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + GONE_S
        while not is_so():
            assert time.monotonic() < deadline, f"it is not so; the nodes are {self.nodes()}"
            time.sleep(0.02)

    def command(self, *words: str) -> str:
        """Run a `lattice` command on the head's host, as its user would."""
        return self.head.run(LATTICE, *words, "--addr", self.address, env=self.env)


@contextmanager
def cluster(folder: Path, executor: str, machines: int = 2, flags: Sequence[str] = ()) -> Iterator[Cluster]:
    """A cluster whose head runs, with `flags`, while the block runs."""
    with network(machines + 1, folder) as hosts:
        found = Cluster(hosts, folder, executor)
        found.start_head(*flags)
        yield found
        found.close()
