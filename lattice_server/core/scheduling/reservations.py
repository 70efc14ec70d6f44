"""Owns the nodes that are reserved for starved tasks.

Rule: a node is reserved for a group that could not be placed for a second while tasks of the same or a lower priority
were, or for a minute while any were. The reserved node is expected to have room first, by the usual durations of its
tasks. Other tasks run on that node only as far as they delay the group no further. The reservation holds a permit of
the group's concurrency key.
"""

import heapq
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from operator import itemgetter

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.permits import Permits
from lattice_server.core.scheduling.placement import Shape, devices_on
from lattice_server.core.scheduling.work import TaskGroup

RESERVE_AFTER_S = 1.0
RESERVE_ANYWAY_S = 60.0  # The same if only tasks of a higher priority were placed.
MAX_PRIORITIES = 64
MAX_TIMED = 64  # Nodes of which it is estimated when they have room.


@dataclass(slots=True, eq=False)
class Reservations:
    """The reserved nodes, and the blocked shapes, which no node has room for."""

    _registry: NodeRegistry
    _permits: Permits
    _nodes: dict[TaskGroup, Node] = field(default_factory=dict)
    _groups: dict[str, TaskGroup] = field(default_factory=dict)
    _shapes: dict[str, Shape] = field(default_factory=dict)
    _blocked: dict[Shape, tuple[float, int]] = field(default_factory=dict)  # Since when, after how many placed batches.
    _starving: Deadlines[Shape] = field(default_factory=Deadlines)
    _hopeless: dict[Shape, float] = field(default_factory=dict)  # Until when no node is looked for.
    _placed: int = 0
    _last_placed: dict[int, int] = field(default_factory=dict)  # By priority: the number of the last batch.

    def items(self) -> list[tuple[TaskGroup, Node]]:
        """Return the groups that have a node reserved, and the node of each."""
        return list(self._nodes.items())

    def has(self, group: TaskGroup) -> bool:
        """Whether a group has a node reserved."""
        return group in self._nodes

    def group_of(self, node: Node) -> TaskGroup | None:
        """Return the group that a node is reserved for."""
        return self._groups.get(node.node_id)

    def of_others(self, group: TaskGroup) -> Mapping[str, Shape]:
        """Return the shapes that nodes are reserved for, except the node that is reserved for this group."""
        own = self._nodes.get(group)
        if own is None:
            return self._shapes
        return {node_id: shape for node_id, shape in self._shapes.items() if node_id != own.node_id}

    def note_placed(self, group: TaskGroup, priority: int) -> bool:
        """Note that a batch of a group is placed; return whether it takes over the permit of a reservation."""
        self._placed += 1
        self._last_placed.pop(priority, None)
        self._last_placed[priority] = self._placed
        if len(self._last_placed) > MAX_PRIORITIES:
            del self._last_placed[next(iter(self._last_placed))]
        self._unblock(group.shape)
        return self._drop(group)

    def note_blocked(self, group: TaskGroup, now: float) -> None:
        """Note that no node has room for the first group of a shape, and reserve a node if it is starved."""
        blocked = self._blocked.get(group.shape)
        if blocked is None:
            self._blocked[group.shape] = (now, self._placed)
            self._starving.set(group.shape, now + RESERVE_AFTER_S)
            return
        since, placed = blocked
        if now < since + RESERVE_AFTER_S or group.shape in self._shapes.values():
            return
        if self._was_passed(group, since, placed, now):
            self._reserve(group, now)
        elif now < since + RESERVE_ANYWAY_S:
            self._starving.set(group.shape, since + RESERVE_ANYWAY_S)

    def starving(self, now: float) -> Iterator[Shape]:
        """Take out the shapes for which a node may have to be reserved now."""
        return self._starving.due(now)

    def next_deadline(self) -> float | None:
        """Return when a node may have to be reserved next."""
        # No batch was placed since the first shape was blocked, nor since the later ones.
        if self._blocked and next(iter(self._blocked.values()))[1] == self._placed:
            return None
        return self._starving.next_at()

    def forget(self, queued: Container[Shape]) -> list[TaskGroup]:
        """End the reservations of groups that are not queued, or whose node accepts no leases; return these groups."""
        for shape in [shape for shape in self._blocked if shape not in queued]:
            self._unblock(shape)
        dropped = []
        for group, node in self.items():
            is_here = self._registry.nodes.get(node.node_id) is node and node.takes_work and not node.parked
            if not group.count or not is_here:
                self._drop(group)
                self._permits.release(group.concurrency)
                dropped.append(group)
        return dropped

    def check(self) -> None:
        """Assert that the tables of reservations agree."""
        assert self._groups == {node.node_id: group for group, node in self._nodes.items()}
        assert self._shapes == {node.node_id: group.shape for group, node in self._nodes.items()}
        assert {*self._starving, *self._hopeless} <= self._blocked.keys()

    def _was_passed(self, group: TaskGroup, since: float, placed: int, now: float) -> bool:
        """Whether other tasks were placed since a group was blocked.

        For the first minute, tasks of a higher priority do not count.
        """
        head = group.head()
        if head is None or now >= since + RESERVE_ANYWAY_S:
            return self._placed > placed
        return any(n > placed and priority <= head.ready.priority for priority, n in self._last_placed.items())

    def _reserve(self, group: TaskGroup, now: float) -> None:
        """Reserve the node that is expected to have room first; none that would have to wait for a service."""
        shape = group.shape
        if not self._permits.has_free(group.concurrency) or now < self._hopeless.get(shape, now):
            return
        nodes = [
            node
            for node in self._registry.index.suited(shape)
            # Called tasks must find room beside the leases that wait for them.
            if node.node_id not in self._groups and not node.parked and self._registry.could_run(shape, node)
        ]
        near = heapq.nlargest(MAX_TIMED, nodes, key=lambda node: _nearness(node, shape))
        times = [(node.room_in_s(lambda left: devices_on(left, shape) is not None, now), node) for node in near]
        in_s, node = min(times, key=itemgetter(0), default=(inf, None))
        if node is not None and in_s < inf:
            self._permits.take(group.concurrency)
            self._nodes[group] = node
            self._groups[node.node_id] = group
            self._shapes[node.node_id] = shape
        else:
            self._hopeless[shape] = now + RESERVE_AFTER_S

    def _drop(self, group: TaskGroup) -> bool:
        node = self._nodes.pop(group, None)
        if node is None:
            return False
        del self._groups[node.node_id], self._shapes[node.node_id]
        return True

    def _unblock(self, shape: Shape) -> None:
        self._blocked.pop(shape, None)
        self._hopeless.pop(shape, None)
        self._starving.discard(shape)


def _nearness(node: Node, shape: Shape) -> tuple[float, float, float]:
    """Return a key that is greatest for the node that is likely to have room for a shape first."""
    leases = node.attempts_beside_services() if shape.is_exclusive else 0
    return -leases, sum(node.free_gpu.values()) if shape.resources.gpu else 0.0, node.free_cpu
