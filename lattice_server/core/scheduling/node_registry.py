"""Owns the nodes and the sessions of their workers. Rule: a node is served by one session; a newer one replaces it."""

from collections.abc import Iterator
from dataclasses import replace

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.messages import WorkerHello
from lattice_server.core.model import TaskSpec
from lattice_server.core.scheduling.node_index import NodeIndex
from lattice_server.core.scheduling.nodes import Node, Slot
from lattice_server.core.scheduling.placement import Shape, Total, could_run, idle, shape_of, share_of

MAX_GONE = 1000
MAX_SHAPES = 100_000


class Fleet:
    """The nodes that are here, and those that were: what one of them could run may wait for it."""

    def __init__(self, session_ttl_s: float) -> None:
        self.nodes: dict[str, Node] = {}
        self.total = Total()
        self.index = NodeIndex()
        self._sessions: dict[str, Node] = {}
        self._workers: dict[str, dict[str, Node]] = {}
        self._idle: dict[str, Node] = {}  # Those that are here, but for drained ones, as if nothing ran there.
        self._gone: dict[str, Node] = {}
        self._unwanted: dict[str, None] = {}
        self.session_ttl_s = session_ttl_s
        self._detached: Deadlines[Node] = Deadlines()
        self._drained: Deadlines[Node] = Deadlines()
        self._could_run: dict[tuple[Shape, str], bool] = {}
        self._shares: dict[Shape, float] = {}
        self._shapes: dict[Shape, Shape] = {}

    def by_session(self, session_id: str) -> Node | None:
        """Return the node a session serves."""
        return self._sessions.get(session_id)

    def by_worker(self, worker_id: str) -> list[Node]:
        """Return the nodes a worker serves."""
        return list(self._workers.get(worker_id, {}).values())

    def join(self, hello: WorkerHello, session_id: str) -> Node:
        """Add a node, in the place of one of its name."""
        if (known := self.nodes.get(hello.node_id)) is not None:
            self.remove(known, may_return=False)
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
        self._workers.setdefault(node.worker_id, {})[node.node_id] = node
        self._gone.pop(node.node_id, None)
        self._idle[node.node_id] = idle(node)
        self.index.update(node)
        self._count(node, 1)
        return node

    def remove(self, node: Node, *, may_return: bool) -> None:
        """Take a node out."""
        if self.nodes.pop(node.node_id, None) is not None:
            self._count(node, -1)
            served = self._workers[node.worker_id]
            del served[node.node_id]
            if not served:
                del self._workers[node.worker_id]
        self._idle.pop(node.node_id, None)
        self.index.remove(node)
        self._sessions.pop(node.session_id, None)
        self._detached.discard(node)
        self._drained.discard(node)
        if may_return:
            self._gone[node.node_id] = idle(node)
            while len(self._gone) > MAX_GONE:
                del self._gone[next(iter(self._gone))]

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
        return (*self._idle.values(), *self._gone.values())

    def shape(self, spec: TaskSpec) -> Shape:
        """Return what placement looks at in a task: the same object for the same, which is quick to look up."""
        return self._same(shape_of(spec))

    def alone(self, shape: Shape) -> Shape:
        """Return a shape as one whose lease is the only one on its node."""
        return shape if shape.is_exclusive else self._same(replace(shape, is_exclusive=True))

    def could_run(self, shape: Shape, node: Node) -> bool:
        """Whether a node could run `shape` if nothing else ran there."""
        key = (shape, node.node_id)
        found = self._could_run.get(key)
        if found is None:
            self._forget_shapes()
            found = self._could_run[key] = could_run(shape, node)
        return found

    def share(self, shape: Shape) -> float:
        """Return the largest share of the cluster's resources that one call of `shape` takes."""
        found = self._shares.get(shape)
        if found is None:
            found = self._shares[shape] = share_of(shape.resources, shape.is_async, self.total)
        return found

    def take(self, node: Node, slot: Slot) -> None:
        """Reserve what a slot holds."""
        node.take(slot)
        self.index.update(node)

    def release(self, slot: Slot) -> None:
        """Free what a slot held."""
        node = self.nodes[slot.node_id]
        node.release(slot)
        self.index.update(node)

    def detach(self, node: Node, at: float) -> None:
        """Note that the stream of a node's worker broke at a time."""
        node.detached_at = at
        self._detached.set(node, at + self.session_ttl_s)
        self.index.update(node)

    def resume(self, node: Node) -> None:
        """Note that the worker of a node that was detached is back."""
        node.detached_at = None
        self._detached.discard(node)
        self.index.update(node)

    def drain(self, node: Node, deadline: float | None) -> None:
        """Have a node take nothing new, and leave no later than a deadline; an earlier one that was set holds."""
        node.is_draining = True
        self._idle.pop(node.node_id, None)
        self.index.update(node)
        if deadline is not None and (node.drain_at is None or deadline < node.drain_at):
            node.drain_at = deadline
            self._drained.set(node, deadline)

    def overdue(self, now: float) -> Iterator[Node]:
        """Take out the nodes whose worker has been away for too long."""
        return self._detached.due(now)

    def outstaying(self, now: float) -> Iterator[Node]:
        """Take out the nodes that are drained and on which attempts run for too long."""
        return self._drained.due(now)

    def next_deadline(self) -> float | None:
        """Return when the next node is overdue or outstays its time."""
        due = [self._detached.next_at(), self._drained.next_at()]
        return min((at for at in due if at is not None), default=None)

    def check(self) -> None:
        """Assert that what is kept about nodes is so."""
        self.index.check(self.nodes)
        assert set(self._detached) == {node for node in self.nodes.values() if node.detached_at is not None}
        assert set(self._drained) == {node for node in self.nodes.values() if node.drain_at is not None}
        assert self.total.nodes == len(self.nodes)
        served = [node for nodes in self._workers.values() for node in nodes.values()]
        assert {node.node_id: node for node in served} == self.nodes

    def _same(self, made: Shape) -> Shape:
        found = self._shapes.get(made)
        if found is None:
            self._forget_shapes()
            found = self._shapes[made] = made
        return found

    def _forget_shapes(self) -> None:
        """Callers make up shapes without end; work out anew what is asked for after many others."""
        if len(self._could_run) + len(self._shapes) > MAX_SHAPES:
            self._could_run.clear()
            self._shares.clear()
            self._shapes.clear()

    def _count(self, node: Node, sign: int) -> None:
        """Add what a node offers to the total, or take it away."""
        self.total.add(node.capacity, sign)
        # Of nodes of one name, the newest may offer something else.
        self._could_run.clear()
        self._shares.clear()
