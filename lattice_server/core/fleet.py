"""Owns the nodes and the sessions of their workers. Rule: a node is served by one session; a newer one replaces it."""

from dataclasses import replace

from lattice_server.core.leases import Node
from lattice_server.core.messages import WorkerHello
from lattice_server.core.model import Capacity, TaskSpec
from lattice_server.core.placement import Shape, could_run, idle, shape_of, share_of, suits

MAX_GONE = 1000
MAX_SHAPES = 100_000


class Fleet:
    """The nodes that are here, and those that were: what one of them could run may wait for it."""

    def __init__(self, session_ttl_s: float) -> None:
        self.nodes: dict[str, Node] = {}
        self.total = Capacity(0.0, slots=0, async_slots=0)
        self._sessions: dict[str, Node] = {}
        self._gone: dict[str, Node] = {}
        self._unwanted: dict[str, None] = {}
        self.session_ttl_s = session_ttl_s
        self._could_run: dict[tuple[Shape, str], bool] = {}
        self._suits: dict[tuple[Shape, str], bool] = {}
        self._shares: dict[Shape, float] = {}
        self._shapes: dict[Shape, Shape] = {}
        self._kinds: dict[Shape, Shape] = {}

    def by_session(self, session_id: str) -> Node | None:
        """Return the node a session serves."""
        return self._sessions.get(session_id)

    def join(self, hello: WorkerHello, session_id: str) -> Node:
        """Add a node."""
        node = Node(
            hello.node_id,
            hello.worker_id,
            session_id,
            hello.hostname,
            hello.node_ip,
            hello.capacity,
            hello.labels,
            hello.isolations,
            hello.runtime,
            hello.pid,
            hello.entrypoints,
        )
        self.nodes[node.node_id] = node
        self._sessions[session_id] = node
        self._gone.pop(node.node_id, None)
        self._count()
        return node

    def remove(self, node: Node, *, may_return: bool) -> None:
        """Take a node out."""
        self.nodes.pop(node.node_id, None)
        self._sessions.pop(node.session_id, None)
        if may_return:
            self._gone[node.node_id] = idle(node)
            while len(self._gone) > MAX_GONE:
                del self._gone[next(iter(self._gone))]
        self._count()

    def unwant(self, worker_id: str) -> None:
        """Remember a worker that is to leave, and is lost before it is told so."""
        self._unwanted[worker_id] = None
        while len(self._unwanted) > MAX_GONE:
            del self._unwanted[next(iter(self._unwanted))]

    def wants(self, worker_id: str) -> bool:
        """Whether a worker may serve, as far as is known."""
        return worker_id not in self._unwanted

    def known(self) -> tuple[Node, ...]:
        """Return every node that is here or may come back, as it is when nothing runs on it."""
        return (*(idle(node) for node in self.nodes.values() if not node.is_draining), *self._gone.values())

    def shape(self, spec: TaskSpec) -> Shape:
        """Return what placement looks at in a task: the same object for the same, which is quick to look up."""
        return self._same(shape_of(spec))

    def kind(self, shape: Shape) -> Shape:
        """Return a shape without its limit, which is all that says where it can start; the same object for the same."""
        if not shape.limit_key:
            return shape
        found = self._kinds.get(shape)
        if found is None:
            found = self._kinds[shape] = self._same(replace(shape, limit_key="", max_parallel=0))
        return found

    def alone(self, shape: Shape) -> Shape:
        """Return a shape as one whose lease is the only one on its node."""
        return shape if shape.is_exclusive else self._same(replace(shape, is_exclusive=True))

    def could_run(self, shape: Shape, node: Node) -> bool:
        """Whether a node could run `shape` if nothing else ran there."""
        key = (self.kind(shape), node.node_id)
        found = self._could_run.get(key)
        if found is None:
            self._forget_shapes()
            found = self._could_run[key] = could_run(shape, node)
        return found

    def suits(self, shape: Shape, node: Node) -> bool:
        """Whether a node may run `shape` at all, load and size aside."""
        key = (self.kind(shape), node.node_id)
        found = self._suits.get(key)
        if found is None:
            self._forget_shapes()
            found = self._suits[key] = suits(shape, node)
        return found

    def share(self, shape: Shape) -> float:
        """Return the largest share of the cluster's resources that one call of `shape` takes."""
        found = self._shares.get(shape)
        if found is None:
            found = self._shares[shape] = share_of(shape.resources, shape.is_async, self.total)
        return found

    def overdue(self, now: float) -> list[Node]:
        """Return the nodes whose worker has been away for too long."""
        return [n for n in self.nodes.values() if n.detached_at is not None and now >= self._deadline(n.detached_at)]

    def outstaying(self, now: float) -> list[Node]:
        """Return the nodes that are drained and on which things run for too long."""
        return [n for n in self.nodes.values() if n.drain_at is not None and now >= n.drain_at]

    def next_deadline(self) -> float | None:
        """Return when the next node is overdue or outstays its time."""
        due = [self._deadline(n.detached_at) for n in self.nodes.values() if n.detached_at is not None]
        due += [n.drain_at for n in self.nodes.values() if n.drain_at is not None]
        return min(due, default=None)

    def _deadline(self, detached_at: float) -> float:
        return detached_at + self.session_ttl_s

    def _same(self, made: Shape) -> Shape:
        found = self._shapes.get(made)
        if found is None:
            self._forget_shapes()
            found = self._shapes[made] = made
        return found

    def _forget_shapes(self) -> None:
        """Callers make up shapes without end; work out anew what is asked for after many others."""
        if len(self._could_run) + len(self._suits) + len(self._shapes) > MAX_SHAPES:
            self._could_run.clear()
            self._suits.clear()
            self._shares.clear()
            self._shapes.clear()
            self._kinds.clear()

    def _count(self) -> None:
        self._could_run.clear()
        self._suits.clear()
        self._shares.clear()
        offers = [node.capacity for node in self.nodes.values()]
        self.total = Capacity(
            sum(offer.cpu for offer in offers),
            sum(offer.memory_bytes for offer in offers),
            tuple(gpu for offer in offers for gpu in offer.gpus),
            sum(offer.slots for offer in offers),
            sum(offer.async_slots for offer in offers),
        )
