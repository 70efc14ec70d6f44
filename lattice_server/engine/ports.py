"""Owns the interfaces of the engine to the outside, as protocols. Rule: the engine names no implementation."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from lattice_server.background import OnFailure
from lattice_server.core.frozen import frozen
from lattice_server.core.messages import Fact, SchedulerEvent, WorkerEffect
from lattice_server.core.model import Capacity
from lattice_server.core.services.messages import Event
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.services.entry import ServiceEntry

# The node of the worker that the server starts on its own machine.
OWN_NODE = "local"


@frozen
class Contact:
    """How workers reach the server: beside it by `local_target`, a socket that only the server's user may open; from
    other machines by `target`, where they show a token.

    `issue` makes a token for the worker of a node, which belongs to a subject, and `revoke` takes a token back.
    `on_failure` stops the server: nothing starts workers any more.
    """

    local_target: str
    target: str
    issue: Callable[[str, str], str]
    revoke: Callable[[str], None]
    on_failure: OnFailure


@frozen
class Machine:
    """A machine that a subject offers to the cluster, and the node it is to be."""

    node_id: str
    hostname: str
    node_ip: str
    capacity: Capacity
    labels: Mapping[str, str]
    subject: str = ""


@frozen
class RayCluster:
    """How a machine joins Ray: where the head listens, its token, the resource its Ray node offers one of, and the
    version it has to have."""

    address: str
    token: str
    resource: str
    version: str


@frozen
class Membership:
    """How a machine that joined serves its node: by Ray, or by itself when `ray` is None.

    `over` gets the name of a `CloseReason` when the machine is no longer needed: DRAINED or UNAUTHENTICATED for good,
    SHUTDOWN when it should join again.
    """

    ray: RayCluster | None
    over: asyncio.Future[str]


class Observer(Protocol):
    """Is told what happens on the main thread, for metrics and traces. It decides nothing and never raises."""

    def note(self, entry: RunEntry, fact: Fact) -> None:
        """Take a fact of a run, after it was added to the log of the run."""

    def perform(self, effect: WorkerEffect) -> WorkerEffect:
        """Take an effect of the scheduler that goes to a worker, and return it; a lease may get `trace_parents`."""


# Takes the counts of a worker since its last heartbeat: the level of isolation, how many processes it started for it,
# how many attempts waited for one, and how many seconds those took that became ready.
OnRunners = Callable[[str, int, int, Sequence[float]], object]


class ServiceObserver(Protocol):
    """Is told what happens to services on the main thread, for metrics. It decides nothing and never raises."""

    def note(self, service: ServiceEntry, event: Event, now: float) -> None:
        """Take an event of a service, after its machine took it at a monotonic time."""

    def note_request(self, service: str, status: int, duration_s: float) -> None:
        """Take a request that a gateway answered; `service` is empty when the key of the request was not valid."""


class ExecutorError(Exception):
    """An executor cannot start at all; the message says why, in one line."""


class Executor(Protocol):
    """Starts, watches and ends worker processes. Called from the main thread's event loop."""

    name: str

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Start workers that dial `contact`; `post` is told when one is gone for certain."""

    async def stop(self) -> None:
        """End every process this executor started, and only those."""

    def ray_address(self) -> str:
        """Return where Ray's head listens, `host:port`; empty without Ray."""

    async def join(self, machine: Machine) -> Membership:
        """Take in a machine; without Ray it has to serve its node itself. One that joined before is taken in anew."""

    def leave(self, node_id: str, membership: Membership) -> None:
        """Note that the stream of a machine, by which it got this membership, ended; it may join again."""

    def has_given_up(self, worker_id: str) -> bool:
        """Whether `post` was told that a worker is lost: it must not be admitted when it connects again."""
