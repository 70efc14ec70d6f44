"""The actor that Ray places, and in it a worker. Rule: it holds a reservation for as long as the worker lives.

Each worker waits until this is imported, so it imports little.
"""

import ctypes
import os
import socket
import subprocess

from lattice_server.executors.processes import MARK, end_orphans, token_flags, worker_command
from lattice_server.executors.ray_transfer import Exchange, Part

TARGET, TOKEN = "LATTICE_TARGET", "LATTICE_TOKEN"
PR_SET_DUMPABLE = 4
# Only Ray's own processes need it.
RAY_TOKEN = "RAY_AUTH_TOKEN"


class WorkerHost:
    """Runs one worker. Ray calls it in a process of the node it chose, several calls at a time."""

    def __init__(self) -> None:
        self._exchange = Exchange()

    def pid(self) -> int:
        """Return the process id; an answer shows that the reservation is made and this process runs in it."""
        return os.getpid()

    def read(self, artifact_id: str, offset: int) -> Part:
        """Return a part of a large value that its worker made, to the host of another worker."""
        return self._exchange.read(artifact_id, offset)

    def serve(self, flags: list[str], target: str, environment: dict[str, str], follows_node: bool) -> int:
        """Run a worker as a child and return its exit status.

        Args:
            flags: Those of the worker, without the server's address.
            target: The server's address.
            environment: Additions to the environment of this process, and the worker's token, which is passed in a
                pipe.
            follows_node: Whether this Ray node was started by an agent that knows better how to reach the server: it
                left the address and its certificates in the environment.
        """
        token = environment.get(TOKEN, "")
        if token:
            _hide()
        inherited = {name: value for name, value in os.environ.items() if name != RAY_TOKEN}
        if follows_node and TARGET in inherited:
            target = inherited[TARGET]
            environment = {MARK: environment[MARK]}
        # The worker ends with the actor, whichever way the actor ends.
        environment = {**inherited, **environment, "LATTICE_PARENT_PID": str(os.getpid())}
        environment.pop(TOKEN, None)
        ours, theirs = socket.socketpair()
        with theirs:
            shown = token_flags(token) if token else []
            command = worker_command(target, [*flags, "--host-fd", str(theirs.fileno()), *shown])
            passed = [theirs.fileno(), *map(int, shown[1:])]
            worker = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=passed)
            for descriptor in passed[1:]:
                os.close(descriptor)
        self._exchange.serve(ours)
        status = worker.wait()
        end_orphans(environment[MARK])
        return status


def _hide() -> None:
    """Keep tasks of the same user from reading the memory of this process, which has the worker's token."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
