"""The actor that Ray places, and in it a worker. Rule: it holds a reservation for as long as the worker lives.

Each worker waits until this is imported, so it imports little.
"""

import os
import socket
import subprocess

from lattice_server.executors.exchange import Exchange, Part
from lattice_server.executors.leftovers import MARK, end_leftovers
from lattice_server.executors.program import worker_command

TARGET = "LATTICE_TARGET"
# Of use to Ray's own processes alone.
RAY_TOKEN = "RAY_AUTH_TOKEN"


class WorkerHost:
    """Runs one worker. Ray calls it in a process of the node it chose, several calls at a time."""

    def __init__(self) -> None:
        self._exchange = Exchange()

    def pid(self) -> int:
        """Say that the reservation is there and this process in it."""
        return os.getpid()

    def read(self, artifact_id: str, offset: int) -> Part:
        """Return a part of a large value that its worker made, to the host of another worker."""
        return self._exchange.read(artifact_id, offset)

    def serve(self, flags: list[str], target: str, environment: dict[str, str], follows_node: bool) -> int:
        """Run a worker as a child and return its exit status.

        Args:
            flags: Those of the worker, without the server's address.
            target: The server's address.
            environment: What the worker needs beside the environment of this process.
            follows_node: Whether this Ray node was started by an agent that knows better how to reach the server: it
                left the address and the credentials in the environment.
        """
        inherited = {name: value for name, value in os.environ.items() if name != RAY_TOKEN}
        if follows_node and TARGET in inherited:
            target = inherited[TARGET]
            environment = {MARK: environment[MARK]}
        # The worker ends with the actor, whichever way the actor ends.
        environment = {**inherited, **environment, "LATTICE_PARENT_PID": str(os.getpid())}
        ours, theirs = socket.socketpair()
        with theirs:
            command = worker_command(target, [*flags, "--host-fd", str(theirs.fileno())])
            worker = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._exchange.serve(ours)
        status = worker.wait()
        end_leftovers(environment[MARK])
        return status
