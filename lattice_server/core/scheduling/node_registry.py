"""Owns the nodes and their sessions. Rule: one session serves a node; a newer one replaces it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.messages import WorkerHello
from lattice_server.core.model import NodeSpec, TaskSpec
from lattice_server.core.scheduling.node_index import NodeIndex
from lattice_server.core.scheduling.nodes import Node, Slot
from lattice_server.core.scheduling.placement import Shape, shape_of
from lattice_server.core.scheduling.shares import Total, share_of
from lattice_server.core.scheduling.shortages import could_run
from lattice_server.core.states import NodeState, SessionState

MAX_GONE = 1000
MAX_SHAPES = 100_000


class NodeRegistry:
    """The connected nodes, and the lost ones that may come back."""

    def __init__(self, session_ttl_s: float) -> None:
        self.nodes: dict[str, Node] = {}
        self.index = NodeIndex()
        self.session_ttl_s = session_ttl_s
        self._total = Total()
        self._sessions: dict[str, Node] = {}
        self._workers: dict[str, dict[str, Node]] = {}
        self._lost: dict[str, NodeSpec] = {}
        self._unwanted: dict[str, None] = {}
        self._detached: Deadlines[Node] = Deadlines()
        self._draining: Deadlines[Node] = Deadlines()
        self._could_run: dict[tuple[Shape, str], bool] = {}
        self._shares: dict[Shape, float] = {}
        self._shapes: dict[Shape, Shape] = {}

    def by_session(self, session_id: str) -> Node | None:
        """Return the node that a session serves."""
        return self._sessions.get(session_id)

    def by_worker(self, worker_id: str) -> list[Node]:
        """Return the nodes that a worker serves."""
        return list(self._workers.get(worker_id, {}).values())

    def known(self) -> tuple[NodeSpec, ...]:
        """Return every node that accepts leases or may come back."""
        ready = (node.spec for node in self.nodes.values() if node.state is NodeState.READY)
        return tuple(chain(ready, self._lost.values()))

    def join(self, hello: WorkerHello, session_id: str) -> Node:
        """Add a node."""
        node = Node(hello, session_id, replaced_session_id=hello.session_id)
        assert node.node_id not in self.nodes, "the older node of this id was removed"
        self.nodes[node.node_id] = node
        self._sessions[session_id] = node
        self._workers.setdefault(hello.worker_id, {})[node.node_id] = node
        self._lost.pop(node.node_id, None)
        self.index.update(node)
        self._count(node, 1)
        return node

    def remove(self, node: Node, *, may_return: bool) -> None:
        """Remove a node."""
        if node.state is not NodeState.REMOVED:
            node.move(NodeState.REMOVED)
        node.move_session(SessionState.ENDED)
        node.detached_at = None
        del self.nodes[node.node_id]
        del self._sessions[node.session_id]
        self._count(node, -1)
        served = self._workers[node.spec.worker_id]
        del served[node.node_id]
        if not served:
            del self._workers[node.spec.worker_id]
        self.index.remove(node)
        self._detached.discard(node)
        self._draining.discard(node)
        if may_return:
            self._lost[node.node_id] = node.spec
            if len(self._lost) > MAX_GONE:
                del self._lost[next(iter(self._lost))]

    def detach(self, node: Node, at: float) -> None:
        """Note that the stream of a node's session broke."""
        node.move_session(SessionState.DETACHED)
        node.detached_at = at
        self._detached.set(node, at + self.session_ttl_s)
        self.index.update(node)

    def resume(self, node: Node) -> None:
        """Note that a worker resumed the session of its node."""
        node.move_session(SessionState.CONNECTED)
        node.detached_at = None
        self._detached.discard(node)
        self.index.update(node)

    def drain(self, node: Node, deadline: float | None) -> None:
        """Have a node accept no further leases; the earliest deadline counts."""
        node.move(NodeState.DRAINING)
        self.index.update(node)
        if deadline is not None and (node.drain_at is None or deadline < node.drain_at):
            node.drain_at = deadline
            self._draining.set(node, deadline)

    def reject_worker(self, worker_id: str) -> None:
        """Remember that a worker was lost while its node drained, so that it is drained again if it comes back."""
        self._unwanted[worker_id] = None
        if len(self._unwanted) > MAX_GONE:
            del self._unwanted[next(iter(self._unwanted))]

    def is_wanted(self, worker_id: str) -> bool:
        """Whether a worker may serve a node."""
        return worker_id not in self._unwanted

    def expired(self, now: float) -> Iterator[Node]:
        """Take out the nodes whose sessions were detached for too long."""
        return self._detached.due(now)

    def drain_overdue(self, now: float) -> Iterator[Node]:
        """Take out the draining nodes whose deadline has passed."""
        return self._draining.due(now)

    def next_deadline(self) -> float | None:
        """Return when a session expires or the deadline of a drain passes next."""
        due = [self._detached.next_at(), self._draining.next_at()]
        return min((at for at in due if at is not None), default=None)

    def take(self, node: Node, slot: Slot) -> None:
        """Take the resources of a slot."""
        node.take(slot)
        self.index.update(node)

    def release(self, slot: Slot) -> None:
        """Free the resources of a slot."""
        node = self.nodes[slot.node_id]
        node.release(slot)
        self.index.update(node)

    def park(self, slot: Slot) -> None:
        """Free the CPUs of a slot whose first lease waits for called tasks."""
        node = self.nodes[slot.node_id]
        node.park(slot)
        self.index.update(node)

    def unpark(self, slot: Slot) -> None:
        """Take the CPUs of a parked slot again."""
        node = self.nodes[slot.node_id]
        node.unpark(slot)
        self.index.update(node)

    def shape(self, spec: TaskSpec) -> Shape:
        """Return the needs of a task: the same object for equal ones, which is quick to look up."""
        return self._interned(shape_of(spec))

    def exclusive(self, shape: Shape) -> Shape:
        """Return a shape whose lease is the only one on its node."""
        return shape if shape.is_exclusive else self._interned(replace(shape, is_exclusive=True))

    def within(self, shape: Shape, nodes: frozenset[str] | None) -> Shape:
        """Return a shape that only these nodes run; None for all."""
        return shape if shape.nodes == nodes else self._interned(replace(shape, nodes=nodes))

    def could_run(self, shape: Shape, node: Node) -> bool:
        """Whether a node could run `shape` if nothing else ran there and it accepted leases."""
        key = (shape, node.node_id)
        found = self._could_run.get(key)
        if found is None:
            self._limit_shapes()
            found = self._could_run[key] = could_run(shape, node.spec)
        return found

    def share(self, shape: Shape) -> float:
        """Return the largest share of any resource of the cluster that one call of `shape` takes."""
        found = self._shares.get(shape)
        if found is None:
            found = self._shares[shape] = share_of(shape.resources, shape.is_async, self._total)
        return found

    def check(self) -> None:
        """Assert the invariants of all nodes and of the tables that list them."""
        for node in self.nodes.values():
            node.check()
        self.index.check(self.nodes)
        assert set(self._detached) == {n for n in self.nodes.values() if n.session is SessionState.DETACHED}
        assert set(self._draining) == {n for n in self.nodes.values() if n.drain_at is not None}
        assert self._total.nodes == len(self.nodes)
        served = [node for nodes in self._workers.values() for node in nodes.values()]
        assert {node.node_id: node for node in served} == self.nodes
        assert {node.session_id: node for node in self.nodes.values()} == self._sessions

    def _interned(self, made: Shape) -> Shape:
        found = self._shapes.get(made)
        if found is None:
            self._limit_shapes()
            found = self._shapes[made] = made
        return found

    def _limit_shapes(self) -> None:
        """Callers can make up any number of shapes: forget all of them once there are too many."""
        if len(self._could_run) + len(self._shapes) > MAX_SHAPES:
            self._could_run.clear()
            self._shares.clear()
            self._shapes.clear()

    def _count(self, node: Node, sign: int) -> None:
        self._total.add(node.spec.capacity, sign)
        # A node that comes back may have another capacity, and all shares depend on the total.
        self._could_run.clear()
        self._shares.clear()
