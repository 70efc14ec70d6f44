"""Owns the questions to the scheduler about waiting tasks and nodes, and its answers."""

from lattice_server.core.frozen import frozen
from lattice_server.core.model import Capacity, NodeSpec
from lattice_server.core.symbol import Symbol


@frozen
class Query:
    """A question to the scheduler, or the answer that carries the same number."""

    request_id: int


@frozen
class ExplainRequested(Query):
    """A caller asks why a task waits; `TaskExplained` answers."""

    run_id: str
    task_id: str


@frozen
class NodesRequested(Query):
    """A caller asks for the nodes and their free resources; `NodesDescribed` answers."""


class ReasonKind(Symbol):
    """The class of a reason to wait."""

    INPUT = "input"  # Another task has to succeed first.
    TURN = "turn"  # Other tasks go first: by priority, by age, or because their tenant has had less.
    RESOURCES = "resources"  # A node is short of a resource.
    NODES = "nodes"  # There is no node.
    LIMIT = "limit"  # As many calls run as a limit allows.
    BATCH = "batch"  # Its batch waits for more tasks.
    RETRY = "retry"  # An attempt failed and the next one may not start yet.
    RUNNING = "running"  # It does not wait: a worker runs it.
    ENDED = "ended"  # It does not wait: it has ended.
    SIGNAL = "signal"  # Its attempt waits for a signal.
    SERVICE = "service"  # A service that it needs is not ready.


@frozen
class Reason:
    """One reason why a task waits, as a sentence and, where they apply, as names and numbers."""

    kind: ReasonKind
    message: str
    task_id: str = ""
    node_id: str = ""
    resource: str = ""
    wanted: float = 0.0
    free: float = 0.0


@frozen
class Explanation:
    """Why a task has waited for `waited_s` seconds; `start_in_s` estimates how much longer it waits, if known."""

    reasons: tuple[Reason, ...]
    waited_s: float
    start_in_s: float | None


@frozen
class TaskExplained(Query):
    """The answer to `ExplainRequested`; None when the scheduler does not have the task."""

    explanation: Explanation | None


class NodeStatus(Symbol):
    """The condition of a node and its session, as callers see it."""

    READY = "ready"  # Accepts leases.
    DETACHED = "detached"  # Its worker's stream broke; its leases stay until the session expires.
    DRAINING = "draining"  # Finishes the leases it has and accepts no more.


@frozen(kw_only=True)
class NodeView(NodeSpec):
    """A node at one moment; `attempts` counts those assigned to it, `free_gpu` the free GPUs and parts of GPUs."""

    session_id: str
    state: NodeStatus
    free: Capacity
    attempts: int
    free_gpu: float = 0.0


@frozen
class NodesDescribed(Query):
    """The answer to `NodesRequested`, with the numbers of waiting tasks and of attempts assigned to workers.

    `queued` of the waiting tasks could start now. The first in order of each group of them have waited for at most
    `oldest_s` seconds. `leases` counts the leases of all workers.
    """

    nodes: tuple[NodeView, ...]
    waiting: int
    running: int
    queued: int = 0
    oldest_s: float = 0.0
    leases: int = 0


Answer = TaskExplained | NodesDescribed
